"""What a model's name stands for: places, and the hash by which --resume and ranks know its weights again."""

import random
import shutil

import pytest

from endoreward_fast import EndoRewardError
from endoreward_fast.checkpoint import place_of, pocket_path, weights_of


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001.safetensors").write_bytes(random.Random(0).randbytes(3_000_010))
    return folder


def test_a_folder_is_known_by_what_is_in_it_wherever_it_lies(model, tmp_path, monkeypatch):
    weights = weights_of(str(model))
    shutil.copytree(model, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for same in ("copy", "./copy", "./model/", f"{tmp_path}/../{tmp_path.name}/model"):
        assert weights_of(same) == weights
    for other in ("README.md", "optimizer.pt", "rows.jsonl", "out.jsonl.settings.json"):
        (model / other).write_text("scores do not depend on it")
    assert weights_of(str(model)) == weights
    assert weights_of("pocket") == weights_of(str(pocket_path())) != weights


def of(model, name, change):
    path = model / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(change(before))
    try:
        return weights_of(str(model))
    finally:
        path.write_bytes(before) if before is not None else path.unlink()


def test_other_weights_have_another_hash(model):
    """Also of the same size, as a model that was trained on has; a tokenizer and a template count as well."""
    kept = weights_of(str(model))
    changes = {
        "config.json": lambda text: text.replace(b"llama", b"qwen2"),
        "tokenizer.json": lambda text: b"[]",
        "chat_template.jinja": lambda text: b"{{ messages }}",
        "modeling_own.py": lambda text: b"pass",
        "model-00002.safetensors": lambda data: b"more",
        "model-00001.safetensors": lambda data: random.Random(1).randbytes(len(data)),
    }
    found = {of(model, name, change) for name, change in changes.items()}
    assert len({*found, kept}) == len(changes) + 1
    name = "model-00001.safetensors"
    for tenth in range(10):  # where a tenth of the weights changed, as one matrix may have
        start = tenth * 300_000
        assert of(model, name, lambda data, s=start: data[:s] + bytes(300_000) + data[s + 300_000 :]) != kept
    assert of(model, name, lambda data: data + b"\0") != kept
    (model / name).rename(model / "model-1.safetensors")
    assert weights_of(str(model)) != kept


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch, tmp_path):
    import transformers.utils

    path = tmp_path / "models--some--model" / "snapshots" / "0123abcd" / "config.json"
    asked = []
    monkeypatch.setattr(transformers.utils, "cached_file", lambda *about: asked.append(about) or str(path))
    assert weights_of("some/model") == "commit 0123abcd" and asked == [("some/model", "config.json")]

    def absent(*about):
        raise OSError("some/model is not a valid model identifier\nIf this is a private repository, ...")

    monkeypatch.setattr(transformers.utils, "cached_file", absent)
    with pytest.raises(EndoRewardError, match=r"^model 'some/model' cannot be loaded: some/model is not [a-z ]*$"):
        weights_of("some/model")


def test_places(tmp_path, monkeypatch):
    assert place_of("pocket") == str(pocket_path()) and place_of("some/model") == "some/model"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert place_of("~/models") == str(tmp_path / "models")
    for absent in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(EndoRewardError, match="there is no such folder"):
            place_of(absent)
