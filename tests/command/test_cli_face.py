"""The command's own text: the model in every output, help, aliases, and suggestions for mistyped words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli_harness import PAIR, LengthScorer, put, run
from endoreward_fast.command.evaluate import side_by_side
from endoreward_fast.command.run import pipeline
from endoreward_fast.model.checkpoint import weights_of
from endoreward_fast.model.dtypes import ALIASES, DTYPES

ROOT = Path(__file__).resolve().parents[2]
PREFERENCE = {"prompt": "p", "chosen": "a", "rejected": "bb"}
NOTE = (
    "endoreward: no --model: using pocket, the embedded demonstration model with 3 million weights; name yours with "
    "--model"
)
COMMANDS = ("score", "rank", "eval", "show", "plot", "demo")


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    """No model is looked for: its weights have a made-up name."""
    monkeypatch.setattr(side_by_side, "weights_of", lambda name: f"weights of {name}")


# --- which model


@pytest.mark.parametrize("command", ["score", "rank", "eval"])
def test_the_default_model_is_named_in_one_line(command, scorer, tmp_path):
    path = put(tmp_path, PREFERENCE)
    said = run(command, path).stderr
    assert said.splitlines()[0] == NOTE and said.count("no --model") == 1
    assert said.splitlines()[-1].startswith("endoreward: scored 1 of 1 rows, ") and said.endswith(", model pocket\n")
    assert "no --model" not in run(command, path, "-q").stderr
    for named in ("--model", "-m"):
        said = run(command, path, named, "owner/model").stderr
        assert "no --model" not in said and said.endswith(", model owner/model\n")
        assert "no --model" not in run(command, path, named, "pocket").stderr


def test_the_note_states_the_true_number_of_weights(scorer):
    from endoreward_fast import EndoRewardModel

    count = sum(p.numel() for p in EndoRewardModel.from_pretrained("pocket").parameters())
    assert round(count / 1e6) == 3


@pytest.mark.parametrize("command", ["show", "plot"])
def test_the_default_model_is_named_by_show_and_plot(command, tmp_path):
    target = tmp_path / "out.svg"
    said = run(command, put(tmp_path, PREFERENCE), *(["-o", target] if command == "plot" else [])).stderr
    assert said.splitlines()[0] == NOTE and said.endswith(", model pocket\n")


def test_eval_names_every_model_and_its_weights(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_reward_model", lambda flags, name: LengthScorer())
    monkeypatch.setattr(pipeline, "refuse_other_models", lambda flags: None)
    path, target = put(tmp_path, PREFERENCE), tmp_path / "found.json"
    flags = ("-m", "owner/model", "--reward-model", "owner/reward", "--alpha", 2, "-q", "-o", target)
    heading = run("eval", path, *flags).stdout.splitlines()[:3]
    assert [line.split(maxsplit=1)[1] for line in heading] == [
        "owner/model, weights of owner/model",
        "model      owner/reward, weights of owner/reward",
        "sum of token rewards, alpha 2",
    ]
    found = json.loads(target.read_text())
    assert found["model"] == {"name": "owner/model", "weights": "weights of owner/model"}
    assert found["reward_model"] == {"name": "owner/reward", "weights": "weights of owner/reward"}
    assert "reference_model" not in found


def test_eval_and_the_settings_file_name_the_same_weights(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "weights_of", weights_of)
    path, target = put(tmp_path, PREFERENCE), tmp_path / "out.jsonl"
    run("score", path, "-o", target)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())["settings"]
    assert "model_by_default" not in settings
    found = json.loads(run("eval", path, "--json").stdout)
    assert found["model"] == {"name": settings["model"], "weights": settings["weights"]}
    assert "model_by_default" not in found["flags"]


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_groups_with_an_example(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(command, "-h").stdout
    assert text == run(command, "--help").stdout
    groups = re.findall(r"^╭─ (\w+) ─", text, re.M)
    wanted = {"score": ["Cluster"], "rank": ["Cluster"], "eval": ["Compare"]}.get(command, [])
    rows = [] if command == "demo" else ["Input"]
    assert {"Model", "Scoring", "Output", *rows, *wanted} <= set(groups)
    [alone] = re.findall(r"^╭─ Options ─+╮\n(.*?)^╰", text, re.M | re.S)
    assert alone.count("--") == 1 and "--help" in alone  # every other flag is in a group
    assert f"  endoreward {command} " in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    if command != "demo":
        assert "Columns of FILE" in text and "prompt, chosen and rejected" in text


@pytest.mark.parametrize(("command", "groups"), [("tune", {"Head", "Output"}), ("doctor", {"Output"})])
def test_help_of_commands_without_rows_is_in_groups_too(command, groups, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(command, "-h").stdout
    assert set(re.findall(r"^╭─ (\w+) ─", text, re.M)) == {"Options", *groups}
    assert f"  endoreward {command}" in text and "…" not in text and max(map(len, text.splitlines())) <= 80


def test_the_examples_in_help_are_commands(scorer, tmp_path, monkeypatch):
    """Run the examples with `pocket` in place of other models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "load_judges", lambda names, scorer: {})
    for name in ("rows.jsonl", "pairs.jsonl"):
        put(tmp_path, PREFERENCE, name=name)
    monkeypatch.setenv("COLUMNS", "80")
    seen = 0
    for command in ("score", "rank", "eval"):
        for line in re.findall(rf"^ *endoreward ({command} .*?)\s*$", run(command, "-h").stdout, re.M):
            run(
                *line.replace("MODEL", "pocket").replace("Qwen/Qwen2.5-0.5B-Instruct", "pocket").split(),
                "--limit",
                1,
                "-q",
            )
            seen += 1
    assert seen >= 5


def test_completion_scripts_are_offered_by_the_command_alone():
    assert "--install-completion" in run("--help").stdout and "--install-completion" not in run("score", "-h").stdout


# --- aliases


@pytest.mark.parametrize(("alias", "name"), [*ALIASES.items(), ("BF16", "bfloat16"), ("torch.half", "float16")])
def test_aliases_of_dtypes(alias, name, scorer, tmp_path):
    import torch

    run("score", put(tmp_path, PAIR), "--dtype", alias, "-q")
    assert scorer.loaded[0].dtype == name and name in DTYPES
    if hasattr(torch, alias):
        assert getattr(torch, alias) is getattr(torch, name)


@pytest.mark.parametrize(("alias", "name"), [("gpu", "cuda"), ("GPU:1", "cuda:1"), ("cpu", "cpu")])
def test_aliases_of_devices(alias, name, scorer, tmp_path):
    run("score", put(tmp_path, PAIR), "--device", alias, "-q")
    assert scorer.loaded[0].device == name


# --- mistyped


@pytest.mark.parametrize(
    ("args", "suggestion"),
    [(("scor", "x"), "score"), (("evla", "x"), "eval"), (("score", "x", "--modle", "m"), "--model"),
     (("eval", "x", "--signal", "all"), "--signals")],
)  # fmt: skip
def test_a_mistyped_word_gets_a_suggestion(args, suggestion):
    said = run(*args, code=2).stderr
    assert suggestion in said.replace(" ".join(args), ""), said


@pytest.mark.parametrize("args", [("help",), ("-h",), ("--help",)])
def test_every_word_for_help_prints_help(args):
    result = run(*args)
    assert "Usage: " in result.stdout and "score" in result.stdout and result.stderr == ""


def test_help_command_is_command_help():
    assert run("help", "score").stdout == run("score", "--help").stdout
    assert "evla" in run("help", "evla", code=2).stderr


def test_both_version_flags_and_the_module_print_the_version():
    assert run("--version").stdout == run("-V").stdout
    out = subprocess.run([sys.executable, "-m", "endoreward_fast", "-V"], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and out.stdout == run("--version").stdout
