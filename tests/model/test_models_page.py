"""docs/models.md is right about what is accepted and what is refused, and refusals are one line."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from endoreward_fast import EndoRewardError, EndoRewardModel, RewardModel
from endoreward_fast.command.flags.options import ModelFlags
from endoreward_fast.scoring.arguments import LoadKwargs
from tiny_models import MODELS, ROWS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
TAKEN, REFUSED = (
    [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")][1:]
    for part in PAGE.split("## What is refused")
)
TINY = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def changed(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return folder


def adapter(folder, **config):
    peft = pytest.importorskip("peft")
    model = MODELS["llama"]()
    if config.pop("rows", None):
        model.resize_token_embeddings(400, mean_resizing=False)
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | config
    peft.get_peft_model(model, peft.LoraConfig(**config)).save_pretrained(folder / "adapter")
    return changed(folder / "adapter", "adapter_config.json", base_model_name_or_path=str(folder))


def one_table(folder):
    found = adapter(folder, rows=True, modules_to_save=["embed_tokens"])
    file = found / "adapter_model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if "lm_head" not in k}, file, metadata={"format": "pt"})
    return found


def with_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def other(folder, model):
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return folder


def written(folder, name, content):
    (folder / name).write_bytes(content)
    return folder


def more_words(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    tokenizer.save_pretrained(folder)
    return folder


CASES = {  # for each line of the page's table: how to make such a model, and a part of the error
    "a classifier, an encoder, an encoder-decoder, a vision model": [
        (lambda f: other(f, LlamaForSequenceClassification(LlamaConfig(**TINY))), "not a causal language model"),
        (lambda f: other(f, BertModel(BertConfig(**TINY))), "not a causal language model"),
        (lambda f: other(f, T5ForConditionalGeneration(T5Config(**T5))), "not a causal language model"),
        (lambda f: other(f, ViTModel(ViTConfig(**TINY, image_size=8, patch_size=4))), "not a causal language model"),
    ],
    "a checkpoint that lacks weights of the model": [
        (lambda f: with_weights(f, lambda w: {k: x for k, x in w.items() if "lm_head" not in k}), "checkpoint lacks"),
    ],
    "a file that is cut short, or a missing shard": [
        (lambda f: written(f, "model.safetensors", b"\1\0\0"), "cut short or damaged: download it again"),
        (lambda f: changed(written(f, "model.safetensors", b""), "model.safetensors.index.json",
                           weight_map={"x": "model-1.safetensors"}), "is not there: download"),
    ],
    "a pointer of Git LFS in place of a file": [
        (lambda f: written(f, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    ],
    "tensors that a layer of the model does not read": [
        (lambda f: with_weights(f, lambda w: w | {"lm_head.weight_scale": torch.ones(1)}), "quantization_config"),
    ],
    "a quantisation that transformers does not know": [
        (lambda f: changed(f, quantization_config={"quant_method": "modelopt"}), "take the model's unquantised"),
    ],
    "float8 weights without a quantisation": [
        (lambda f: changed(with_weights(f, lambda w: {k: x.to(torch.float8_e4m3fn) for k, x in w.items()}),
                           dtype="float8_e4m3fn"), "--dtype bf16"),
    ],
    "`load_in_8bit`, `load_in_4bit`": [(lambda f: (f, {"load_in_8bit": True}), "quantization_config=BitsAndBytes")],
    "an adapter without a base model": [
        (lambda f: changed(adapter(f), "adapter_config.json", base_model_name_or_path="/no/base"), "put the base"),
        (lambda f: changed(adapter(f), "adapter_config.json", base_model_name_or_path=None), "names no base_model"),
    ],
    "an adapter of a classifier as a causal model": [
        (lambda f: changed(adapter(f), "adapter_config.json", task_type="SEQ_CLS"), "adapter of a classifier"),
    ],
    "prompt tuning and prefix tuning": [
        (lambda f: changed(adapter(f), "adapter_config.json", peft_type="PROMPT_TUNING", num_virtual_tokens=2),
         "PROMPT_TUNING"),
    ],
    "an adapter that holds only one of two resized tables": [(one_table, "save_embedding_layers=True")],
    "a GGUF file of an architecture that transformers does not know": [],  # test_gguf.py
    "`smollm2` without its package, or with another version of it": [],  # test_packaged.py, with the next two
    "a damaged GGUF file in the package": [],
    "a cache folder that cannot be written": [],
    "a tokenizer with more tokens than the model's head": [(more_words, "the model's output head only 384")],
    "a model with its own code, by default": [
        (lambda f: changed(f, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
         "trust_remote_code=True (--trust-remote-code)"),
    ],
}  # fmt: skip


def test_every_line_of_the_table_has_a_case():
    assert list(CASES) == [what for what, _ in REFUSED]


@pytest.mark.parametrize(
    ("make", "said"),
    [case for cases in CASES.values() for case in cases],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_refused(folder, make, said):
    made = make(folder)
    name, options = made if isinstance(made, tuple) else (made, {})
    with pytest.raises(EndoRewardError) as caught:
        EndoRewardModel.from_pretrained(name, device="cpu", **options)
    assert said in str(caught.value) and "\n" not in str(caught.value) and str(name) in str(caught.value)


def test_options_and_flags_of_the_page_are_there():
    options = set(re.findall(r"[(`](\w+)=", " ".join(python for _, python, *_ in TAKEN)))
    assert options <= {*LoadKwargs.__annotations__, "dtype", "device", "load_in_4bit"}
    flags = {flag.replace("-", "_") for *_, flag in TAKEN for flag in re.findall(r"--([a-z-]+)", flag)}
    assert flags <= {*ModelFlags.__dataclass_fields__} and len(flags) == 7


def test_what_is_taken(folder, monkeypatch):
    expected = EndoRewardModel.from_pretrained(folder, device="cpu").score(ROWS[:1])[0].score
    monkeypatch.chdir(folder.parent)
    adapter(folder)  # a new adapter changes no score
    for name, options in (
        ("model", {}), ("model/adapter", {}), (".", {"subfolder": "model"}), ("model", {"dtype": "fp32"}),
    ):  # fmt: skip
        found = EndoRewardModel.from_pretrained(name, device="cpu", **options).score(ROWS[:1])[0].score
        assert found == pytest.approx(expected, rel=1e-5)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.warns(UserWarning, match="holds no file of a tokenizer"):
        scorer = EndoRewardModel.from_pretrained(folder, device="cpu")
    assert scorer.score(ROWS[3:4])[0].error is None and "tokenizer" in scorer.score(ROWS[:1])[0].error


def test_an_adapter_of_a_classifier_is_a_reward_model(folder):
    found = adapter(folder, task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj"])
    with pytest.raises(EndoRewardError, match=r"lacks|does not fit"):  # it was saved without its head
        RewardModel.from_pretrained(found, device="cpu")


def test_no_line_installs_the_package_from_a_registry():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no checkout of git")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".toml", ".txt", ".html", "") and path.is_file() and path != Path(__file__):
            text = path.read_text("utf-8", errors="ignore")
            assert not re.search(r"pip install (?!git\+)[^\n]*endoreward", text), name
