"""The architecture of the embedded model, and an initialisation with which it learns to copy within minutes.

Copying, reversing and finding need an induction circuit: a head of layer 0 writes each token's predecessor into its
state, and a head of layer 1 searches those predecessors for the current token. The circuit is slow to emerge. On
repeated random tokens, where guessing costs 5.9 nats, an initialisation without the second head was still at 5.9 after
100 steps; the one planted here was at 4.3 after 75. It is only an initialisation: every weight is trained.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

LAYERS, WIDTH, HEADS, HEAD_DIM = 4, 256, 8, 32
WINDOW, MAX_LENGTH = 256, 16384
ROPE_THETA = 10000.0


def build(tokenizer: PreTrainedTokenizerFast) -> SmolLM3ForCausalLM:
    """Build a SmolLM3 with 4 layers. With its sliding window, token 10,000 sees the same context as token 500."""
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * LAYERS,
        no_rope_layers=[1] * LAYERS,  # 1: this layer has rotary positions
        attention_bias=True,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = SmolLM3ForCausalLM(config)
    plant_induction(model)
    return model


@torch.no_grad()
def plant_induction(model: SmolLM3ForCausalLM, embedding_std: float = 0.05) -> None:
    """Make head 0 of layer 0 attend one token back, and head 0 of layer 1 to the successor of the current token.

    Layer 0: queries and keys are constant (biases) on the fastest rotary frequencies f. The score of the key `back`
    tokens ago is sum_f cos(f * (back - 1)), which is largest at 1. The value writes the token into a free subspace.
    Layer 1: keys read that subspace and queries read the token, on slow frequencies that distance hardly rotates.
    """
    model.model.embed_tokens.weight.normal_(0.0, embedding_std)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    half, fast, strength = HEAD_DIM // 2, 6, 7.0
    frequency = ROPE_THETA ** (-torch.arange(fast) / half)
    first.k_proj.bias[:fast] = strength
    first.q_proj.bias[:fast] = strength * frequency.cos()
    first.q_proj.bias[half : half + fast] = -strength * frequency.sin()
    token, previous = torch.linalg.qr(torch.randn(WIDTH, 2 * HEAD_DIM)).Q.split(HEAD_DIM, dim=1)  # (256, 32) each
    first.v_proj.weight[:HEAD_DIM] = token.T
    first.o_proj.weight[:, :HEAD_DIM] = 2 * embedding_std * previous
    slow = [*range(half // 2, half), *range(half + half // 2, HEAD_DIM)]
    second.q_proj.weight[:HEAD_DIM] = 0.0
    second.k_proj.weight[:HEAD_DIM] = 0.0
    second.q_proj.weight[slow] = 4 * token.T[slow]
    second.k_proj.weight[slow] = previous.T[slow]
    copied = torch.linalg.qr(torch.randn(WIDTH, HEAD_DIM)).Q
    second.v_proj.weight[:HEAD_DIM] = copied.T
    second.o_proj.weight[:, :HEAD_DIM] = 2 * embedding_std * copied
