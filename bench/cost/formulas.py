"""What scoring costs, by formula.

A multiplication with its addition is 2 flops. D hidden, L layers, H query and K key-value heads of d, F the MLP's width
(E experts of F, k of them active), V vocabulary, T tokens a row, N tokens a batch, n states read by the head:

    body    2 N L (2 D d (H + K) + 3 D F)          with experts D E + k 3 D F in place of 3 D F
            + 4 N L d H (keys that a token sees)   on average (T + 1) / 2, or less where a window slides
    head    2 n D V                                n = scored tokens, and one more for each row that is cut short

Left out: norms, rotary embeddings, softmax, activations, biases and the embedding's look-up: O(N D L) in all.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

FLOAT32, BF16 = 4, 2
WIRE_FLOATS = 6
"""float32 that each vocabulary shard sends of a row: endoreward_fast.vocab.sharded.Shards"""
TILE, PIECE = 32 << 20, 2048
"""bytes of logits at a time, and vocabulary entries that leave two float32 a row behind: vocab/workspace.py"""


@dataclass(frozen=True)
class Decoder:
    """Sizes of one causal language model: pre-norm blocks of attention and a gated MLP, or experts of them."""

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
    """whether the head is the embedding"""
    window: int | None = None
    windowed: int = 0
    """layers whose attention sees no further back than `window` tokens, itself included"""
    experts: int = 0
    active: int = 0
    """experts that a token goes through"""

    @property
    def attention_weights(self) -> int:
        """Of one layer's four projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """All matrices, the embedding's included."""
        return self.body_weights() + (1 if self.tied else 2) * self.head_weights

    def body_weights(self, experts: float | None = None) -> int:
        """Matrices of all layers, `experts` of each layer counted (default: all)."""
        one = 3 * self.hidden * self.mlp
        mlp = (
            one
            if not self.experts
            else self.hidden * self.experts + (self.experts if experts is None else experts) * one
        )
        return round(self.layers * (self.attention_weights + mlp))

    @property
    def active_weights(self) -> int:
        """Matrices that one token is multiplied by, before the head."""
        return self.body_weights(self.active)

    def experts_met(self, tokens: int) -> float:
        """Experts of a layer that at least one of the tokens goes to, on average, if every expert is as likely."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens) if self.experts else 0.0


# Each model's config.json on the Hugging Face Hub, as LitGPT's litgpt/config.py and, of Qwen3, slime's scripts have it.
# Llama-3.1-405B: 8 key-value heads, as its 405.8e9 parameters say; with 16, as LitGPT once had, they were 410e9.
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
    """A transformers config -> its sizes. ValueError for a family whose layers these formulas do not describe."""
    config = config.get_text_config(decoder=True)
    if config.model_type not in UNDERSTOOD:
        raise ValueError(f"model_type {config.model_type!r}: the formulas are those of {', '.join(UNDERSTOOD)}")
    experts = getattr(config, "num_local_experts", None) or 0
    if experts and (getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1):
        raise ValueError("layers without experts among layers with them: the formulas are for experts in every layer")
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
    """Rows of like length, scored together."""

    rows: int
    length: int
    """tokens of each, padding included"""
    scored: int
    """tokens of each that get a reward; the first can have none"""
    cut: bool = False
    """whether rows were cut short, so that the last token's V(s') is read too"""

    def __post_init__(self) -> None:
        if not 0 <= self.scored < self.length:
            raise ValueError(f"scored={self.scored}: expected 0 to {self.length - 1}, of {self.length} tokens")

    @property
    def described(self) -> str:
        return f"{self.rows} rows of {self.length} tokens, {self.scored} of them scored"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def states(self) -> int:
        """What the head is read at: the state each scored token was chosen in, and that after a row that goes on."""
        return self.rows * (self.scored + (self.cut and self.scored > 0))


@dataclass(frozen=True)
class Cost:
    """Of one batch on one rank. Flops, bytes."""

    projections: int
    """the body's matrices"""
    attention: int
    """queries with keys, weights with values"""
    head: int
    weight_bytes: int
    """read once a batch: the body's and the head's"""
    head_bytes: int
    """the head's part of it"""
    activation_bytes: int
    """that live at once in the body, about: the residual, its norm, three of the MLP's width"""
    eager_bytes: int
    """float32 logits of every position, as `model(ids).logits.float()` makes them"""
    workspace_bytes: int
    """what takes their place on a GPU under impl="chunked"; "fused" has no tile, only what the pieces leave"""
    wire_bytes: int
    """sent by this rank, with the vocabulary in shards"""

    @property
    def body(self) -> int:
        return self.projections + self.attention

    @property
    def head_share(self) -> float:
        """Of all flops."""
        return self.head / (self.body + self.head)


def cost(
    model: Decoder, batch: Batch, *, element: int = BF16, ranks: int = 1, shards: int = 1, dense: bool = False
) -> Cost:  # fmt: skip
    """What scoring a batch takes on each of `ranks` that share its rows, each with a head in `shards`.

    element   bytes of a weight and of an activation
    dense     attention over the whole square, as kernels that know no mask compute it, and as counters count it
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
        """(query, key) pairs of one row."""
        length = batch.length
        if dense:
            return length * length
        near = min(length, window or length)
        return near * (near + 1) // 2 + (length - near) * near

    layers = model.windowed * pairs(model.window) + (model.layers - model.windowed) * pairs(None)
    return 4 * batch.rows * layers * model.heads * model.head_dim
