"""The format of an output agrees with its file name."""

import json
import os

import pytest

from cli_harness import LengthScorer, put, run
from endoreward_fast.command.run import pipeline
from endoreward_fast.command.run.sink import STDOUT, Sink
from endoreward_fast.data.formats import NAMES

PAIR = {"prompt": "p", "chosen": "a", "rejected": "bb"}
ASKED = ("show", "--prompt", "p", "--completion", "c")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, PAIR)
    return tmp_path


REFUSED = [
    *(("score", "in.jsonl", name) for name in NAMES if name not in (".json", ".jsonl", ".ndjson")),
    ("rank", "in.jsonl", ".csv"),
    ("rank", "in.jsonl", ".CSV"),
    ("eval", "in.jsonl", ".jsonl"),
    ("eval", "in.jsonl", ".csv"),
    *(("plot", "in.jsonl", name) for name in (".pdf", ".csv", ".html", ".bogus", "")),
    *((*ASKED, name) for name in (".json", ".jsonl", ".png", ".pdf", ".csv")),
]


@pytest.mark.parametrize(("args", "suffix"), [(row[:-1], row[-1]) for row in REFUSED])
def test_a_name_of_another_format_is_refused_before_a_model_is_loaded(args, suffix, folder, monkeypatch):
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: pytest.fail("loaded a model"))
    said = run(*args, "-o", f"out{suffix}", code=2).stderr
    assert said.count("\n") == 1 and f"--output out{suffix}: " in said
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("name", ["x.png", "x.json", "x.csv"])
def test_a_page_under_another_name_is_refused(name, folder):
    assert f"--html {name}: the output is HTML, not " in run(*ASKED, "--html", name, code=2).stderr


@pytest.mark.parametrize("name", ["x.html", "x.HTM"])
def test_a_page_is_written_under_a_name_of_a_page(name, folder):
    run(*ASKED, "-q", "-o", name)
    by_output = (folder / name).read_text()
    run(*ASKED, "-q", "--html", name, "--overwrite")
    assert by_output == (folder / name).read_text() and by_output.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", ["x.txt", "x.ansi", "x", "x.log", "v1.2"])
def test_text_is_written_under_names_of_no_other_format(name, folder):
    run(*ASKED, "-q", "-o", name)
    assert "pocket: sum of token rewards" in (folder / name).read_text().splitlines()[0]


def test_json_lines_under_json_are_noted(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: LengthScorer())
    for name in ("out.jsonl", "out.ndjson", "out", "out.txt"):
        assert "JSON Lines" not in run("score", "in.jsonl", "-o", name).stderr
    assert "out.json is written as JSON Lines" in run("score", "in.jsonl", "-o", "out.json").stderr
    assert json.loads((folder / "out.json").read_text())["score"] == {"chosen": -1.0, "rejected": -2.0}
    assert "JSON Lines" not in run("score", "in.jsonl", "-q", "-o", "again.json").stderr


def test_no_bar_is_drawn_if_the_reader_of_a_pipe_may_print(tmp_path):
    """In `score x | head -1` on a terminal, the bar would overwrite the line that head prints."""
    kept, ends = os.dup(STDOUT), [*os.pipe(), os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)]
    try:
        found = []
        for end in ends[1:]:
            os.dup2(end, STDOUT)
            found.append(Sink(None).on_terminal)
    finally:
        os.dup2(kept, STDOUT)
        for end in (kept, *ends):
            os.close(end)
    assert found == [True, False]
