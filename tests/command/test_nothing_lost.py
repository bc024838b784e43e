"""A non-empty output is never emptied without --overwrite, and an interrupted run prints how to continue."""

import json
import os
import shlex
import signal

import pytest

from cli_harness import PAIR, put, rows_of, run
from endoreward_fast.command.run.interrupted import resume_command

PREFERENCE = {"prompt": "p", "chosen": "a", "rejected": "bb"}
ROWS = [{**PAIR, "n": n} for n in range(5)]


@pytest.mark.parametrize(
    ("command", "flag", "resumes"),
    [
        ("score", "-o", True), ("rank", "--output", True), ("eval", "-o", False), ("show", "-o", False),
        ("show", "--html", False), ("plot", "-o", False),
    ],
)  # fmt: skip
def test_a_non_empty_output_is_refused_before_a_model_is_loaded(command, flag, resumes, scorer, tmp_path):
    source, out = put(tmp_path, PREFERENCE), tmp_path / "out.png"
    out.write_text("mine\n")
    said = run(command, source, flag, out, code=2).stderr
    assert f"{out} exists and is not empty" in said and "--overwrite" in said and said.count("\n") == 1
    assert ("--resume" in said) == resumes and out.read_text() == "mine\n" and scorer.loaded == []


def test_overwrite_replaces_an_output_and_an_empty_one_needs_no_flag(scorer, tmp_path):
    source, out = put(tmp_path, PAIR), tmp_path / "out.jsonl"
    out.touch()
    for flags in ((), ("--overwrite",)):
        run("score", source, "-o", out, "-q", *flags)
        assert [row["score"] for row in rows_of(out.read_text())] == [-3.0]
    said = run("score", source, "-o", out, "--overwrite", "--resume", code=2).stderr
    assert "--resume and --overwrite exclude each other: use one of them" in said


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("system", ["", "Be brief,  it's\nshort", "caf\u00e9 $HOME"])
def test_an_interruption_prints_the_command_to_continue(end, system, scorer, tmp_path):
    source, out = put(tmp_path, *ROWS), tmp_path / "an output.jsonl"
    scorer.stop_after = 2
    score = scorer.iter_scores

    def ended(rows, **options):
        try:
            yield from score(rows, **options)
        except KeyboardInterrupt:
            if end == "Ctrl-C":
                raise
            os.kill(os.getpid(), signal.SIGTERM)

    scorer.iter_scores = ended
    out.write_text("old\n")
    flags = ("score", source, "-o", out, "--system", system)
    result = run(*flags, "--overwrite", code=130 if end == "Ctrl-C" else 143)
    assert len(rows_of(out.read_text())) == 2 and "stopped early: scored 2 of 5 rows" in result.stderr
    said = result.stderr.splitlines()[-1].split("To continue: ")[1]
    if "\n" not in system:
        assert shlex.split(said) == ["endoreward", *map(str, flags), "--resume"]
    scorer.iter_scores, scorer.stop_after = score, None
    run(*flags, "--resume", "-q")
    assert [row["n"] for row in rows_of(out.read_text())] == list(range(5))


def test_no_command_to_continue_without_a_file_or_before_the_first_row(scorer, tmp_path):
    scorer.stop_after = 2
    assert "To continue" not in run("score", put(tmp_path, *ROWS), code=130).stderr
    assert "To continue" not in run("score", put(tmp_path, *ROWS), "-o", os.devnull, code=130).stderr
    scorer.stop_after = 0
    assert "To continue" not in run("score", put(tmp_path, *ROWS), "-o", tmp_path / "out", code=130).stderr


def test_the_command_to_continue_keeps_arguments_unchanged():
    told = resume_command(("score", "--overwrite", "-o", "x  y", "--", "-in.jsonl"))
    assert told == "endoreward score -o $'x\\x20\\x20y' --resume -- -in.jsonl"
    assert resume_command(("rank", "f", "--resume")) == "endoreward rank f --resume"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ('{"prompt": NaN, "completion": "c"}', "prompt: wanted text or messages, found nan"),
        ('{"prompt": "p", "completion": NaN}', "completion: wanted text or messages, found nan"),
        ('{"prompt": "p", "completion": -Infinity}', "completion: wanted text or messages, found -inf"),
        ('{"prompt": "p", "completion": 1e999}', "completion: wanted text or messages, found inf"),
        ('{"prompt": "p", "completions": ["a", NaN]}', "completions[1]: wanted text or messages, found nan"),
        ('{"prompt": "p", "completions": NaN}', "completions: wanted an array of completions, found nan"),
        ('{"prompt": "p", "chosen": NaN, "rejected": "b"}', "chosen: wanted text or messages, found nan"),
        ('{"prompt": "p", "chosen": "a", "rejected": [NaN]}', "rejected[0]: wanted text or messages, found nan"),
        ('{"chosen": NaN, "rejected": NaN}', "without a prompt, chosen and rejected must both be text"),
        ('{"messages": NaN}', "messages: wanted an array"),
        ('{"messages": [{"role": "assistant", "content": NaN}]}', "messages[0].content: wanted text"),
        ('{"messages": [{"role": "assistant", "content": [{"type": "text", "text": NaN}]}]}',
         "messages[0].content[0].text: wanted text"),
        ('{"messages": [{"role": "assistant", "content": "a", "reasoning_content": NaN}]}',
         "messages[0].reasoning_content: "),
    ],
)  # fmt: skip
def test_a_missing_value_is_an_error_and_never_text(row, error, scorer, tmp_path):
    for data, name in ((row, "a.jsonl"), (f"[{row}, {json.dumps(PAIR)}]", "a.json")):
        path = tmp_path / name
        path.write_text(f"{data}\n{json.dumps(PAIR)}\n" if name == "a.jsonl" else data)
        found = rows_of(run("score", path, code=2).stdout)
        assert found[0]["score"] is None and found[0]["error"].startswith(error) and found[1]["score"] == -3.0


def test_rows_before_damage_are_scored_and_the_exit_code_is_2(scorer, tmp_path):
    path = put(tmp_path, "prompt,completion", "p,aa", 'q,"never closed', *["p,c"] * 48, name="a.csv")
    result = run("score", path, code=2)
    assert [row["score"] for row in rows_of(result.stdout)] == [-2.0]
    assert "a.csv: the quotation mark opened on line 3 is not closed" in result.stderr.splitlines()[-1]
