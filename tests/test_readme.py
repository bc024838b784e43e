"""README is short, and what it prints is true: its Python and its commands run as printed, and print what it shows."""

import re

import pytest
import torch

from endoreward_fast import EndoRewardError
from endoreward_fast.model.packaged import source_of
from pages import NEEDS, ROOT, blocks, commands, perform, runs_here

PAGE = ROOT / "README.md"
PYTHON = blocks(PAGE, "python")
(BEFORE_AND_AFTER,) = (block for block in PYTHON if "# before" in block.text)
(TRL,) = (block for block in PYTHON if "GRPOTrainer(" in block.text)
(REAL,) = (block for block in PYTHON if '"smollm2"' in block.text)
EXAMPLES = [block for block in PYTHON if block not in (BEFORE_AND_AFTER, TRL, REAL)]
WORDS = 900


def test_it_is_short():
    assert len(PAGE.read_text().split()) <= WORDS


def test_before_and_after_compute_the_same():
    names: dict = {}
    exec(BEFORE_AND_AFTER.text, names)
    assert names["before"].shape == names["after"].shape
    torch.testing.assert_close(names["before"], names["after"])


@pytest.mark.parametrize("block", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_and_print_what_is_shown(block, capsys):
    exec(block.text, {})
    if block.prints is not None:
        assert capsys.readouterr().out == block.prints


def test_a_real_model_prints_what_is_shown(capsys):
    assert NEEDS in REAL.text
    try:
        source_of("smollm2")
    except EndoRewardError as error:
        pytest.skip(str(error))
    exec(REAL.text, {})
    assert capsys.readouterr().out == REAL.prints


def test_the_quickstart_shows_its_output():
    assert [block.prints is not None for block in EXAMPLES] == [True, False]


def test_training_runs_as_it_stands(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(TRL.text, names)
    assert names["trainer"].state.global_step == 2
    assert TRL.text.count("\n") <= 12


def test_commands_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [found for block in blocks(PAGE, "sh") for found in commands(block.text) if runs_here(*found)]
    for line, words in lines:
        perform(line, words)
    assert len(lines) == 5
    assert {path.name for path in tmp_path.iterdir()} >= {"scored.jsonl", "ranked.jsonl", "page.html"}


@pytest.mark.parametrize("name", ["README.md", "docs/install.md"])
def test_versions_are_those_that_are_asked_for_and_tested(name):
    """Floors are those of pyproject.toml, tested versions those of constraints.txt."""
    rows = re.findall(
        r"^\| (torch|triton|transformers)\b[^|]*\| ([\d.]+)[^|]*\| ([\d.]+) \|$", (ROOT / name).read_text(), re.M
    )
    project, pins = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    assert len(rows) == 3
    for package, floor, tested in rows:
        assert re.search(rf'"{package}>={re.escape(floor)}[";]', project), package
        assert re.search(rf"^{package}=={re.escape(tested)}\b", pins, re.M), package
    assert (
        f'requires-python = ">={re.search(r"^[|] Python [|] ([0-9.]+)", (ROOT / name).read_text(), re.M)[1]}"'
        in project
    )
