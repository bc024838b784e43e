"""Build a tiny model of every causal language model type in transformers, and tabulate how each head is read.

    python tools/families.py          rewrites docs/families.md (under a minute on two cores)

`tests/head/test_families.py` checks every row of the table.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from endoreward_fast.errors import EndoRewardError
from endoreward_fast.head.head import Head, logits_of, without_cache
from endoreward_fast.head.recipes import RULES, Rule
from endoreward_fast.vocab.reference import final_logits

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
CLASSES = dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))
VOCAB = 320

# Set in every config that has a field of that name.
TINY = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
    d_model=32, num_layers=2, num_heads=4, ffn_dim=48, num_experts=4, num_local_experts=4, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_layers=2,
    encoder_layers=2, decoder_attention_heads=4, encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48,
    d_ff=48, n_layers=2, n_heads=4, max_seq_len=64, n_inner=48, embedding_size=32, emb_dim=32, rotary_dim=8,
    vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
)  # fmt: skip
# Fields that any family's recipe reads, at values that change the logits. They are set in every config that has them,
# so families that ignore their field (mpt, gemma3) are tested too.
TELLING = dict(
    logit_scale=0.3, logits_scaling=3.0, lm_head_multiplier=0.3, output_multiplier=0.3, final_logit_softcapping=5.0,
    logits_soft_cap=5.0, output_logit_soft_cap=5.0, unpadded_vocab_size=VOCAB - 20, logits_mup_width_multiplier=2.0,
    is_decoder=True, causal=True,
)  # fmt: skip
_ASSISTANT = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=2)
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": dict(n_group=2, topk_group=1),
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8),
    "blt": dict(vocab_size=260, encoder_hash_byte_group_vocab=64),
    "blt_local_encoder": dict(vocab_size=260, hidden_size_global=32),
    "blt_local_decoder": dict(vocab_size=260, hidden_size_global=32),
    "chameleon": dict(vocabulary_map={"<image>": 4, "IMGIMGABZ": 5, "IMGIMGACZ": 6}),
    "cohere_compass_text": dict(rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "dots3_note_audio_encoder": dict(adapter_input_size=32, adapter_out_dim=32),
    "dots3_note_vision_encoder": dict(mlp_layer_types=["dense"] * 2, adapter_in_dim=32, adapter_out_dim=32),
    "dots3_note_text": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64),
    "gemma3n_text": dict(num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0]),
    "gemma4_assistant": dict(text_config=_ASSISTANT | dict(model_type="gemma4_text")),
    "gemma4_unified_assistant": dict(text_config=_ASSISTANT | dict(model_type="gemma4_unified_text")),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite4_vision": dict(
        deepstack_layer_map=[], spatial_target_layers=[], downsample_rate="1/2",
        vision_config=dict(model_type="clip_vision_model", hidden_size=64),
    ),
    "granite_docling_vision": dict(out_hidden_size=32),
    "granitemoehybrid": dict(mamba_n_heads=8, layer_types=["mamba", "attention"]),
    "inkling2_vision": dict(text_hidden_size=32),
    "kimi_linear": dict(num_experts_per_tok=2, linear_head_dim=8, linear_num_heads=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=2),
    "muse_spark_audio": dict(num_hidden_layers=4, hidden_sizes=(8, 8, 8, 8), out_hidden_size=32),
    "paligemma": dict(text_config=dict(model_type="gemma2")),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
    ),
    "reformer": dict(axial_pos_embds=False, lsh_attn_chunk_length=4, local_attn_chunk_length=4),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4, n_mamba_heads=8),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table. `outcome` is "hidden states", "own logits", "refused" or "not built"."""

    model_type: str
    name: str
    outcome: str
    recipe: str = ""
    note: str = ""
    error: float | None = None
    """largest |recipe logits - model logits|, in standard deviations of the logits"""


def tiny_config(cls: type, **extra: Any) -> Any:
    """Return a config of this class that builds in milliseconds. Its sub-configs are shrunk too."""
    extra = SPECIAL.get(cls.model_type, {}) | extra
    parts = {
        key: tiny_config(CONFIG_MAPPING[value["model_type"]], **value)
        for key, value in extra.items()
        if isinstance(value, dict) and "model_type" in value
    }
    own = vars(cls(**parts))
    own = {k: v for k, v in own.items() if not isinstance(getattr(cls, k, None), property)}
    fields = {k: v for k, v in TINY.items() if own.get(k) is not None}
    fields |= {k: v for k, v in TELLING.items() if k in own}
    for key, value in own.items():
        if key.endswith("_token_id") and value is not None:
            fields[key] = value if isinstance(value, int) and value < VOCAB else 1
        elif isinstance(value, transformers.PreTrainedConfig):
            fields[key] = tiny_config(type(value)).to_dict()
    fields |= _tiny_attention(own)
    kinds = list(dict.fromkeys(own.get("layer_types") or ()))  # one layer of each type
    if kinds:
        fields["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return cls(**fields | extra | parts)


def _tiny_attention(own: dict[str, Any]) -> dict[str, Any]:
    if own.get("qk_rope_head_dim"):  # multi-head latent attention: no grouped keys, no separate head_dim
        fields = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, kv_lora_rank=16, num_key_value_heads=4)
        return fields | (dict(q_lora_rank=16) if own.get("q_lora_rank") else {}) | dict(head_dim=8)
    fields = dict(head_dim=8) if "head_dim" in own else {}
    return fields | (dict(num_key_value_heads=4) if own.get("num_key_value_heads", 0) is None else {})


def tiny_model(model_type: str) -> nn.Module:
    """Return a tiny random model in evaluation mode, with logits large enough for recipes to make a difference."""
    config = tiny_config(CONFIG_MAPPING[model_type])
    torch.manual_seed(0)
    if model_type.startswith("musicgen"):  # takes the decoder's config, which the auto class does not support
        model = getattr(transformers, CLASSES[model_type])(config.decoder)
    else:
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        if isinstance(head, nn.Linear):
            head.weight.mul_(10)
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    return model.eval()


def examine(model_type: str) -> Row:
    """Build a model, and measure the error of its recipe on other tokens than those of the check at load."""
    name = CLASSES[model_type]
    try:
        model = tiny_model(model_type)
    except (ImportError, ValueError) as error:
        return Row(model_type, name, "not built", note=str(error).strip().partition("\n")[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = Head(model)
    except EndoRewardError as error:
        return Row(model_type, name, "refused", note=str(error).partition(") ")[2].partition(" (")[0])
    if head.reason is not None:
        return Row(model_type, name, "own logits", note=head.reason)
    y = "h W'" if head.bias is None else "h W' + b"
    formula = RULES.get(model.config.model_type, Rule()).formula(y)
    return Row(model_type, name, "hidden states", formula, error=recipe_error(model, head))


@torch.no_grad()
def recipe_error(model: nn.Module, head: Head) -> float:
    """Return the largest |recipe logits - model logits|, in standard deviations of the model's logits."""
    tokens = torch.arange(24).reshape(2, 12) * 7 % 250 + 5
    torch.manual_seed(1)
    expected = logits_of(model(input_ids=tokens, **without_cache(model)))
    torch.manual_seed(1)
    with head.capture() as seen:
        empty = logits_of(model(input_ids=tokens, **without_cache(model)))
    assert empty.numel() == 0, "the model computed logits"
    z = final_logits(seen.hidden, head.weight, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap)
    return float((z - expected).abs().max() / expected.std())


def table(rows: list[Row]) -> str:
    """Return the text of docs/families.md."""
    count = Counter(row.outcome for row in rows)
    listed = [row for row in rows if row.outcome == "hidden states"]
    rest = [row for row in rows if row.outcome != "hidden states"]
    return "\n".join(
        [
            "# Model families",
            "",
            f"Every causal language model type of transformers {transformers.__version__}, built tiny with random",
            "weights and run on the CPU. Written by `pytest -m families`.",
            "",
            f"Of {len(rows)} types, {count['hidden states']} are scored from hidden states, without logits;",
            f"{count['own logits']} from the model's own full logits, with a warning; {count['refused']} are refused,",
            f"because a token's reward would not be defined; {count['not built']} could not be built here.",
            "",
            "h is the input of the model's output embedding, W and b are its weight and bias, and other names are",
            "fields of the model's config. softcap(y, c) = c tanh(y / c), or y where c is null.",
            "",
            "| Model type | Class | Final logits |",
            "|---|---|---|",
            *(f"| {row.model_type} | {row.name} | `{row.recipe}` |" for row in listed),
            "",
            "| Model type | Class | | Why |",
            "|---|---|---|---|",
            *(f"| {row.model_type} | {row.name} | {row.outcome} | {row.note} |" for row in rest),
            "",
        ]
    )


def main() -> None:
    transformers.logging.set_verbosity_error()
    rows = []
    for model_type in CLASSES:
        rows.append(examine(model_type))
        print(f"{model_type:28} {rows[-1].outcome:14} {rows[-1].recipe or rows[-1].note}")
    TABLE.write_text(table(rows))
    print(dict(Counter(row.outcome for row in rows)), "largest error", max(row.error or 0 for row in rows))


if __name__ == "__main__":
    main()
