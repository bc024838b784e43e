"""Damaged checkpoints, unknown quantisation, unread tensors and models with their own code.

Each is refused in one line that says what, where, and what to do.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.rivals.reward_model import RewardModel
from tiny_models import MODELS, ROWS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"


def changed(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, *said, load=EndoRewardModel.from_pretrained, **options):
    with pytest.raises(EndoRewardError) as caught:
        load(folder, device="cpu", **options)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and all(words in line for words in said), line


def test_truncated_weights_and_weights_that_were_not_downloaded(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:100], whole[:-1], whole + b"\0", b"\0" * 1000, b"<html>" * 50):
        path.write_bytes(content)
        refused(folder, "model.safetensors is cut short or damaged: download it again")
    path.write_text(POINTER)
    refused(folder, "model.safetensors is a pointer of Git LFS", "git lfs pull")
    path.unlink()
    refused(folder, "no file named model.safetensors")
    torch.save(MODELS["llama"]().state_dict(), folder / "pytorch_model.bin")
    assert EndoRewardModel.from_pretrained(folder, device="cpu").score(ROWS[:1])[0].error is None
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused(folder, "pytorch_model.bin is cut short: download it again")


def test_a_missing_or_truncated_shard(folder):
    (folder / "model.safetensors").unlink()
    MODELS["llama"]().save_pretrained(folder, max_shard_size="100KB")
    assert EndoRewardModel.from_pretrained(folder, device="cpu").score(ROWS[:1])[0].error is None
    second, third = sorted(folder.glob("model-0*"))[1:3]
    third.write_bytes(third.read_bytes()[:-10])
    refused(folder, f"{third.name} is cut short or damaged")
    second.unlink()
    refused(folder, f"{second.name}, which model.safetensors.index.json names, is not there")


def test_an_unknown_quantisation_is_refused(folder):
    for method in ("modelopt", "abacus", "four_over_six"):
        changed(folder, quantization_config={"quant_method": method})
        refused(folder, f"quantised by '{method}', which transformers does not know", "unquantised")
    for method, package in (("gptq", "optimum"), ("awq", "gptqmodel"), ("torchao", "torchao"), ("sinq", "sinq"),
                            ("aqlm", "aqlm"), ("bitsandbytes", "bitsandbytes")):  # fmt: skip
        more = {"bits": 4, "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 1, "_data": {}}}}
        changed(folder, quantization_config={"quant_method": method, "load_in_4bit": method == "bitsandbytes"} | more)
        refused(folder, f"pip install {package}" if method != "bitsandbytes" else "bitsandbytes>=")


def test_tensors_that_a_layer_of_the_model_does_not_read(folder):
    """ModelOpt saves 8-bit numbers and their scales, with no entry in config.json."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    scaled = weights | {f"{name}.weight_scale": torch.tensor(0.5), f"{name}.input_scale": torch.tensor(1.0)}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, f"{name}.input_scale' and 1 more, which the model does not read", "quantization_config")
    save_file(weights | {f"{name}.bias": torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, f"{name}.bias', which the model does not read")
    for other in ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision.proj.weight", "model.layers.9.mlp.bias"):
        save_file(weights | {other: torch.ones(8)}, folder / "model.safetensors", metadata={"format": "pt"})
        assert EndoRewardModel.from_pretrained(folder, device="cpu").score(ROWS[:1])[0].error is None


def test_weights_in_a_dtype_that_no_model_computes_in(folder):
    expected = EndoRewardModel.from_pretrained(folder, device="cpu").score(ROWS[:1])[0].score
    weights = {key: x.to(torch.float8_e4m3fn) for key, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float8_e4m3fn", None):
        changed(folder, dtype=dtype)
        refused(folder, "float8_e4m3fn", "dtype='bfloat16'")
        found = EndoRewardModel.from_pretrained(folder, device="cpu", dtype="float32").score(ROWS[:1])[0]
        assert found.score == pytest.approx(expected, rel=0.5)
    for dtype in (torch.float8_e4m3fn, "float8_e4m3fn"):
        with pytest.raises(
            EndoRewardError, match=r"^dtype '?(torch\.)?float8_e4m3fn'?: expected auto, fastest, float32, "
        ):
            EndoRewardModel.from_pretrained(folder, device="cpu", dtype=dtype)


def test_a_models_own_code_is_not_run_by_default(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("nobody is asked"))
    auto = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    changed(folder, model_type="own_kind", auto_map=auto)
    (folder / "own_config.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_kind'\n"
    )
    (folder / "own_model.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .own_config import OwnConfig\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    refused(folder, "comes with its own code", "trust_remote_code=True")
    found = EndoRewardModel.from_pretrained(folder, device="cpu", trust_remote_code=True)
    assert found.score(ROWS[:1])[0].error is None
    (folder / "own_config.py").write_text("import no_such_package_here\n" + (folder / "own_config.py").read_text())
    refused(folder, "no_such_package_here", "pip install no_such_package_here", trust_remote_code=True)


def test_errors_after_loading_name_the_model(folder):
    larger = AutoTokenizer.from_pretrained(folder)
    larger.add_tokens([f"word{i}" for i in range(200)])
    larger.save_pretrained(folder)
    refused(folder, "tokens but the model's output head only 384")
    refused(folder, "is a LlamaForCausalLM, which is not a reward model", load=RewardModel.from_pretrained)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({}, "holds no file of a tokenizer"),
        ({"tokenizer.json": POINTER}, "tokenizer.json is a pointer of Git LFS"),
        ({"tokenizer.json": "{"}, "Expecting property name"),
    ],
)
def test_why_a_folder_has_no_tokenizer(folder, left, said):
    for path in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        path.unlink()
    for name, content in left.items():
        (folder / name).write_text(content)
    with pytest.warns(UserWarning, match=said) as caught:
        EndoRewardModel.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught[0].message) and not str(caught[0].message).endswith(":")


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "chat_template.jinja"])
def test_the_tokenizer_gets_the_template_of_its_processor(folder, file):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    (folder / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    assert EndoRewardModel.from_pretrained(folder, device="cpu").tokenizer.chat_template == template
    changed(folder, "tokenizer_config.json", chat_template="{{ messages }}")
    kept = EndoRewardModel.from_pretrained(folder, device="cpu").tokenizer.chat_template
    assert kept == (template if file.endswith("jinja") else "{{ messages }}")
