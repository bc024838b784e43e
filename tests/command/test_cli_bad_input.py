"""Bad input gives one clear line and exit code 2. Rows already scored are kept."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli_harness import PAIR, LengthScorer, put, rows_of, run
from endoreward_fast.command.cli import app
from endoreward_fast.command.run.monitor import ERRORS_SHOWN

ROOT = Path(__file__).resolve().parents[2]


def test_malformed_lines_are_reported_and_the_rest_is_scored(scorer, tmp_path):
    result = run("score", put(tmp_path, PAIR, "{oops", PAIR), code=2)
    out = rows_of(result.stdout)
    assert [r["score"] for r in out] == [-3.0, None, -3.0]
    assert out[1]["error"].startswith("line 2: not valid JSON")
    assert "endoreward: line 2: not valid JSON" in result.stderr
    assert "1 of 3 rows could not be scored (exit code 2)" in result.stderr


def test_strict_stops_at_the_first_bad_row_and_keeps_the_rows_before_it(scorer, tmp_path):
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


def test_only_the_first_errors_are_printed_and_the_rest_counted(scorer, tmp_path):
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
        (["score", "in.jsonl", "--output", "in.jsonl"], "in.jsonl is the input: name another output"),
        (["score", "in.jsonl", "--reduction", "max"], "--reduction must be sum or mean, got 'max'"),
        (["score", "in.jsonl", "--alpha", "0"], "--alpha must be above 0, got 0.0"),
        (["score", "in.jsonl", "--alpha", "nan"], "--alpha must be above 0, got nan"),
        (["demo", "--alpha", "-1"], "--alpha must be above 0, got -1.0"),
        (["score", "in.jsonl", "--gamma", "0"], "--gamma must be above 0 and at most 1, got 0.0"),
        (["score", "in.jsonl", "--gamma", "1.5"], "--gamma must be above 0 and at most 1, got 1.5"),
        (["score", "in.jsonl", "--floor", "-1"], "--floor must be 0 or more"),
        (
            ["score", "in.jsonl", "--dtype", "int8"],
            "--dtype must be auto, fastest, float32, bfloat16, float16 or float64, got",
        ),
        (["score", "in.jsonl", "--truncate", "left"], "--truncate must be prompt or completion, got 'left'"),
        (["score", "in.jsonl", "--limit", "0"], "--limit must be 1 or more, got 0"),
        (["score", "in.jsonl", "--max-tokens-per-batch", "0"], "--max-tokens-per-batch must be 1 or more"),
    ],
)
def test_mistakes_print_one_line_and_load_no_model(args, message, scorer, tmp_path, monkeypatch):
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


def test_an_output_in_a_folder_without_permission_is_reported_before_loading(scorer, tmp_path):
    if os.geteuid() == 0:
        locked = Path("/proc/sys/out.jsonl")  # root may write anywhere else
    else:
        locked = tmp_path / "locked" / "out.jsonl"
        locked.parent.mkdir(mode=0o500)
    result = run("score", put(tmp_path, PAIR), "-o", locked, code=2)
    assert f"cannot write {locked}" in result.stderr and scorer.loaded == []


def test_a_failure_before_the_first_result_leaves_an_old_output_unchanged(scorer, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("an earlier run\n")
    scorer.stop_after = 0
    run("score", put(tmp_path, PAIR), "-o", target, "--overwrite", code=130)
    assert target.read_text() == "an earlier run\n"


def test_an_unexpected_failure_keeps_its_traceback(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(LengthScorer, "iter_scores", lambda *a, **k: 1 / 0)
    result = CliRunner().invoke(app, ["score", str(put(tmp_path, PAIR))])
    assert isinstance(result.exception, ZeroDivisionError)


def test_rows_scored_before_an_interruption_are_written(scorer, tmp_path):
    target = tmp_path / "out.jsonl"
    scorer.stop_after = 3  # the scorer starts at the end: the last three of five are done
    result = run("score", put(tmp_path, *({**PAIR, "n": n} for n in range(5))), "-o", target, code=130)
    assert [r["n"] for r in rows_of(target.read_text())] == [2, 3, 4]
    assert "stopped early: scored 3 of 5 rows" in result.stderr


def test_rows_before_damage_in_a_file_are_scored(scorer, tmp_path):
    import gzip

    data = gzip.compress(b"".join(json.dumps({**PAIR, "x": os.urandom(99).hex()}).encode() + b"\n" for _ in range(999)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    result = run("score", path, code=2)
    assert len(rows_of(result.stdout)) > 300
    assert "cannot read" in result.stderr.splitlines()[-1]
