"""--resume: a run that was killed several times ends with the rows and scores of an uninterrupted run."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError
from endoreward_fast.command.flags.engine_flags import EngineFlags
from endoreward_fast.command.run import pipeline
from endoreward_fast.command.run.resume import IRRELEVANT, Done, key_of, rows_done
from endoreward_fast.command.run.sink import Sink, _lock

ROOT = Path(__file__).resolve().parents[2]


def rows(count):
    return [{"id": i, "prompt": "p", "completion": "a" * (1 + i % 7)} for i in range(count)]


def scores(path):
    return Counter((row["id"], row["score"]) for row in rows_of(path.read_text()))


def test_finished_rows_are_skipped_and_a_truncated_line_is_repeated(scorer, tmp_path):
    source, out = put(tmp_path, *rows(10)), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    for kept in (0, 4, 10):
        for torn in ("", lines[4][:20], '{"id": 4'):
            out.write_text("".join(lines[:kept]) + torn)
            run("score", source, "-o", out, "--resume", "-q")
            assert out.read_text() == whole, (kept, torn)
    run("score", source, "-o", out, "--overwrite", "-q")  # this flag starts again from the first row
    assert out.read_text() == whole


def test_rows_added_later_are_moved_into_input_order(scorer, tmp_path):
    """Whichever lines were missing, the output has the same bytes as that of an uninterrupted run."""
    wanted = [*rows(3), "not json", *rows(3), {"id": 5, "prompt": "p"}, *rows(7)]
    source, out = put(tmp_path, *wanted), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q", code=2)
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    for seed in range(20):
        kept = random.Random(seed).sample(lines, seed % len(lines))
        out.write_text("".join(kept))
        run("score", source, "-o", out, "--resume", "-q", code=2)
        assert out.read_text() == whole, seed
    assert list(tmp_path.glob("*.part")) == []


def test_lines_of_rows_not_in_this_input_stay_in_place(scorer, tmp_path):
    out = tmp_path / "out.jsonl"
    run("score", put(tmp_path, *rows(9)), "-o", out, "-q")
    whole, inode = out.read_text(), out.stat().st_ino
    run("score", put(tmp_path, *rows(9)), "-o", out, "-q", "--resume", "--limit", "3")
    run("score", put(tmp_path, *rows(12)[9:]), "-o", out, "-q", "--resume")
    assert out.read_text().startswith(whole) and [row["id"] for row in rows_of(out.read_text())] == list(range(12))
    assert out.stat().st_ino == inode  # it was in order, so it was not rewritten
    whole = out.read_text()
    out.write_text(whole + '{"score": null, "error": "line 9: not valid JSON"}\n')
    said = run("score", put(tmp_path, *rows(3)), "-o", out, "--resume").stderr  # the bad line is not in this input
    assert "and 1 without a score" in said and out.read_text() == whole


def test_only_the_remaining_rows_are_scored(scorer, tmp_path):
    out = tmp_path / "out.jsonl"
    run("score", put(tmp_path, *rows(6)), "-o", out, "-q")
    asked = []
    score = scorer.iter_scores
    scorer.iter_scores = lambda samples, **options: asked.extend(samples) or score(samples, **options)
    run("score", put(tmp_path, *rows(9)), "-o", out, "--resume", "-q")
    assert [row["completion"] for row in asked] == [r["completion"] for r in rows(9)[6:]]
    assert [row["id"] for row in rows_of(out.read_text())] == list(range(9))


def test_equal_rows_are_counted_and_gaps_filled(scorer, tmp_path):
    """After Ctrl-C, finished rows may follow rows that are missing."""
    same = {"prompt": "p", "completion": "aa", "score": "mine", "error": None}
    source, out = put(tmp_path, same, *rows(3), same, same), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[5] + lines[2])
    run("score", source, "-o", out, "--resume", "-q")
    assert out.read_text() == "".join(lines)


def test_rows_that_failed_are_scored_again(scorer, tmp_path):
    """Rows that fail again are reported again and set the exit code. Rows that succeed get their scores."""
    bad = ["not json", {"prompt": "p"}, {"id": 7, "prompt": "p", "completion": "LONG"}]
    source, out = put(tmp_path, *rows(2), *bad, *rows(4)[2:]), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q", code=2)
    whole = out.read_text()
    result = run("score", source, "-o", out, "--resume", code=2)
    assert f"{out} holds 4 rows of an earlier run, and 3 without a score, which are scored again" in result.stderr
    assert "line 3: not valid JSON" in result.stderr and "3 of 3 rows could not be scored" in result.stderr
    assert out.read_text() == whole
    score = scorer.iter_scores  # from here on, the long row succeeds
    scorer.iter_scores = lambda samples, **o: score([s | {"completion": s["completion"].lower()} for s in samples], **o)
    out.chmod(0o640)
    run("score", source, "-o", out, "--resume", "-q", code=2)
    found = rows_of(out.read_text())
    assert [row["score"] for row in found] == [-1.0, -2.0, None, None, -4.0, -3.0, -4.0]
    assert "error" not in next(row for row in found if row.get("id") == 7) and out.stat().st_mode & 0o777 == 0o640


def test_old_lines_stay_until_the_first_row_is_written(scorer, tmp_path):
    """They also stay complete, whatever ends the run."""
    bad = {"id": 9, "prompt": "p", "completion": "LONG"}
    source, out = put(tmp_path, *rows(2), bad), tmp_path / "out.jsonl"
    link = tmp_path / "latest"
    link.symlink_to(out)
    run("score", source, "-o", link, "-q", code=2)
    whole = out.read_text()
    longer = put(tmp_path, bad, *rows(4), name="longer.jsonl")
    scorer.stop_after = 0
    run("score", longer, "-o", link, "-q", "--resume", code=130)
    assert out.read_text() == whole
    scorer.stop_after = None
    out.with_name("out.jsonl.part").mkdir()
    said = run("score", longer, "-o", link, "-q", "--resume", code=2).stderr
    assert f"cannot write {link}: Is a directory" in said and out.read_text() == whole
    out.with_name("out.jsonl.part").rmdir()
    run("score", longer, "-o", link, "-q", "--resume", code=2)
    assert [row.get("id") for row in rows_of(out.read_text())] == [9, 0, 1, 2, 3] and link.is_symlink()


def test_resume_repeats_the_row_that_stopped_a_strict_run(scorer, tmp_path):
    bad = {"id": 9, "prompt": "p", "completion": "LONG"}
    source, out = put(tmp_path, *rows(2), bad, *rows(4)[2:]), tmp_path / "out.jsonl"
    command = ("score", source, "-o", out, "-q", "--strict", "--max-tokens-per-batch", "1")
    for again in ((), ("--resume",)):
        said = run(*command, *again, code=2).stderr
        assert said.startswith("endoreward: line 3: 9 tokens") and said.count("\n") == 1
        assert [row["id"] for row in rows_of(out.read_text())] == [0, 1]
    run("score", source, "-o", out, "-q", "--resume", code=2)
    assert [row["id"] for row in rows_of(out.read_text())] == [0, 1, 9, 2, 3]


OTHER = {
    "dtype": "float16", "alpha": 2.0, "reduction": "mean", "gamma": 0.5, "floor": 0.25, "system": "s",
    "chat": False, "max_length": 9, "truncate": "prompt", "date": "2024-02-29", "template_kwargs": '{"a": 1}',
    "tools": '[{"name": "add"}]',
}  # fmt: skip
"""another value of every flag that scores depend on"""


def test_every_flag_is_compared_or_changes_no_score():
    assert {*OTHER, *IRRELEVANT} == EngineFlags().to_json().keys()


@pytest.mark.parametrize("name", [*OTHER, "per_token", "version"])
def test_another_value_of_a_flag_is_refused(scorer, monkeypatch, name, tmp_path):
    source, out = put(tmp_path, *rows(2)), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    before = out.read_text()
    if name == "version":
        monkeypatch.setattr("endoreward_fast.command.cli.version", lambda package: "9.9")
    flag, value = "--" + name.replace("_", "-"), OTHER.get(name, "9.9" if name == "version" else True)
    (tmp_path / "tools.json").write_text(OTHER["tools"])
    flags = {"version": [], "per_token": [flag], "chat": ["--no-chat"], "tools": [flag, tmp_path / "tools.json"]}
    flags = flags.get(name, [flag, value])
    said = run("score", source, "-o", out, "--resume", *flags, "-q", code=2).stderr
    assert f"--resume: {out} was made with {name}=" in said and said.count("\n") == 1
    assert said.endswith(f"not {value!r}: use that value, or name another --output\n") and out.read_text() == before


def test_another_command_is_refused_and_flags_that_change_no_score_are_not(scorer, tmp_path):
    source, out = put(tmp_path, *rows(2)), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    said = run("rank", source, "-o", out, "--resume", "-q", code=2).stderr
    assert "was made with command='score', not 'rank'" in said
    run("score", source, "-o", out, "--resume", "--max-tokens-per-batch", "9", "--limit", "1", "--device", "cpu", "-q")


def test_a_model_is_recognised_by_its_weights(scorer, monkeypatch, tmp_path):
    """Not by its name: a folder's weights may change, and two folders may hold the same weights."""
    source, out = put(tmp_path, *rows(2)), tmp_path / "out.jsonl"
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(100))
    run("score", source, "-o", out, "-q", "--model", "./first")
    for same in (tmp_path / "first", "./first/", "./second"):
        run("score", source, "-o", out, "-q", "--model", same, "--resume")
    (tmp_path / "first" / "model.safetensors").write_bytes(bytes(99) + b"1")
    said = run("score", source, "-o", out, "-q", "--model", "./first", "--resume", code=2).stderr
    assert (
        f"{out} was made with the model './first' (sha256 " in said and "name that model, or another --output" in said
    )


def test_bad_input_is_one_clear_line(scorer, tmp_path):
    source, out = put(tmp_path, *rows(2)), tmp_path / "out.jsonl"
    assert (
        "--resume needs the file to continue: name it with --output" in run("score", source, "--resume", code=2).stderr
    )
    out.write_text("{}\n")
    result = run("score", source, "-o", out, "--resume", "-q", code=2)
    assert "out.jsonl.settings.json is missing or damaged" in result.stderr and out.read_text() == "{}\n"
    run("score", source, "-o", out, "--overwrite", "-q")
    Path(f"{out}.settings.json").write_text('{"settings": [1]}')
    said = run("score", source, "-o", out, "--resume", "-q", code=2).stderr
    assert "settings.json is missing or damaged" in said
    run("score", source, "-o", out, "--overwrite", "-q")
    out.write_text("[1]\n")
    assert "line 1 is not a row of results" in run("score", source, "-o", out, "--resume", "-q", code=2).stderr


def test_a_run_that_ends_before_its_first_row_does_not_disturb_resume(scorer, tmp_path):
    """The old rows keep their settings. With the new run's settings, --resume would take the old rows for its own."""
    source, out = put(tmp_path, *rows(5)), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    before = out.read_text()
    scorer.stop_after = 0
    run("score", source, "-o", out, "--alpha", "2", "--overwrite", "-q", code=130)
    scorer.stop_after = None
    assert out.read_text() == before
    said = run("score", source, "-o", out, "--alpha", "2", "--resume", "-q", code=2).stderr
    assert "was made with alpha=1.0, not 2.0" in said
    Path(f"{out}.settings.json").unlink()
    out.write_text("")  # killed while the model was loaded
    run("score", source, "-o", out, "--resume", "-q")
    assert out.read_text() == before


@pytest.mark.parametrize("resume", [["--overwrite"], ["--resume"]])
def test_settings_that_cannot_be_written_leave_old_results_unchanged(scorer, resume, tmp_path):
    source, out = put(tmp_path, *rows(2)), tmp_path / "out.jsonl"
    old = "--overwrite" in resume
    if old:
        out.write_text("mine\n")
    Path(f"{out}.settings.json.part").mkdir()
    said = run("score", source, "-o", out, "-q", *resume, code=2).stderr
    assert f"cannot write {out}.settings.json: Is a directory" in said and said.count("\n") == 1
    assert out.exists() == old and (not old or out.read_text() == "mine\n")


@pytest.mark.parametrize("descriptor", ["stdout", "stderr"])
def test_a_log_behind_a_standard_stream_is_not_emptied(tmp_path, descriptor):
    log = tmp_path / "log"
    log.write_text("before\n")
    command = [sys.executable, "-m", "endoreward_fast", "score", put(tmp_path, *rows(2)), "-q", "-o"]
    with log.open("a") as file:
        subprocess.run([*command, f"/dev/{descriptor}"], check=True, cwd=ROOT, timeout=120, **{descriptor: file})
    assert log.read_text().startswith("before\n") and log.read_text().count('"score"') == 2
    assert not Path(f"{log}.settings.json").exists()


def test_a_device_gets_results_but_no_settings_file(scorer, tmp_path):
    run("score", put(tmp_path, *rows(2)), "-o", os.devnull, "-q")
    assert not Path(f"{os.devnull}.settings.json").exists()


def test_a_failing_run_does_not_remove_the_output_of_another(scorer, monkeypatch, tmp_path):
    """A failing run removes the empty file that it created while it holds the lock. A waiting run notices that."""
    out, free = tmp_path / "out.jsonl", []

    def unlink(path):
        with open(path, "ab") as file:
            free.append(_lock(file))
        os.remove(path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(EndoRewardError, match="first"), Sink(str(out)):
        raise EndoRewardError("first")
    assert free == [False] and not out.exists()
    monkeypatch.setattr("endoreward_fast.command.run.sink._lock", lambda file: os.remove(out) or True)
    with pytest.raises(EndoRewardError, match="another run is writing"):
        Sink(str(out))


def test_a_row_has_the_same_key_in_the_output(scorer, tmp_path):
    """This holds for any columns, including names that the command adds, and for files scored before."""
    own = [
        {"text": "ü\ud800\u2028", "x": 0.1, "when": "2026"}, {"x": float("nan"), "y": float("inf")}, {"score": 3},
        {"score": 3, "input_score": 4}, {"score": 4, "input_score": 3, "input_input_score": 5},
        {"error": None, "flags": ["a"], "best": 1}, {"flags": []}, {"scores": 1}, {"x": {"b": 1, "a": 2}}, {"x": -0.0},
    ]  # fmt: skip
    wanted = [{"prompt": "p", "completion": text} | columns for columns in own for text in ("aa", "", "LONG")]
    for command, pair in (("score", {}), ("rank", {"completions": ["a", "LONG"]})):
        source, out = put(tmp_path, *(row | pair for row in wanted)), tmp_path / f"{command}.jsonl"
        run(command, source, "-o", out, "--per-token", "-q", code=2)
        lines = out.read_text().split("\n")[:-1]
        assert len(lines) == len(wanted)
        for missing in range(len(lines)):  # each row is recognised in its line
            out.write_text("".join(line + "\n" for i, line in enumerate(lines) if i != missing))
            run(command, source, "-o", out, "--per-token", "-q", "--resume", code=(0, 2))
            assert Counter(out.read_text().split("\n")[:-1]) == Counter(lines), lines[missing]
    when = {"when": Path("a"), "x": 0.1}
    assert key_of(when) == key_of({"x": 0.1, "when": "a"}) != key_of(when | {"x": 0.2})
    assert rows_done("nowhere.jsonl", {}) == Done()


def test_all_columns_of_a_file_scored_before_are_kept(scorer, tmp_path):
    out = tmp_path / "in.jsonl"
    put(tmp_path, {"prompt": "p", "completion": "aa", "score": 0, "input_score": 1})
    for again in range(2):
        out.write_text(run("score", out, "-q").stdout)
        (row,) = rows_of(out.read_text())
        assert row["score"] == -2.0 and {0, 1} <= set(row.values()) and len(row) == 5 + again


def test_resume_accepts_remaining_rows_that_all_fail(scorer, tmp_path):
    """A new run with only such rows is refused before a model is loaded. The rest of a resumed run is not."""
    source, out = put(tmp_path, *rows(3), "not json", {"prompt": "p"}), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q", code=2)
    whole = out.read_text()
    for kept in (3, 4, 5):
        out.write_text("".join(whole.splitlines(keepends=True)[:kept]))
        said = run("score", source, "-o", out, "--resume", "-q", code=2).stderr
        assert out.read_text() == whole and "2 of 2 rows could not be scored" in said


def test_no_model_is_loaded_if_all_rows_are_done(scorer, monkeypatch, tmp_path):
    source, out = put(tmp_path, *rows(3)), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    monkeypatch.setattr(pipeline, "load_scorer", None)
    said = run("score", source, "-o", out, "--resume").stderr
    assert f"{out} holds 3 rows of an earlier run\n" in said and "scored 0 of 0 rows" in said


@pytest.mark.parametrize("column", ["id", "score", "input_score"])
def test_rows_are_recognised_by_the_column_of_id(scorer, column, tmp_path):
    """Its other columns may change, and the output may keep the column under another name."""
    first, out = (
        [{column: f"n{i}", "prompt": "p", "completion": "a" * (1 + i)} for i in range(6)],
        tmp_path / "out.jsonl",
    )
    run("score", put(tmp_path, *first[:4], first[3]), "-o", out, "-q", "--id", column)
    before = out.read_text()
    later = [{"seen": "2026", **row, "completion": "b"} for row in (*first, first[3])]  # n3 occurs twice
    run("score", put(tmp_path, *later), "-o", out, "--resume", "-q", "--id", column)
    found = out.read_text().splitlines(keepends=True)
    assert "".join(found[:4] + found[6:]) == before  # n3 occurs twice
    assert [row["score"] for row in rows_of(out.read_text())] == [-1.0, -2.0, -3.0, -4.0, -1.0, -1.0, -4.0]
    run("score", put(tmp_path, *later), "-o", out, "--resume", "-q")  # all columns are compared: five rows are new
    assert len(rows_of(out.read_text())) == 12


def test_a_row_without_the_id_is_an_error(scorer, tmp_path):
    rows_, out = [*rows(2), {"prompt": "p", "completion": "a"}, rows(3)[2] | {"id": None}, "not json"], tmp_path / "o"
    result = run("score", put(tmp_path, *rows_), "-o", out, "--id", "id", code=2)
    assert (
        "line 3: no value in 'id', the column that --id names" in result.stderr
        and "line 4: no value in" in result.stderr
    )
    whole = out.read_text()
    assert [row["score"] for row in rows_of(whole)] == [-1.0, -2.0, None, None, None]
    run("score", put(tmp_path, *rows_), "-o", out, "--id", "id", "--resume", "-q", code=2)
    assert out.read_text() == whole
    result = run("score", put(tmp_path, *rows(2)), "--id", "di", code=2)  # refused before a model is loaded
    assert result.stderr.endswith("line 1: no value in 'di', the column that --id names\n")


@pytest.mark.parametrize("change", ["shorter", "longer", "reordered"])
def test_another_input_is_matched_row_by_row(scorer, change, tmp_path):
    first, out = rows(8), tmp_path / "out.jsonl"
    longer = [*rows(12)[8:10], *first, *rows(12)[10:]]
    second = {"shorter": first[:5], "longer": longer, "reordered": first[::-1]}[change]
    run("score", put(tmp_path, *first), "-o", out, "-q")
    run("score", put(tmp_path, *second), "-o", out, "--resume", "-q")
    now = {"shorter": first, "longer": longer, "reordered": second}[change]  # in the order of the new input
    assert rows_of(out.read_text()) == [row | {"score": -float(len(row["completion"]))} for row in now]


def test_edited_lines_are_recognised_or_refused(scorer, tmp_path):
    source, out = put(tmp_path, *rows(4)), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    lines = out.read_text().splitlines()
    resorted = [json.dumps(dict(sorted(json.loads(line).items()))) for line in lines]
    for edited in ("\r\n".join([*lines, ""]), "\n".join(lines), "\n".join([*resorted, ""])):
        out.write_bytes(edited.encode())
        run("score", source, "-o", out, "--resume", "-q")
        assert sorted(row["id"] for row in rows_of(out.read_text())) == [0, 1, 2, 3]
    out.write_text("\n".join([lines[0], json.dumps(rows(2)[1]), ""]))  # the second line has no score
    assert "line 2 is not a row of results" in run("score", source, "-o", out, "--resume", "-q", code=2).stderr


def test_a_symbolic_link_uses_the_settings_of_its_target(scorer, tmp_path):
    source, link = put(tmp_path, *rows(3)), tmp_path / "latest"
    for alpha in ("1", "2"):
        out = tmp_path / f"alpha{alpha}.jsonl"
        link.unlink(missing_ok=True)
        link.symlink_to(out)
        run("score", source, "-o", link, "-q", "--alpha", alpha)
    run("score", source, "-o", link, "-q", "--alpha", "2", "--resume")
    link.unlink()
    link.symlink_to(tmp_path / "alpha1.jsonl")
    said = run("score", source, "-o", link, "-q", "--alpha", "2", "--resume", code=2).stderr
    assert "was made with alpha=1.0, not 2.0" in said


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_two_runs_do_not_write_one_output(scorer, flags, tmp_path):
    """Ranks of a killed launcher may still run when the next run begins."""
    source, out = put(tmp_path, *rows(4)), tmp_path / "out.jsonl"
    score, told = scorer.iter_scores, []

    def meanwhile(samples, **options):
        scorer.iter_scores = score
        told.append(run("score", source, "-o", out, *flags, "-q", code=2).stderr)
        return score(samples, **options)

    scorer.iter_scores = meanwhile
    run("score", source, "-o", out, "-q")
    assert f"another run is writing {out}: " in told[0]
    assert [row["id"] for row in rows_of(out.read_text())] == list(range(4))
    run("score", source, "-o", out, "-q", "--resume")  # the lock is released


def test_a_rewritten_output_is_locked_too(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("bad\nkept\n")
    with Sink(str(out), resume=True) as sink:
        sink.append(iter([b"kept\n"]))
        assert out.read_text() == "bad\nkept\n"
        sink.write("more\n")
        with pytest.raises(EndoRewardError, match="another run is writing "):
            Sink(str(out))
        sink.write("and more\n")
    assert out.read_text() == "kept\nmore\nand more\n"


def test_a_full_disk_is_reported_and_loses_no_rows(tmp_path):
    """Files may grow to 2 KB. The rows written stay, and --resume continues when there is space."""
    source, out = put(tmp_path, *rows(60)), tmp_path / "out.jsonl"
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); from endoreward_fast.command.cli import app; app()"
    )
    command = [sys.executable, "-c", limit, "score", source, "-o", out, "-q"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 2 and "cannot write" in ran.stderr and "File too large" in ran.stderr
    assert ran.stderr.count("\n") == 1 and 5 < out.read_text().count("\n") < 60
    run("score", source, "-o", out, "--resume", "-q")
    assert [row["id"] for row in rows_of(out.read_text())] == list(range(60))


def test_a_run_killed_repeatedly_ends_like_an_undisturbed_one(tmp_path):
    source, out, undisturbed = put(tmp_path, *rows(160)), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run("score", source, "-o", undisturbed, "-q")
    command = [
        sys.executable,
        "-m",
        "endoreward_fast",
        "score",
        source,
        "-o",
        out,
        "-q",
        "--max-tokens-per-batch",
        "16",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for kill in range(3):
        before = out.stat().st_size if out.exists() else 0
        with subprocess.Popen([*command, *["--resume"] * (kill > 0)], env=environment) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and (not out.exists() or out.stat().st_size < before + 1500):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert process.poll() is None, "it was done before it could be killed"
            process.kill()
    assert 0 < out.read_text().count("\n") < 160
    run("score", source, "-o", out, "--resume", "-q")
    found, wanted = rows_of(out.read_text()), rows_of(undisturbed.read_text())
    assert [row["id"] for row in found] == [row["id"] for row in wanted]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-4)


def test_an_input_without_rows_leaves_old_results_unchanged(scorer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source, out = tmp_path / "none.parquet", tmp_path / "out.jsonl"
    parquet.write_table(pyarrow.table({"prompt": [], "completion": []}), source)
    out.write_text("{}\n")
    said = run("score", source, "-o", out, "--overwrite", code=2).stderr
    assert "none.parquet has no rows: there is nothing to score" in said
    assert out.read_text() == "{}\n"
