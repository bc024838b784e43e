"""EndoRewardModel.from_pretrained: what it loads, and how it refuses what it cannot."""

import json
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from endoreward_fast import EndoRewardError, EndoRewardModel
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


def test_what_is_no_causal_model_is_refused_in_one_line(tmp_path, saved, monkeypatch):
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
