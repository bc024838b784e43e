"""EndoRewardModel.from_pretrained loads models, and refuses the rest in one line."""

import json
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import devices
from endoreward_fast.model.dtypes import dtype_name
from endoreward_fast.rivals.reward_model import RewardModel
from tiny_models import MODELS, ROWS, TOKENIZER


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    MODELS["llama"]().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_a_saved_model_scores_as_it_did(saved, llama):
    loaded = EndoRewardModel.from_pretrained(str(saved))
    for one, other in zip(loaded.score(ROWS), llama.score(ROWS), strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5)
    assert not loaded.model.training


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto", None])
def test_dtypes(saved, dtype):
    loaded = EndoRewardModel.from_pretrained(str(saved), dtype=dtype, device="cpu")
    expected = torch.float32 if dtype in ("auto", None) else torch.bfloat16
    assert loaded.head.weight.dtype == expected and loaded.device.type == "cpu"
    assert all(result.error is None for result in loaded.score(ROWS))


@pytest.mark.parametrize("units", [True, False])
def test_the_fastest_dtype_is_bfloat16_where_the_device_computes_in_it(saved, monkeypatch, units):
    monkeypatch.setattr(devices, "has_bf16_units", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units)
    wanted = torch.bfloat16 if units else torch.float32
    assert EndoRewardModel.from_pretrained(str(saved), dtype="fastest", device="cpu").dtype == wanted
    assert devices.fastest_dtype(torch.device("cuda")) == wanted


def test_without_a_tokenizer_a_warning_says_so(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved / name, tmp_path)
    with pytest.warns(UserWarning, match="no usable tokenizer"):
        scorer = EndoRewardModel.from_pretrained(str(tmp_path))
    assert scorer.score(ROWS[3:4])[0].error is None


def refused(name, said, **options):
    with pytest.raises(EndoRewardError, match=said) as caught:
        EndoRewardModel.from_pretrained(str(name), **options)
    assert "\n" not in str(caught.value) and (options or str(name) in str(caught.value))


def test_anything_but_a_causal_model_is_refused_in_one_line(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(tmp_path / "absent", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot be loaded")
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "'t5', which is not a causal language model")
    tiny = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "not a causal language model")
    LlamaForSequenceClassification(LlamaConfig(**tiny)).save_pretrained(tmp_path / "classifier")
    refused(tmp_path / "classifier", "is a LlamaForSequenceClassification, which is not a causal language model")
    unnamed = tmp_path / "classifier" / "config.json"
    unnamed.write_text(json.dumps(json.loads(unnamed.read_text()) | {"architectures": None}))
    refused(tmp_path / "classifier", "checkpoint lacks 'lm_head.weight'")
    refused(saved, "device 'cuda:77' cannot be used", device="cuda:77")
    refused(saved, "dtype 'int3'", dtype="int3")
    shutil.copytree(saved, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\0" * 100)
    refused(tmp_path / "torn", "cannot be loaded")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "torn" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    refused(tmp_path / "torn", "cannot be loaded")


def test_options_that_say_where_the_weights_are(saved, llama, tmp_path, monkeypatch):
    expected = llama.score(ROWS[:1])[0].score
    shutil.copytree(saved, tmp_path / "run" / "step-5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    variant = tmp_path / "variant"
    shutil.copytree(saved, variant)
    (variant / "model.safetensors").rename(variant / "model.fp16.safetensors")
    for name, options in (
        ("run", {"subfolder": "step-5"}),
        ("~/run/step-5", {}),
        (tmp_path / "run", {"subfolder": "step-5", "revision": "main", "local_files_only": True, "token": False}),
        ("run/step-5", {"trust_remote_code": False, "use_safetensors": True, "cache_dir": str(tmp_path)}),
        ("run/step-5", {"subfolder": None, "gguf_file": None, "config": None, "device_map": None}),
        ("run/step-5", {"config": llama.model.config, "attn_implementation": "eager"}),
        ("variant", {"variant": "fp16"}),
    ):
        found = EndoRewardModel.from_pretrained(name, device="cpu", **options)
        assert found.tokenizer is not None, options
        assert found.score(ROWS[:1])[0].score == pytest.approx(expected, rel=1e-4), options


def test_a_tied_head_and_an_older_name_of_dtype(saved, tmp_path):
    tied = MODELS["gpt2"]()
    tied.save_pretrained(tmp_path / "gpt2")
    loaded = EndoRewardModel.from_pretrained(tmp_path / "gpt2", torch_dtype="half", device="cpu", local_files_only=True)
    assert loaded.head.weight.dtype == torch.float16 and loaded.head.weight is loaded.model.transformer.wte.weight
    for name in ("bf16", "torch.bfloat16", "BF16"):
        assert EndoRewardModel.from_pretrained(saved, dtype=name, device="cpu").head.weight.dtype == torch.bfloat16
    same = EndoRewardModel.from_pretrained(saved, dtype="fp16", torch_dtype=torch.float16, device="cpu")
    assert same.head.weight.dtype == torch.float16


def test_a_wrong_option_is_an_error_of_one_line(saved, tmp_path, monkeypatch):
    refused(saved, "takes no option 'colour'", colour="red")
    refused(
        saved, r"removed load_in_8bit: .*quantization_config=BitsAndBytesConfig\(load_in_8bit=True\)", load_in_8bit=True
    )
    refused(saved, "quantization_config=.*load_in_4bit", load_in_4bit=True)
    refused(saved, "no folder 'step-9'", subfolder="step-9")
    refused(saved, "fp16", variant="fp16")
    refused(saved, "config is a str", config="config.json")
    refused(saved, "torch_dtype", dtype="bf16", torch_dtype="float32")
    refused(saved, r"dtype 'bfloat61'.*did you mean bfloat16\?", dtype="bfloat61")
    refused(saved, "dtype torch.int8", dtype=torch.int8)
    refused(saved, "cannot be loaded", state_dict={})
    refused(saved, "cannot be loaded", device_map="everywhere")
    refused(saved, "attn", attn_implementation="telepathy")
    refused(saved, "(?i)bitsandbytes|gpu|cuda", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device="cpu")
    refused(
        saved, "(?i)torchao|quantiz", quantization_config={"quant_method": "torchao", "quant_type": "int4_weight_only"}
    )
    refused(saved, "(?i)quant", quantization_config={"quant_method": "abacus"})
    refused(saved, r"'lm_head.weight' is \(384, 64\).*\(400, 64\)", vocab_size=400)
    shutil.copytree(saved, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="no usable tokenizer"):
        EndoRewardModel.from_pretrained(tmp_path / "tokenizer", device="cpu")
    (tmp_path / "tokenizer" / "config.json").write_text("[1, 2")
    refused(tmp_path / "tokenizer", "cannot be loaded")


def test_loading_draws_no_bars_and_leaves_transformers_as_it_was(saved, tmp_path, capfd):
    from transformers.utils import logging

    seen = []
    logging.enable_progress_bar()
    logging.set_tqdm_hook(lambda factory, args, kwargs: seen.append(kwargs) or factory(*args, **kwargs))
    try:
        EndoRewardModel.from_pretrained(saved, device="cpu")
        with pytest.raises(EndoRewardError):
            EndoRewardModel.from_pretrained(saved, device="cpu", vocab_size=400)
        assert not seen and logging.is_progress_bar_enabled()
        list(logging.tqdm([1], desc="mine"))
        assert [kwargs["desc"] for kwargs in seen] == ["mine"]
    finally:
        logging.set_tqdm_hook(None)
    said = capfd.readouterr()
    assert "Loading" not in said.err + said.out and "REPORT" not in said.err + said.out


def test_num_labels_may_be_set(tmp_path):
    tiny = dict(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForSequenceClassification(LlamaConfig(**tiny, num_labels=2)).save_pretrained(tmp_path / "two")
    TOKENIZER.save_pretrained(tmp_path / "two")
    with pytest.raises(EndoRewardError, match=r"two.*has 2 outputs"):
        RewardModel.from_pretrained(tmp_path / "two", device="cpu")
    with pytest.raises(EndoRewardError, match=r"'score.weight' is \(2, 16\)"):
        RewardModel.from_pretrained(tmp_path / "two", device="cpu", num_labels=1)
    LlamaForSequenceClassification(LlamaConfig(**tiny, num_labels=1)).save_pretrained(tmp_path / "run" / "one")
    TOKENIZER.save_pretrained(tmp_path / "run" / "one")
    found = RewardModel.from_pretrained(tmp_path / "run", subfolder="one", device="cpu", dtype="double")
    assert found.score([{"prompt": "a", "completion": "b"}])[0].error is None


@pytest.mark.parametrize("name", ["float32", "F32", "fp32", "float", "torch.float32"])
def test_names_of_a_dtype(name):
    assert dtype_name(name) == "float32"
