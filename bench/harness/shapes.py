"""Named shapes of real heads, for benchmarks, tests and tuning. Sizes are from each model's config.json."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The head of one model: logits = softcap * tanh(hidden @ weight.T / softcap), weight (vocab, hidden)."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 896, 151936),
        Shape("qwen2.5-1.5b", 1536, 151936),
        Shape("qwen2.5-7b", 3584, 152064),
        Shape("qwen3-0.6b", 1024, 151936),
        Shape("qwen3-1.7b", 2048, 151936),
        Shape("qwen3-4b", 2560, 151936),
        Shape("qwen3-8b", 4096, 151936),
        Shape("llama3.2-1b", 2048, 128256),
        Shape("llama3-8b", 4096, 128256),
        Shape("gemma2-2b", 2304, 256000, softcap=30.0),
        Shape("gemma2-9b", 3584, 256000, softcap=30.0),
        Shape("gemma3-1b", 1152, 262144),
        Shape("gemma3-4b", 2560, 262208),
    )
}
HEADLINE = SHAPES["qwen3-0.6b"]


def find(name: str) -> Shape:
    """Return a model's shape by its name, or any shape by its sizes: "D1024-V32768"."""
    if name in SHAPES:
        return SHAPES[name]
    sizes = re.fullmatch(r"D(\d+)-V(\d+)", name)
    if sizes is None:
        raise KeyError(f"no shape {name!r}: expected one of {', '.join(SHAPES)}, or sizes such as D1024-V32768")
    return Shape(name, int(sizes[1]), int(sizes[2]))


def linear_flops(rows: int, shape: Shape) -> int:
    """Return the flops of hidden @ weight.T: one multiplication and one addition for each (row, hidden, vocab)."""
    return 2 * rows * shape.hidden * shape.vocab


def linear_bytes(rows: int, shape: Shape, element_size: int) -> int:
    """Return the minimum traffic of the linear path: hidden and weight are read once, and no logits."""
    return element_size * shape.hidden * (shape.vocab + rows)


def logits_bytes(rows: int, shape: Shape, element_size: int) -> int:
    """Return the minimum traffic of the logits path: the logits are read once."""
    return element_size * rows * shape.vocab
