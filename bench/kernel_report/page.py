"""The report as Markdown."""

from .compile import Row
from .gates import gates
from .host import CallCost

HEAD = """\
# What the machine code of each kernel shows

The kernels were compiled ahead of time and not run, so no figure of theirs is a time. Each row is a launch that a
public call makes, with the types and the alignment of its arguments.

- call: logits, linear, chunked (a linear head through a workspace), or divergence (of two stored logits)
- form: full computes entropy and mean, with bias and softcap for a linear head; of a divergence it is JSD, else KL
- aligned: whether pitches are multiples of 16 bytes
- auto: whether impl="auto" launches it
- programs: how many fit on one processor (SM, CU), given registers, shared memory and warps
- load, store: bytes that one lane moves in one instruction, of the accesses to global memory that move most;
  TMA: the big operands are copied in bulk
- exp, fp32, select: instructions of that kind per logit of a thread, with rare branches (last tile, target)
- wavefronts: cycles of shared memory per FFMA of a warp, at least; above 0.25 shared memory takes longer than the FFMAs
- barriers: of a vocabulary tile, before + in each step over D + after the last step
- waits: for wgmma instructions in a step over D, and the number of these
"""
CALLS = """\
## Public calls

Launches and host time of a call on a stand-in for an H100: (2, 32) rows, bf16. Each operator of torch that is neither a
view nor an allocation counts as one launch. Host time is processor time with Triton's launches stubbed, in
microseconds (median, quartiles); torch.add of 16 numbers in the same run is the yardstick. masked: with a mask and
entropy.
"""


def markdown(rows: list[Row], calls: list[CallCost]) -> str:
    failures = gates(rows, calls)
    parts = [HEAD, _table([_row(r) for r in rows]), CALLS, _table([_call(c) for c in calls]), "## Gates\n"]
    parts.append("\n".join(f"- {line}" for line in failures) if failures else "Every gate holds.")
    return "\n".join(parts) + "\n"


def _row(r: Row) -> dict:
    return {
        "kernel": r.kernel, "call": r.source, "arch": r.arch, "dtype": r.dtype, "form": "full" if r.full else "plain",
        "aligned": _yes(r.aligned), "auto": _yes(r.auto), "tile": r.tile, "warps": r.warps, "registers": r.registers,
        "spilled bytes": r.spill_bytes, "shared KiB": f"{r.shared_kib:.0f}", "programs": r.programs,
        "tensor-core ops": r.tensor_core_ops, "load": "TMA" if r.tma else r.load_bytes, "store": r.store_bytes,
        "exp": r.exp, "fp32": r.fp32, "select": r.select, "wavefronts": r.wavefronts_per_ffma or "",
        "barriers": f"{r.fill_barriers}+{r.step_barriers}+{r.tile_barriers}" if r.kernel.startswith("linear") else "",
        "waits": f"{r.waits}/{r.wgmmas}" if r.wgmmas else "",
    }  # fmt: skip


def _call(c: CallCost) -> dict:
    low, high = c.host_us_quartiles
    return {
        "call": c.call, "form": c.form, "launches": c.launches, "of Triton": c.triton, "of torch": c.torch,
        "reads back": c.read_backs, "host": f"{c.host_us:.0f} ({low:.0f}, {high:.0f})", "torch.add": c.add_us,
    }  # fmt: skip


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _table(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), *(row.values() for row in rows)]
    text = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    return "\n".join([text[0], "|---" * len(rows[0]) + "|", *text[1:]]) + "\n"
