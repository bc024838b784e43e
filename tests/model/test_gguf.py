"""A model in a GGUF file scores like the same weights in a folder, or is refused in one line."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import loading
from tiny_models import EOS, ROWS, SIZES, TOKENIZER

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def their_name(key):
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = key.removesuffix(".weight")
    if module in outside:
        return f"{outside[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def written(path, model, architecture="llama", left_out=()):
    """Write a Llama model as llama.cpp's converter does, which interleaves the halves of each head's rotary rows."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(TOKENIZER.get_vocab().items(), key=lambda item: item[1])
    tokens = [word for word, _ in words] + [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    tokens[len(words)] = "ĀĀ"  # the file needs at least one merge; this one joins two zero bytes
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ā Ā"])
    writer.add_token_types([3 if 256 <= i < len(words) else 1 for i in range(len(tokens))])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(EOS)
    for key, tensor in model.state_dict().items():
        data, name = tensor.float().numpy(), their_name(key)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if not any(name.startswith(part) for part in left_out):
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama())


def test_scores_equal_those_of_the_original_model(file):
    expected = EndoRewardModel(llama().double(), TOKENIZER).score(ROWS)
    for name, options in ((file, {}), (str(file.parent), {"gguf_file": file.name})):
        loaded = EndoRewardModel.from_pretrained(name, device="cpu", **options)
        assert loaded.head.weight.dtype == torch.float32 and loaded.max_positions == 128
        assert TOKENIZER.decode([65]) == loaded.tokenizer.decode([65])
        for one, other in zip(loaded.score(ROWS), expected, strict=True):
            assert one.error is None and one.score == pytest.approx(other.score, rel=1e-4, abs=1e-3)


def test_tied_heads_and_dtypes(tmp_path):
    tied = llama(tie_word_embeddings=True)
    path = written(tmp_path / "tied.gguf", tied, left_out=("output.",))
    loaded = EndoRewardModel.from_pretrained(path, dtype="bf16", device="cpu")
    assert loaded.head.weight.dtype == torch.bfloat16
    expected = EndoRewardModel(tied.bfloat16(), TOKENIZER).score(ROWS[3:4])[0].score
    assert loaded.score(ROWS[3:4])[0].score == pytest.approx(expected, rel=1e-2)


def refused(path, said, **options):
    with pytest.raises(EndoRewardError, match=said) as caught:
        EndoRewardModel.from_pretrained(path, device="cpu", **options)
    assert "\n" not in str(caught.value) and (path.name in str(caught.value))


def test_a_faulty_file_is_an_error_of_one_line(file, tmp_path, monkeypatch):
    refused(written(tmp_path / "new.gguf", llama(), "starling9"), "starling9")
    refused(written(tmp_path / "clip.gguf", llama(), "clip"), "clip")
    refused(written(tmp_path / "part.gguf", llama(), left_out=("blk.1.attn_q", "output_norm")), "lacks 'model")
    whole = file.read_bytes()
    damaged = {"short": whole[:2000], "cut": whole[:-5000], "header": b"GGUF", "zeros": b"GGUF" + bytes(64)}
    for name, content in damaged.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        refused(tmp_path / f"{name}.gguf", "cannot be loaded")
    (tmp_path / "text.gguf").write_text("no GGUF")
    refused(tmp_path / "text.gguf", "not a GGUF file")
    refused(tmp_path / "absent.gguf", "no such file")
    refused(tmp_path, "no file 'absent.gguf'", gguf_file="absent.gguf")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    refused(file, "gguf is not installed: pip install gguf")


def test_the_command_accepts_the_path_of_a_gguf_file(file, tmp_path):
    row = {"prompt": "a", "completion": "b"}
    source, out = put(tmp_path, row), tmp_path / "out.jsonl"
    run("score", source, "-m", file, "-o", out, "-q")
    run("score", source, "-m", file, "-o", out, "-q", "--resume")
    [found] = rows_of(out.read_text())
    assert found["score"] == pytest.approx(EndoRewardModel.from_pretrained(file).score([row])[0].score, rel=1e-6)
