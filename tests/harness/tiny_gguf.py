"""Tiny Llamas in GGUF files, as llama.cpp's converter writes them."""

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_models import EOS, SIZES, TOKENIZER

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


def written(path, model, architecture="llama", left_out=(), merged="Ā", split=None):
    """`model`, a Llama, as llama.cpp's converter writes it: halves of each head's rotary rows are interleaved there.

    merged   the byte of which two make a token; the default is no byte of any text
    split    the rule that splits text before merges
    """
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
    tokens[len(words)] = 2 * merged  # a merge has to be there
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{merged} {merged}"])
    writer.add_token_types([3 if 256 <= i < len(words) else 1 for i in range(len(tokens))])
    if split is not None:  # behind the tokens, which a reader has to pass
        writer.add_tokenizer_pre(split)
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
