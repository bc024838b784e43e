"""The requirements on the report. Each gate names what a kernel or a call loses where it fails."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .calls import ROWWISE
from .compile import Row
from .host import CallCost

WIDE = 16  # bytes: the widest load of one lane
FEW = 64  # bytes of spill
MOST_WAVEFRONTS = 0.5  # per FFMA. At 0.25 shared memory takes as long as the multiply-adds
MOST_LAUNCHES = 6  # of one public call


@dataclass(frozen=True)
class Gate:
    applies: Callable[[Any], bool]
    holds: Callable[[Any], bool]
    says: Callable[[Any], str]


ROW_GATES = (
    # 16-bit rows with aligned pitches are the common case and may not spill. The others may spill a little.
    Gate(
        lambda r: True,
        lambda r: r.spill_bytes <= (0 if r.aligned and r.dtype != "fp32" else FEW),
        lambda r: f"spills {r.spill_bytes} bytes",
    ),
    # A lane that loads 2 bytes at a time needs 8 instructions and 8 requests for what one load of 16 bytes brings.
    Gate(
        lambda r: r.kernel.startswith(("logits", "divergence")) and not r.kernel.endswith(ROWWISE) and r.aligned,
        lambda r: r.load_bytes >= WIDE,
        lambda r: f"loads {r.load_bytes} bytes at a time (bytes x loads: {r.loads}), expected {WIDE}",
    ),
    # What "auto" does not launch is reported only: fp32 on CUDA runs faster through a library's matmul.
    Gate(
        lambda r: r.auto and r.wavefronts_per_ffma > 0,
        lambda r: r.wavefronts_per_ffma <= MOST_WAVEFRONTS,
        lambda r: f"takes {r.wavefronts_per_ffma} wavefronts of shared memory per FFMA, expected {MOST_WAVEFRONTS}",
    ),
    # With wgmma each warp holds whole rows, so row sums need no barrier. One frees the stages; a bias costs another.
    Gate(
        lambda r: r.wgmmas > 0,
        lambda r: r.tile_barriers <= 1 + r.full,
        lambda r: f"meets {r.tile_barriers} barriers after each vocabulary tile, expected {1 + r.full}",
    ),
    # A wait after each wgmma leaves the tensor cores idle between them.
    Gate(
        lambda r: r.wgmmas > 0,
        lambda r: 2 * r.waits <= r.wgmmas,
        lambda r: f"waits {r.waits} times for {r.wgmmas} wgmma instructions of a step: they run one by one",
    ),
)
CALL_GATES = (
    Gate(
        lambda c: True,
        lambda c: c.launches <= MOST_LAUNCHES,
        lambda c: f"makes {c.launches} launches ({c.triton} of Triton, {c.torch} of torch), expected {MOST_LAUNCHES}",
    ),
    Gate(
        lambda c: True,
        lambda c: c.read_backs == 0,
        lambda c: f"reads back {c.read_backs} times: the host waits for the GPU, and a CUDA graph cannot capture it",
    ),
)


def gates(rows: list[Row], calls: list[CallCost]) -> list[str]:
    """Return one line for each requirement that a kernel or a call fails."""
    return _failures(rows, ROW_GATES, _row_name) + _failures(calls, CALL_GATES, lambda c: f"{c.call} ({c.form})")


def _failures(things: list, gates: tuple[Gate, ...], name: Callable[[Any], str]) -> list[str]:
    return [f"{name(x)}: {gate.says(x)}" for x in things for gate in gates if gate.applies(x) and not gate.holds(x)]


def _row_name(r: Row) -> str:
    form, pitch = "full" if r.full else "plain", "aligned" if r.aligned else "unaligned"
    return f"{r.kernel} ({r.source}, {r.arch}, {r.dtype}, {form}, {pitch})"
