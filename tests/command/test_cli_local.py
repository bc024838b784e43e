"""Errors that need no model are reported before a model is loaded and before the Hub is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli_harness import PAIR, LengthScorer, put, run
from endoreward_fast.command.evaluate import side_by_side
from endoreward_fast.command.run import engines, pipeline

ROOT = Path(__file__).resolve().parents[2]
ASKED = ("--prompt", "p", "--completion", "c")
HUB = ("-m", "owner/model")


@pytest.fixture
def local(monkeypatch, tmp_path):
    """Return a working folder. Loading a model or asking for its weights fails the test."""

    def reached(*args, **kw):
        raise AssertionError("a model or the hub was asked")

    for name in ("load_scorer", "load_reward_model", "load_judges"):
        monkeypatch.setattr(pipeline, name, reached)
    for module in (engines, side_by_side):
        monkeypatch.setattr(module, "weights_of", reached)
    monkeypatch.chdir(tmp_path)
    put(tmp_path, PAIR)
    put(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, name="pairs.jsonl")
    put(tmp_path, {"x": 1}, name="columns.jsonl")
    put(tmp_path, name="empty.jsonl")
    return tmp_path


FILES = [("nowhere.jsonl", "no such file"), ("empty.jsonl", "is empty"), ("columns.jsonl", "columns wanted")]
COMMANDS = ("score", "rank", "eval", "show", "plot")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("file", "message"), FILES)
def test_an_input_that_cannot_be_scored(command, file, message, local):
    said = run(command, file, *HUB, code=2).stderr
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written(command, local):
    said = run(command, "pairs.jsonl", *HUB, "-o", "no/such/folder/x.svg", code=2).stderr
    assert "cannot write" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        (*COMMANDS[:1], "in.jsonl", "-m", "./nowhere"),
        ("rank", "pairs.jsonl", "-m", "/no/such/folder"),
        ("show", *ASKED, "-m", "./nowhere"),
        ("demo", "-m", "./nowhere"),
        ("eval", "pairs.jsonl", *HUB, "--reward-model", "./nowhere"),
        ("eval", "pairs.jsonl", *HUB, "--signals", "log-ratio", "--reference-model", "./nowhere"),
    ],
)
def test_a_missing_folder_of_any_model_is_refused(args, local):
    said = run(*args, code=2).stderr
    assert "there is no such folder" in said and said.count("\n") == 1


@pytest.mark.parametrize("command", ["score", "rank"])
def test_a_missing_input_is_reported_when_resuming(command, local):
    assert "no such file" in run(command, "nowhere.jsonl", *HUB, "--resume", "-o", "new.jsonl", code=2).stderr
    assert not Path("new.jsonl").exists()
    assert "name it with --output" in run(command, "in.jsonl", *HUB, "--resume", code=2).stderr


def test_an_engine_that_is_not_installed_is_refused(local, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert "needs Ray Data" in run("score", "in.jsonl", *HUB, "--engine", "ray", code=2).stderr


def test_an_output_with_other_flags_is_refused_before_the_hub_is_asked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, PAIR)
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: LengthScorer())
    monkeypatch.setattr(engines, "weights_of", lambda name: "commit 1")
    run("score", "in.jsonl", *HUB, "-o", "out.jsonl", "-q")
    before = Path("out.jsonl").read_text()
    monkeypatch.setattr(engines, "weights_of", lambda name: pytest.fail("asked the hub"))
    said = run("score", "in.jsonl", *HUB, "-o", "out.jsonl", "-q", "--resume", "--alpha", 2, code=2).stderr
    assert "was made with alpha=1.0, not 2.0" in said
    assert "no such file" in run("score", "gone.jsonl", *HUB, "-o", "out.jsonl", "-q", "--resume", code=2).stderr
    monkeypatch.setattr(engines, "weights_of", lambda name: "commit 2")
    said = run("score", "in.jsonl", *HUB, "-o", "out.jsonl", "-q", "--resume", code=2).stderr
    assert "was made with the model 'owner/model' (commit 1), not 'owner/model' (commit 2)" in said
    assert Path("out.jsonl").read_text() == before


# --- a hub that is out of reach


def test_an_unreachable_hub_costs_no_retries(tmp_path):
    """By itself, the Hub's client retries six times in 27 seconds and prints 11 lines."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "endoreward_fast", "score", put(tmp_path, PAIR), "-m", "owner/model"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "'owner/model'" in done.stderr and "http://127.0.0.1:9 cannot be reached" in done.stderr
