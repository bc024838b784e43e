"""The report as Markdown."""

from .compile import Row

HEAD = """\
# Registers, spills, shared memory and loads of each kernel

The kernels were compiled ahead of time and not run, so no figure is a time. Each row is a launch that a public call
makes, with the types and the alignment of its arguments.

- call: logits, linear, or chunked (a linear head through a workspace)
- form: full computes entropy and mean, with bias and softcap for a linear head
- aligned: whether pitches are multiples of 16 bytes
- programs: how many fit on one processor (SM, CU), given registers, shared memory and warps
- load, store: bytes that one lane moves in one instruction, of the accesses to global memory that move most;
  TMA: the big operands are copied in bulk
- exp, fp32, select: instructions of that kind per logit of a thread, with rare branches (last tile, target)
"""


def markdown(rows: list[Row]) -> str:
    table = [_cells(r) for r in rows]
    names = list(table[0]) if table else []
    lines = [HEAD, _line(names), "|---" * len(names) + "|"]
    return "\n".join(lines + [_line(cells.values()) for cells in table]) + "\n"


def _cells(r: Row) -> dict:
    return {
        "kernel": r.kernel, "call": r.source, "arch": r.arch, "dtype": r.dtype, "form": "full" if r.full else "plain",
        "aligned": "yes" if r.aligned else "no", "tile": r.tile, "warps": r.warps, "registers": r.registers,
        "spilled bytes": r.spill_bytes, "shared KiB": f"{r.shared_kib:.0f}", "programs": r.programs,
        "tensor-core ops": r.tensor_core_ops, "load": "TMA" if r.tma else r.load_bytes, "store": r.store_bytes,
        "exp": r.exp, "fp32": r.fp32, "select": r.select,
    }  # fmt: skip


def _line(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
