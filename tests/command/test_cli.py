"""The command with a made-up scorer: rows in, rows out, and eval."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_harness import PAIR, LengthScorer, put, rows_of, run

ROOT = Path(__file__).resolve().parents[2]


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


def test_score_adds_token_rewards_in_the_shape_of_the_scores(scorer, tmp_path):
    path = put(tmp_path, PAIR, {"prompt": "p", "chosen": "a", "rejected": "bc"})
    single, pair = rows_of(run("score", path, "--per-token").stdout)
    assert single["token_rewards"] == {"rewards": [-1.0] * 3}
    assert pair["token_rewards"]["rejected"] == {"rewards": [-1.0] * 2}
    assert "token_rewards" not in rows_of(run("score", path).stdout)[0]


def test_a_column_of_the_same_name_is_kept_as_input_column(scorer, tmp_path):
    out = rows_of(run("score", put(tmp_path, {**PAIR, "score": "mine"})).stdout)[0]
    assert (out["input_score"], out["score"]) == ("mine", -3.0)


def test_nan_and_infinity_are_written_as_null(scorer, tmp_path):
    """NaN is not JSON: most readers other than Python's reject the file."""
    line = json.dumps({**PAIR, "x": [float("nan"), {"y": -float("inf")}, 1.5], "note": "NaN"})
    assert "NaN" in line

    def refuse(name):
        raise AssertionError(name)

    out = json.loads(run("score", put(tmp_path, line)).stdout, parse_constant=refuse)
    assert (out["x"], out["note"], out["score"]) == ([None, {"y": None}, 1.5], "NaN", -3.0)


def test_a_lone_surrogate_in_another_column_survives(scorer, tmp_path):
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


def test_more_rows_than_a_window_are_all_written_in_order(scorer, tmp_path, monkeypatch):
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
    target.write_text("an earlier output")
    result = run("score", "-", "--limit", 2, "--output", target, "--overwrite", input=(json.dumps(PAIR) + "\n") * 5)
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


def test_quiet_prints_errors_only(scorer, tmp_path):
    assert run("score", put(tmp_path, PAIR), "--quiet").stderr == ""
    assert "line 2: not valid JSON" in run("score", put(tmp_path, PAIR, "{"), "-q", code=2).stderr


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


def test_an_interrupted_eval_reports_the_rows_it_scored(scorer, tmp_path):
    target = tmp_path / "found.json"
    scorer.stop_after = 13  # of 18 samples: two rows of three
    run("eval", put(tmp_path, *style_rows(3)), "-o", target, code=130)
    found = json.loads(target.read_text())
    assert found["complete"] is False and found["files"][0]["scored"] == 2


# --- the command itself


def test_help_and_version_need_no_torch():
    script = (
        "import sys\nfrom endoreward_fast.command.cli import app\n"
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
    for command in ("score", "rank", "eval", "show", "plot", "demo"):
        text = run(command, "--help").stdout
        for flag in ("--model", "--dtype", "--device", "--alpha", "--reduction", "--gamma", "--floor", "--system"):
            assert flag in text, (command, flag)


def test_unknown_flags_and_no_command_exit_with_2():
    assert "--bogus" in run("score", "x", "--bogus", code=2).stderr
    run(code=2)
