"""The cost of scoring, by formula.

A multiplication and an addition are 2 flops. D is the hidden size, L the number of layers, H and K the numbers of query
and key-value heads, d the size of a head, F the width of the MLP (with experts: E of width F, k of them active), V the
vocabulary, T the tokens of a row, N the tokens of a batch, n the states that the head reads:

    body    2 N L (2 D d (H + K) + 3 D F)          with experts, D E + k 3 D F instead of 3 D F
            + 4 N L d H (keys that a token sees)   on average (T + 1) / 2 keys, fewer with a sliding window
    head    2 n D V                                n = scored tokens, plus one for each row that is cut short

The formulas leave out norms, rotary embeddings, softmax, activations, biases and the embedding lookup, O(N D L) in all.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

FLOAT32, BF16 = 4, 2
WIRE_FLOATS = 6
"""float32 numbers that each vocabulary shard sends for a row (endoreward_fast.vocab.sharded.Shards)"""
TILE, PIECE = 32 << 20, 2048
"""bytes of a tile of logits, and vocabulary entries for which a row keeps two float32 numbers (vocab/workspace.py)"""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a causal language model with pre-norm blocks of attention and a gated MLP, or experts of such MLPs."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """width of the MLP, or of one expert"""
    vocab: int
    tied: bool = False
    """whether head and embedding share their weight"""
    window: int | None = None
    windowed: int = 0
    """number of layers in which a token attends to at most `window` tokens, itself included"""
    experts: int = 0
    active: int = 0
    """number of experts for each token"""

    @property
    def attention_weights(self) -> int:
        """Number of weights in the four projections of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """Number of weights in all matrices, including the embedding."""
        return self.body_weights() + (1 if self.tied else 2) * self.head_weights

    def body_weights(self, experts: float | None = None) -> int:
        """Number of weights in the matrices of all layers, with `experts` experts in each (default: all)."""
        one = 3 * self.hidden * self.mlp
        mlp = (
            one
            if not self.experts
            else self.hidden * self.experts + (self.experts if experts is None else experts) * one
        )
        return round(self.layers * (self.attention_weights + mlp))

    @property
    def active_weights(self) -> int:
        """Number of weights that one token is multiplied by, before the head."""
        return self.body_weights(self.active)

    def experts_met(self, tokens: int) -> float:
        """Mean number of a layer's experts that at least one of the tokens uses, if all are equally likely."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens) if self.experts else 0.0


# Sizes from each model's config.json, as given in LitGPT's litgpt/config.py and, for Qwen3, in slime's scripts.
# Llama-3.1-405B has 8 key-value heads: its 405.8e9 parameters rule out 16, which would give 410e9.
MODELS = (
    Decoder("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, tied=True),
    Decoder("Gemma-3-1B", 26, 1152, 4, 1, 256, 6912, 262144, tied=True, window=512, windowed=22),
    Decoder("Qwen2.5-1.5B", 28, 1536, 12, 2, 128, 8960, 151936, tied=True),
    Decoder("Qwen2.5-7B", 28, 3584, 28, 4, 128, 18944, 152064),
    Decoder("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Decoder("Gemma-2-9B", 42, 3584, 16, 8, 256, 14336, 256000, tied=True, window=4096, windowed=21),
    Decoder("Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, experts=128, active=8),
    Decoder("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256),
    Decoder("Llama-3.1-405B", 126, 16384, 128, 8, 128, 53248, 128256),
)


def find(name: str) -> Decoder:
    return next(model for model in MODELS if model.name == name)


UNDERSTOOD = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
)


def of_config(config: Any, name: str | None = None) -> Decoder:
    """Read the sizes from a transformers config. ValueError for a family whose layers the formulas do not describe."""
    config = config.get_text_config(decoder=True)
    if config.model_type not in UNDERSTOOD:
        raise ValueError(f"model_type {config.model_type!r}: the formulas cover only {', '.join(UNDERSTOOD)}")
    experts = getattr(config, "num_local_experts", None) or 0
    if experts and (getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1):
        raise ValueError("some layers without experts: the formulas cover only models with experts in every layer")
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windowed = kinds.count("sliding_attention") if kinds else config.num_hidden_layers if window else 0
    return Decoder(
        name or config.model_type, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        (getattr(config, "moe_intermediate_size", None) if experts else None) or config.intermediate_size,
        config.vocab_size, bool(config.tie_word_embeddings), window if windowed else None, windowed,
        experts, config.num_experts_per_tok if experts else 0,
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, scored together."""

    rows: int
    length: int
    """tokens of a row, including padding"""
    scored: int
    """tokens of a row with a reward; the first token has none"""
    cut: bool = False
    """whether rows were cut short, so that the last token also needs V(s')"""

    def __post_init__(self) -> None:
        if not 0 <= self.scored < self.length:
            raise ValueError(f"scored={self.scored}: expected 0 to {self.length - 1} for rows of {self.length} tokens")

    @property
    def described(self) -> str:
        return f"{self.rows} rows of {self.length} tokens, {self.scored} of them scored"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def states(self) -> int:
        """Number of states that the head reads: one before each scored token, and one after each row cut short."""
        return self.rows * (self.scored + (self.cut and self.scored > 0))


@dataclass(frozen=True)
class Cost:
    """Flops and bytes of one batch on one rank."""

    projections: int
    """flops of the body's matrices"""
    attention: int
    """flops of queries times keys and of attention weights times values"""
    head: int
    """flops of the head"""
    weight_bytes: int
    """bytes of the weights of body and head, read once for each batch"""
    head_bytes: int
    """bytes of the head's weight"""
    activation_bytes: int
    """approximate peak in the body: the residual, its norm, and three activations of the MLP's width"""
    eager_bytes: int
    """bytes of the float32 logits of every position: `model(ids).logits.float()`"""
    workspace_bytes: int
    """bytes that replace the logits on a GPU with impl="chunked"; "fused" needs only the partial sums, no tile"""
    wire_bytes: int
    """bytes that this rank sends, if the vocabulary is sharded"""

    @property
    def body(self) -> int:
        return self.projections + self.attention

    @property
    def head_share(self) -> float:
        """The head's share of all flops."""
        return self.head / (self.body + self.head)


def cost(
    model: Decoder, batch: Batch, *, element: int = BF16, ranks: int = 1, shards: int = 1, dense: bool = False
) -> Cost:  # fmt: skip
    """Compute the cost of scoring a batch on one of `ranks` ranks that share its rows, with the head in `shards`.

    element   bytes of a weight and of an activation
    dense     count attention over the whole square, as kernels without mask support and flop counters do
    """
    mine = replace(batch, rows=ceil(batch.rows / ranks))
    vocab = ceil(model.vocab / shards)
    body_weights = model.body_weights(model.experts_met(mine.tokens))
    width = model.active * (model.hidden + 3 * model.mlp) if model.experts else 3 * model.mlp
    left_behind = 2 * FLOAT32 * mine.states * ceil(vocab / PIECE)
    return Cost(
        projections=2 * mine.tokens * model.active_weights,
        attention=_attention(model, mine, dense),
        head=2 * mine.states * model.hidden * vocab,
        weight_bytes=element * (body_weights + model.hidden * vocab),
        head_bytes=element * model.hidden * vocab,
        activation_bytes=element * mine.tokens * (2 * model.hidden + width),
        eager_bytes=FLOAT32 * mine.tokens * model.vocab,
        workspace_bytes=min(TILE, FLOAT32 * mine.states * vocab) + left_behind,
        wire_bytes=FLOAT32 * WIRE_FLOATS * mine.states if shards > 1 else 0,
    )


def _attention(model: Decoder, batch: Batch, dense: bool) -> int:
    def pairs(window: int | None) -> int:
        """Number of (query, key) pairs in one row."""
        length = batch.length
        if dense:
            return length * length
        near = min(length, window or length)
        return near * (near + 1) // 2 + (length - near) * near

    layers = model.windowed * pairs(model.window) + (model.layers - model.windowed) * pairs(None)
    return 4 * batch.rows * layers * model.heads * model.head_dim
