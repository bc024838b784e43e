"""The place that a model's name stands for, and the hash by which --resume and ranks compare weights."""

import json
import random
import shutil

import pytest

from endoreward_fast import EndoRewardError
from endoreward_fast.model.checkpoint import located, place_of, pocket_path, weights_of


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001.safetensors").write_bytes(random.Random(0).randbytes(3_000_010))
    return folder


def test_the_hash_of_a_folder_depends_on_its_content_and_not_its_place(model, tmp_path, monkeypatch):
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
    """Weights of the same size, as after further training, have another hash. Tokenizer and template count as well."""
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
    for tenth in range(10):  # a change of any tenth of the weights, such as one matrix
        start = tenth * 300_000
        assert of(model, name, lambda data, s=start: data[:s] + bytes(300_000) + data[s + 300_000 :]) != kept
    assert of(model, name, lambda data: data + b"\0") != kept
    (model / name).rename(model / "model-1.safetensors")
    assert weights_of(str(model)) != kept


def test_a_model_on_the_hub_is_identified_by_its_commit(monkeypatch, tmp_path):
    import huggingface_hub.constants
    import transformers.utils

    path = tmp_path / "models--some--model" / "snapshots" / "0123abcd" / "config.json"
    asked = []

    def cached(name, file, **options):
        asked.append((name, file, options))
        return str(path) if file == "config.json" else None

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no request checks the Hub
    monkeypatch.setattr(transformers.utils, "cached_file", cached)
    assert weights_of("some/model") == "commit 0123abcd" and asked[0] == ("some/model", "config.json", {})
    asked.clear()
    path = path.parent / "sub" / "config.json"
    options = {"revision": "v2", "subfolder": "sub"}
    assert weights_of("some/model", **options, gguf_file=None) == "commit 0123abcd sub" and asked[0][2] == options

    def absent(*about, **options):
        raise OSError("some/model is not a valid model identifier\nIf this is a private repository, ...")

    monkeypatch.setattr(transformers.utils, "cached_file", absent)
    with pytest.raises(EndoRewardError, match=r"^model 'some/model' cannot be loaded: some/model is not [a-z ]*$"):
        weights_of("some/model")


def test_places(tmp_path, monkeypatch):
    assert place_of("pocket") == str(pocket_path()) and place_of("some/model") == "some/model"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert place_of("~/models") == str(tmp_path / "models")
    for absent in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c", "no model", "a:b", "x" * 200, "-a", "a--b"):
        with pytest.raises(EndoRewardError, match="there is no such folder"):
            place_of(absent)
    for nearly in ("pocke", "Pocket", "poket", "pockett"):
        with pytest.raises(EndoRewardError, match=f"{nearly}.*did you mean 'pocket'?"):
            place_of(nearly)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for odd, said in (("", "is empty"), ("~/model.safetensors", "name the folder"), ("m.gguf", "no such file"),
                      ("~nobody-here/m", "not a path"), ("y" * 5000, "not a path")):  # fmt: skip
        with pytest.raises(EndoRewardError, match=said) as caught:
            place_of(odd)
        assert "\n" not in str(caught.value)


def test_other_files_of_trainers_do_not_change_the_hash(model):
    weights = weights_of(str(model))
    for other in ("training_args.bin", "optimizer.bin", "model-Q4.gguf"):
        (model / other).write_bytes(b"GGUF")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "config.json").write_text("{}")
    assert weights_of(str(model)) == weights
    assert weights_of(str(model), subfolder="checkpoint-5") != weights
    assert weights_of(str(model), gguf_file="model-Q4.gguf") != weights


def test_the_hash_of_a_gguf_file_covers_it_and_its_tokenizer(model):
    for name, text in (("a.gguf", b"GGUF one"), ("b.gguf", b"GGUF two"), ("c.GGUF", b"nothing")):
        (model / name).write_bytes(text)
    found = weights_of(str(model / "a.gguf"))
    assert found == weights_of(str(model), gguf_file="a.gguf") != weights_of(str(model / "b.gguf"))
    (model / "model-00001.safetensors").write_bytes(b"other weights")
    (model / "b.gguf").write_bytes(b"GGUF three")
    assert weights_of(str(model / "a.gguf")) == found
    (model / "tokenizer.json").write_text("[]")
    assert weights_of(str(model / "a.gguf")) != found
    for odd, said in (({"gguf_file": "c.GGUF"}, "not a GGUF file"), ({"gguf_file": "d.gguf"}, "there is no file"),
                      ({"subfolder": "sub"}, "there is no folder")):  # fmt: skip
        with pytest.raises(EndoRewardError, match=said):
            weights_of(str(model), **odd)
    with pytest.raises(EndoRewardError, match="no gguf_file inside"):
        weights_of(str(model / "a.gguf"), gguf_file="b.gguf")


def test_the_hash_of_an_adapter_covers_its_base(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def written(base, weights=b"one"):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        return weights_of(str(adapter))

    found = written(str(model))
    assert found == written(str(model)) != written(str(model), b"two")
    assert weights_of(str(model)) in found and written("../model").endswith(weights_of(str(model)))
    (model / "model-00001.safetensors").write_bytes(b"other weights")
    assert written(str(model)) != found
    for base, said in ((str(tmp_path / "gone"), "gone.*there is no such folder"), (None, "names no base_model")):
        with pytest.raises(EndoRewardError, match=said) as caught:
            written(base)
        assert str(adapter) in str(caught.value)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(EndoRewardError, match=r"adapter_config.json cannot be read"):
        weights_of(str(adapter))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError("no such host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EndoRewardError, match=r"some/model.*not in the cache.*cannot be reached \(no such host\)$"):
        located("some/model", {"cache_dir": str(tmp_path)})
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
    _, options = located("some/model", {"cache_dir": str(tmp_path)})
    assert options["local_files_only"] and len(asked) == 2
    assert located("some/model", {"local_files_only": True})[1] and len(asked) == 2
