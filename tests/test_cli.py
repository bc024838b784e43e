"""The command as people run it: with a made-up scorer for the plumbing, with the embedded model for the whole."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from endoreward_fast import pipeline
from endoreward_fast.cli import app
from endoreward_fast.output import ERRORS_SHOWN

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tokens:
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    score: float | None
    flags: tuple[str, ...] = ()
    error: str | None = None
    tokens: Tokens | None = None


class LengthScorer:
    """Scores a completion by minus its length, last first; "LONG..." is refused, "NAN" has no finite score."""

    def __init__(self):
        self.options = {}
        self.stop_after = None

    def iter_scores(self, rows, *, on_tokens=None, per_token=False, **options):
        self.options = options
        for count, i in enumerate(reversed(range(len(rows)))):
            if count == self.stop_after:
                raise KeyboardInterrupt
            text = rows[i]["completion"]
            on_tokens(len(text))
            if text.startswith("LONG"):
                yield i, Score(None, error="9 tokens, the model takes 8 (see --truncate)")
            elif text == "NAN":
                yield i, Score(float("nan"))
            else:
                tokens = Tokens((-1.0,) * len(text)) if per_token else None
                yield i, Score(-float(len(text)), () if text else ("empty",), tokens=tokens)


@pytest.fixture
def scorer(monkeypatch):
    made = LengthScorer()
    made.loaded = []

    def load(flags):
        made.loaded.append(flags)
        return made

    monkeypatch.setattr(pipeline, "load_scorer", load)
    return made


def run(*args, code=0, **kw):
    result = CliRunner().invoke(app, [str(a) for a in args], **kw)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    return result


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def put(folder, *rows, name="in.jsonl"):
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


PAIR = {"id": 7, "prompt": "p", "completion": "abc"}


# --- rows in, rows out


def test_score_keeps_every_column_and_the_order(scorer, tmp_path):
    path = put(
        tmp_path,
        PAIR,
        {"prompt": "p", "completions": ["a", "", "abc"], "tag": None},
        {"prompt": "p", "chosen": "a", "rejected": "bcd"},
        {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["aa", "bb", "cc"]},
        {"prompt": "é\u2028 \U0001f600", "completion": "\u0000x"},
    )
    out = rows_of(run("score", path).stdout)
    assert [r["score"] for r in out] == [
        -3.0,
        [-1.0, 0.0, -3.0],
        {"chosen": -1.0, "rejected": -3.0},
        {"chosen": [-1.0] * 3, "rejected": [-2.0] * 3},
        -2.0,
    ]
    assert out[1]["flags"] == [[], ["empty"], []]
    for before, after in zip(rows_of(path.read_text()), out, strict=True):
        assert {k: after[k] for k in before} == before
        assert "error" not in after


def test_score_adds_token_rewards_on_request_in_the_scores_shape(scorer, tmp_path):
    path = put(tmp_path, PAIR, {"prompt": "p", "chosen": "a", "rejected": "bc"})
    single, pair = rows_of(run("score", path, "--per-token").stdout)
    assert single["token_rewards"] == {"rewards": [-1.0] * 3}
    assert pair["token_rewards"]["rejected"] == {"rewards": [-1.0] * 2}
    assert "token_rewards" not in rows_of(run("score", path).stdout)[0]


def test_a_column_of_the_same_name_is_kept_beside_the_new_one(scorer, tmp_path):
    out = rows_of(run("score", put(tmp_path, {**PAIR, "score": "mine"})).stdout)[0]
    assert (out["input_score"], out["score"]) == ("mine", -3.0)


def test_half_a_surrogate_pair_in_another_column_survives(scorer, tmp_path):
    out = run("score", put(tmp_path, {**PAIR, "note": "\ud83d"})).stdout
    assert json.loads(out)["note"] == "\ud83d"


def test_rank_gives_positions_best_first(scorer, tmp_path):
    path = put(
        tmp_path,
        {"prompt": "p", "completions": ["ccc", "LONG", "a", "bb", "d"]},
        {"prompt": "p", "chosen": "aa", "rejected": ["b", "cc"]},
    )
    first, second = rows_of(run("rank", path, code=2).stdout)
    assert first["scores"] == [-3.0, None, -1.0, -2.0, -1.0]
    assert first["ranking"] == [2, 4, 3, 0]
    assert first["best"] == "a"
    assert first["error"][1].startswith("9 tokens")
    assert (second["scores"], second["ranking"], second["best"]) == ([-2.0, -1.0, -2.0], [1, 0, 2], "b")


def test_more_rows_than_a_window_come_in_order_and_all(scorer, tmp_path, monkeypatch):
    calls = []
    whole = LengthScorer.iter_scores
    monkeypatch.setattr(
        LengthScorer, "iter_scores", lambda self, rows, **o: calls.append(len(rows)) or whole(self, rows, **o)
    )
    path = put(tmp_path, *({"prompt": "p", "completion": "x" * n, "n": n} for n in range(100)))
    out = rows_of(run("score", path, "--max-tokens-per-batch", 64).stdout)
    assert [(r["n"], r["score"]) for r in out] == [(n, -n) for n in range(100)]
    assert sum(calls) == 100 and 3 < len(calls) < 20


def test_limit_output_and_standard_input(scorer, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("what was there before")
    result = run("score", "-", "--limit", 2, "--output", target, input=(json.dumps(PAIR) + "\n") * 5)
    assert result.stdout == ""
    assert [r["score"] for r in rows_of(target.read_text())] == [-3.0, -3.0]
    assert "scored 2 of 2 rows" in result.stderr


def test_flags_reach_the_scorer(scorer, tmp_path):
    run(
        *("score", put(tmp_path, PAIR), "--alpha", 0.5, "--reduction", "mean", "--gamma", 0.9, "--floor", 0.1),
        *("--system", "Be brief.", "--max-tokens-per-batch", 64, "--max-length", 32, "--truncate", "prompt"),
        *("--no-chat", "--model", "some/model", "--dtype", "bfloat16", "--device", "cpu"),
    )
    assert scorer.options == {
        "alpha": 0.5,
        "reduction": "mean",
        "gamma": 0.9,
        "floor": 0.1,
        "system": "Be brief.",
        "max_tokens_per_batch": 64,
        "max_length": 32,
        "truncate": "prompt",
        "chat": False,
    }
    loaded = scorer.loaded[0]
    assert (loaded.model, loaded.dtype, loaded.device) == ("some/model", "bfloat16", "cpu")


def test_quiet_says_nothing_but_errors(scorer, tmp_path):
    assert run("score", put(tmp_path, PAIR), "--quiet").stderr == ""
    assert "line 2: not valid JSON" in run("score", put(tmp_path, PAIR, "{"), "-q", code=2).stderr


# --- bad input


def test_malformed_lines_are_named_and_the_rest_scored(scorer, tmp_path):
    result = run("score", put(tmp_path, PAIR, "{oops", PAIR), code=2)
    out = rows_of(result.stdout)
    assert [r["score"] for r in out] == [-3.0, None, -3.0]
    assert out[1]["error"].startswith("line 2: not valid JSON")
    assert "endoreward: line 2: not valid JSON" in result.stderr
    assert "1 of 3 rows could not be scored (exit code 2)" in result.stderr


def test_strict_stops_at_the_first_bad_row_and_keeps_what_came_before(scorer, tmp_path):
    for bad in ("{oops", {"prompt": "p", "completion": None}):
        result = run("score", put(tmp_path, PAIR, PAIR, bad, PAIR), "--strict", code=2)
        assert [r["score"] for r in rows_of(result.stdout)] == [-3.0, -3.0]
        assert result.stderr.splitlines()[-1].startswith("endoreward: line 3: ")
    bad = {"prompt": "p", "completion": "LONG"}
    result = run("score", put(tmp_path, PAIR, bad, PAIR), "--strict", code=2)
    assert "line 2: 9 tokens, the model takes 8" in result.stderr.splitlines()[-1]


def test_rows_that_cannot_be_scored_do_not_stop_the_others(scorer, tmp_path):
    path = put(
        tmp_path,
        {"prompt": "p", "completion": "LONG"},
        {"prompt": "p", "completion": "NAN"},
        {"prompt": "p"},
        {"prompt": "p", "completion": 12},
    )
    result = run("score", path, code=2)
    out = rows_of(result.stdout)
    assert [r["score"] for r in out] == [None, None, None, -2.0]
    assert [r.get("error") for r in out] == [
        "9 tokens, the model takes 8 (see --truncate)",
        "the score is not finite (nan)",
        "columns wanted: prompt and completion; prompt and completions; prompt, chosen and rejected; "
        "or messages; found: prompt",
        None,
    ]
    assert "NaN" not in result.stdout


def test_many_errors_are_counted_not_all_shown(scorer, tmp_path):
    result = run("score", put(tmp_path, PAIR, *["{"] * 100), code=2)
    assert result.stderr.count("not valid JSON") == ERRORS_SHOWN
    assert f"100 of 101 rows could not be scored (exit code 2); {100 - ERRORS_SHOWN} not shown" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["score", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["score", "empty.jsonl"], "empty.jsonl is empty: there is nothing to score"),
        (["score", "columns.jsonl"], "line 1: columns wanted: prompt and completion;"),
        (["score", "columns.jsonl"], "found: text, label"),
        (["rank", "in.jsonl"], "columns wanted: prompt and completions; or prompt, chosen and rejected; found: id"),
        (["eval", "in.jsonl"], "columns wanted: prompt, chosen and rejected; found: id, prompt, completion"),
        (["score", "in.jsonl", "--output", "no/such/folder"], "cannot write no/such/folder: No such file or dir"),
        (["score", "nowhere.jsonl", "--output", "new.jsonl"], "no such file: nowhere.jsonl"),
        (["score", "in.jsonl", "--output", "."], "cannot write .: Is a directory"),
        (["eval", "in.jsonl", "--output", "."], "cannot write .: Is a directory"),
        (["score", "in.jsonl", "--output", "in.jsonl"], "--output in.jsonl is the input"),
        (["score", "in.jsonl", "--reduction", "max"], "--reduction must be sum or mean, got 'max'"),
        (["score", "in.jsonl", "--alpha", "0"], "--alpha must be above 0, got 0.0"),
        (["score", "in.jsonl", "--alpha", "nan"], "--alpha must be above 0, got nan"),
        (["demo", "--alpha", "-1"], "--alpha must be above 0, got -1.0"),
        (["score", "in.jsonl", "--gamma", "0"], "--gamma must be above 0 and at most 1, got 0.0"),
        (["score", "in.jsonl", "--gamma", "1.5"], "--gamma must be above 0 and at most 1, got 1.5"),
        (["score", "in.jsonl", "--floor", "-1"], "--floor must be 0 or more"),
        (["score", "in.jsonl", "--dtype", "int8"], "--dtype must be auto, float32, bfloat16, float16 or float64, got"),
        (["score", "in.jsonl", "--truncate", "left"], "--truncate must be prompt or completion, got 'left'"),
        (["score", "in.jsonl", "--limit", "0"], "--limit must be 1 or more, got 0"),
        (["score", "in.jsonl", "--max-tokens-per-batch", "0"], "--max-tokens-per-batch must be 1 or more"),
    ],
)
def test_mistakes_cost_one_line_and_no_model(args, message, scorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, PAIR)
    put(tmp_path, {"text": "t", "label": 1}, name="columns.jsonl")
    put(tmp_path, name="empty.jsonl")
    before = sorted(os.listdir())
    result = run(*args, code=2)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("endoreward: ") and message in result.stderr
    assert result.stdout == "" and scorer.loaded == []
    assert sorted(os.listdir()) == before
    assert rows_of((tmp_path / "in.jsonl").read_text()) == [PAIR]


def test_an_output_in_a_folder_without_permission_is_said_first(scorer, tmp_path):
    if os.geteuid() == 0:
        locked = Path("/proc/sys/out.jsonl")  # root may write anywhere else
    else:
        locked = tmp_path / "locked" / "out.jsonl"
        locked.parent.mkdir(mode=0o500)
    result = run("score", put(tmp_path, PAIR), "-o", locked, code=2)
    assert f"cannot write {locked}" in result.stderr and scorer.loaded == []


def test_a_failure_before_the_first_result_leaves_an_old_output_alone(scorer, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("an earlier run\n")
    scorer.stop_after = 0
    run("score", put(tmp_path, PAIR), "-o", target, code=130)
    assert target.read_text() == "an earlier run\n"


def test_an_unexpected_failure_keeps_its_traceback(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(LengthScorer, "iter_scores", lambda *a, **k: 1 / 0)
    result = CliRunner().invoke(app, ["score", str(put(tmp_path, PAIR))])
    assert isinstance(result.exception, ZeroDivisionError)


def test_what_was_scored_before_an_interruption_is_written(scorer, tmp_path):
    target = tmp_path / "out.jsonl"
    scorer.stop_after = 3  # the scorer starts at the end: the last three of five are done
    result = run("score", put(tmp_path, *({**PAIR, "n": n} for n in range(5))), "-o", target, code=130)
    assert [r["n"] for r in rows_of(target.read_text())] == [2, 3, 4]
    assert "stopped early: scored 3 of 3 rows" in result.stderr


def test_damage_late_in_a_file_comes_after_the_rows_before_it(scorer, tmp_path):
    import gzip

    data = gzip.compress(b"".join(json.dumps({**PAIR, "x": os.urandom(99).hex()}).encode() + b"\n" for _ in range(999)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    result = run("score", path, code=2)
    assert len(rows_of(result.stdout)) > 300
    assert "cannot read" in result.stderr.splitlines()[-1]


# --- eval


def style_rows(count):
    return [
        {"id": i, "prompt": "p", "chosen": ["a", "bb", "ccc"], "rejected": ["aa", "bbb", "c"], "subset": "s"}
        for i in range(count)
    ]


def test_eval_prints_the_matrix_and_writes_json(scorer, tmp_path):
    # scores: chosen -1 -2 -3 against rejected -2 -3 -1; ties at (0,2), (1,0), (2,1)
    path = tmp_path / "chat_filtered.json"
    path.write_text(json.dumps(style_rows(4)))
    target = tmp_path / "found.json"
    result = run("eval", path, "--output", target, "--alpha", 2)
    found = json.loads(target.read_text())
    assert found["flags"]["alpha"] == 2 and found["flags"]["model"] == "pocket" and found["complete"]
    file = found["files"][0]
    assert (file["rows"], file["scored"], file["skipped"], file["ties"]) == (4, 4, 0, 12)
    assert file["rm_bench"]["matrix"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert [file["rm_bench"][k]["accuracy"] for k in ("easy", "normal", "hard")] == pytest.approx([0, 2 / 3, 1 / 3])
    assert found["rm_bench"]["overall"]["average"]["accuracy"] == pytest.approx(1 / 3)
    assert found["scores"][0]["rejected"] == [-2, -3, -1]
    assert "easy" in result.stdout and "33.3%" in result.stdout
    printed = json.loads(run("eval", path, "--json").stdout)
    assert printed["files"] == found["files"]
    assert json.loads(run("eval", path, "--output", "-").stdout)["files"] == found["files"]


def test_eval_of_several_files_and_rows_that_fail(scorer, tmp_path):
    paths = [tmp_path / "chat_filtered.json", tmp_path / "code_filtered.json"]
    failing = [*style_rows(1), {**style_rows(1)[0], "chosen": ["LONG"] * 3}]
    for path, rows in zip(paths, (style_rows(2), failing), strict=True):
        path.write_text(json.dumps(rows))
    result = run("eval", *paths, code=2)
    assert "1 rows scored, 1 skipped" in result.stdout
    assert "mean of domains" in result.stdout and "not in these files: math, safety" in result.stdout
    assert "row 2: 9 tokens" in result.stderr


def test_eval_interrupted_reports_what_it_has(scorer, tmp_path):
    target = tmp_path / "found.json"
    scorer.stop_after = 13  # of 18 samples: two rows of three
    run("eval", put(tmp_path, *style_rows(3)), "-o", target, code=130)
    found = json.loads(target.read_text())
    assert found["complete"] is False and found["files"][0]["scored"] == 2


# --- the command itself


def test_help_and_version_need_no_torch():
    script = (
        "import sys\nfrom endoreward_fast.cli import app\n"
        "try:\n app(['{}'], prog_name='endoreward')\nexcept SystemExit as e:\n assert not e.code\n"
        "print(sorted({{'torch', 'transformers', 'triton'}} & sys.modules.keys()))"
    )
    for flag, said in (("--help", "eval"), ("--version", "endoreward 0.")):
        out = subprocess.run(
            [sys.executable, "-c", script.format(flag)], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        assert said in out
        assert out.splitlines()[-1] == "[]"


def test_every_command_explains_itself():
    for command in ("score", "rank", "eval", "demo"):
        text = run(command, "--help").stdout
        for flag in ("--model", "--dtype", "--device", "--alpha", "--reduction", "--gamma", "--floor", "--system"):
            assert flag in text, (command, flag)


def test_unknown_flags_and_no_command_exit_with_2():
    assert "--bogus" in run("score", "x", "--bogus", code=2).stderr
    run(code=2)
