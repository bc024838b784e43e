"""The targets of the GPU path, each with what a run measured: read from its records, never typed in."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.harness import shapes
from bench.harness.peers import OURS


@dataclass(frozen=True)
class Target:
    """`field` of the best of our peers in cases of one subject; `best` says whether that is the least or the most."""

    what: str
    subject: str
    shape: str
    rows: int
    field: str
    limit: float
    unit: str
    best: Callable = min
    peers: tuple[str, ...] = (OURS,)  # beginnings of the names of peers that count
    scale: float = 1.0

    def met(self, measured: float) -> bool:
        return measured <= self.limit if self.best is min else measured >= self.limit


def _forward(shape: str, limit: float) -> Target:
    what = f"linear forward, D={shapes.find(shape).hidden}, N=8192, V=151936, against torch.mm"
    return Target(what, "linear", shape, 8192, "ratio", limit, "x")


TARGETS = (
    _forward("qwen3-8b", 1.05),
    _forward("qwen3-1.7b", 1.05),
    _forward("qwen3-0.6b", 1.15),
    Target("logits forward, share of the measured copy", "logits", "qwen3-0.6b", 8192, "of_ceiling", 0.9, "", max),
    Target(
        "forward + backward, H=4096, V=128256, 4096 tokens", "linear forward+backward", "llama3-8b", 4096, "median_s",
        16.8, "ms", scale=1e3,
    ),
    Target(
        "extra memory of the fused forward, D=4096, N=8192", "linear", "qwen3-8b", 8192, "extra_mib", 32.0, "MiB",
        peers=(f"{OURS}, fused",),
    ),
)  # fmt: skip


def records(folder: Path) -> Iterator[dict]:
    """Yield every measured case of a run, with the group that measured it."""
    for file in sorted(folder.glob("gpu-*.json")):
        for case in json.loads(file.read_text())["cases"]:
            if "peers" in case:
                yield case | {"group": file.stem}


def measured(target: Target, cases: list[dict]) -> tuple[float, str] | None:
    """Return (value, "peer, group") of the best of our peers, or None if no case of the target was measured."""
    found = [
        (peer[target.field] * target.scale, f"{name.removeprefix(OURS + ', ')}, {case['group']}")
        for case in cases
        if (case["subject"], case["shape"], case["rows"]) == (target.subject, target.shape, target.rows)
        for name, peer in case["peers"].items()
        if name.startswith(target.peers) and peer[target.field] is not None
    ]
    return target.best(found) if found else None


def table(folder: Path) -> str:
    """Return the table of targets as Markdown."""
    cases = list(records(folder))
    lines = ["| target | limit | measured | by | met |", "|---|---|---|---|---|"]
    for target in TARGETS:
        limit = f"{'at most' if target.best is min else 'at least'} {target.limit:g} {target.unit}".rstrip()
        best = measured(target, cases)
        if best is None:
            lines.append(f"| {target.what} | {limit} | not measured | | |")
        else:
            value, by = best
            met = "yes" if target.met(value) else "NO"
            lines.append(f"| {target.what} | {limit} | {value:.3g} {target.unit} | {by} | {met} |".replace("  ", " "))
    return "\n".join(lines)
