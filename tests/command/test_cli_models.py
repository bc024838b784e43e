"""--model and where in it the weights are: passed on to whatever loads it, and known again by --resume."""

import json
import shutil

import pytest

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.flags.engine_flags import EngineFlags
from endoreward_fast.command.flags.options import EvalFlags
from endoreward_fast.command.run import pipeline
from endoreward_fast.command.run.jobs import Job
from endoreward_fast.model import checkpoint
from endoreward_fast.model.checkpoint import pocket_path

ROW = {"prompt": "What is 2 + 3?", "completion": "5"}


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(pocket_path(), folder / "step-5")
    return folder


def test_resume_recognises_the_model_of_a_subfolder(nested, tmp_path):
    source, out = put(tmp_path, ROW, ROW), tmp_path / "out.jsonl"
    command = ("score", source, "--model", nested, "--subfolder", "step-5", "-o", out, "--device", "cpu")
    run(*command)
    expected = EndoRewardModel.from_pretrained("pocket", device="cpu").score([ROW])[0].score
    assert [row["score"] for row in rows_of(out.read_text())] == pytest.approx([expected] * 2, rel=1e-5)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())["settings"]
    assert settings["subfolder"] == "step-5" and settings["weights"] == checkpoint.weights_of("pocket")
    run(*command, "--resume")
    # the same weights by another name; then others
    run("score", source, "--model", nested / "step-5", "-o", out, "--device", "cpu", "--resume")
    other = nested / "step-6"
    shutil.copytree(pocket_path(), other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    result = run("score", source, "--model", nested, "--subfolder", "step-6", "-o", out, "--resume", code=2)
    assert "weights" in result.stderr or "model" in result.stderr


def test_every_loader_gets_the_place_of_the_weights(monkeypatch):
    asked = []

    class Known:
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.append((name, {k: v for k, v in options.items() if k not in ("dtype", "device")}))

    monkeypatch.setattr("endoreward_fast.model.model.EndoRewardModel", Known)
    monkeypatch.setattr("endoreward_fast.rivals.reward_model.RewardModel", Known)
    where = {"revision": "v2", "subfolder": "sub", "gguf_file": "a.gguf", "trust_remote_code": True}
    flags = EngineFlags(model="some/model", **where)
    Job("score", flags).load()
    pipeline.load_scorer(EngineFlags(model="some/model"))
    assert asked == [("some/model", where), ("some/model", {})]
    asked.clear()
    from endoreward_fast.command.evaluate.side_by_side import panel

    monkeypatch.setattr(pipeline, "refuse_other_models", lambda flags: None)  # the names are made up
    panel(EvalFlags(model="m", revision="v2", reference_model="r", reward_model="j", signals="log-ratio"))
    assert asked == [("m", {"revision": "v2"}), ("r", {}), ("j", {})]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "pocke"), "did you mean 'pocket'?"),
        (("--model", "no such model"), "no such folder"),
        (("--model", "/nowhere/at/all"), "no such folder"),
        (("--model", "absent.gguf"), "no such file"),
        (("--subfolder", "step-5"), "no folder 'step-5'"),
        (("--gguf-file", "a.gguf"), "no file 'a.gguf'"),
    ],
)
def test_what_is_not_a_model_is_refused_at_once(tmp_path, flags, said):
    result = run("score", put(tmp_path, ROW), *flags, "-q", code=2)
    assert said in result.stderr and result.stderr.count("\n") == 1
