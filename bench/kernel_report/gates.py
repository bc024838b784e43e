"""The requirements on the report. Each gate names what a kernel loses where it fails."""

from collections.abc import Callable
from dataclasses import dataclass

from .compile import Row

WIDE = 16  # bytes: the widest load of one lane
FEW = 64  # bytes of spill


@dataclass(frozen=True)
class Gate:
    applies: Callable[[Row], bool]
    holds: Callable[[Row], bool]
    says: Callable[[Row], str]


GATES = (
    # 16-bit rows with aligned pitches are the common case and may not spill. The others may spill a little.
    Gate(
        lambda r: True,
        lambda r: r.spill_bytes <= (0 if r.aligned and r.dtype != "fp32" else FEW),
        lambda r: f"spills {r.spill_bytes} bytes",
    ),
    # A lane that loads 2 bytes at a time needs 8 instructions and 8 requests for what one load of 16 bytes brings.
    Gate(
        lambda r: r.kernel.startswith("logits") and r.aligned,
        lambda r: r.load_bytes >= WIDE,
        lambda r: f"loads {r.load_bytes} bytes at a time (bytes x loads: {r.loads}), expected {WIDE}",
    ),
)


def gates(rows: list[Row]) -> list[str]:
    """Return one line for each requirement that a row fails."""
    return [f"{_name(r)}: {gate.says(r)}" for r in rows for gate in GATES if gate.applies(r) and not gate.holds(r)]


def _name(r: Row) -> str:
    form, pitch = "full" if r.full else "plain", "aligned" if r.aligned else "unaligned"
    return f"{r.kernel} ({r.source}, {r.arch}, {r.dtype}, {form}, {pitch})"
