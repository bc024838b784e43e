"""Kernels and calls with one planted loss each, and their sound twins: what the gates of the kernel report say of them.

Run as a script, because in a process of the tests Triton may be the interpreter. Prints {name: failures} as JSON.
"""

import json

import torch
import triton
import triton.language as tl

from bench.kernel_report.calls import Call, Planned
from bench.kernel_report.compile import compile_row
from bench.kernel_report.gates import gates
from bench.kernel_report.host import ARCH, cost
from bench.kernel_report.stand_in import on_device, recorded


@triton.jit
def row_sum(logits, out, stride, BLOCK: tl.constexpr):
    z = tl.load(logits + tl.program_id(0) * stride + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(z, 0))


@triton.jit
def logits_wide_kernel(logits, out, stride, BLOCK: tl.constexpr):
    row_sum(logits, out, stride, BLOCK)


@triton.jit(do_not_specialize=["stride"])
def logits_narrow_kernel(logits, out, stride, BLOCK: tl.constexpr):
    row_sum(logits, out, stride, BLOCK)


@triton.jit
def linear_kernel(
    hidden, weight, targets, out, vocab, dim, stride,
    SEARCH: tl.constexpr, RESCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    target = tl.load(targets + row)
    best = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    for o_v in range(0, vocab, BLOCK_V):
        col = o_v + tl.arange(0, BLOCK_V)
        acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for o_d in range(0, dim, BLOCK_D):
            h = tl.load(hidden + row[:, None] * stride + o_d + k[None, :])
            w = tl.load(weight + col[:, None] * stride + o_d + k[None, :])
            acc = tl.dot(h, w.T, acc, input_precision="ieee")
            if RESCALE:  # the accumulator is read in each step
                acc *= 0.5
        if SEARCH:  # noqa: SIM102 - a constexpr; then a maximum over rows, which different warps hold
            if tl.max((target >= o_v).to(tl.int32), 0) > 0:
                best = tl.maximum(best, tl.sum(tl.where(col[None, :] == target[:, None], acc, 0.0), 1))
        best = tl.maximum(best, tl.max(acc, 1))
    tl.store(out + row, best)


def row_kernel(kernel):
    logits, out = torch.empty(4, 8192, dtype=torch.bfloat16), torch.empty(4)
    kernel[(4,)](logits, out, logits.stride(0), BLOCK=8192, num_warps=8)


def linear(dtype=torch.bfloat16, search=False, rescale=False, tile=128, block_d=64, warps=8):
    hidden, weight = torch.empty(256, 256, dtype=dtype), torch.empty(512, 256, dtype=dtype)
    linear_kernel[(1,)](
        hidden, weight, torch.empty(256, dtype=torch.long), torch.empty(256), 512, 256, 256,
        SEARCH=search, RESCALE=rescale, BLOCK_N=tile, BLOCK_V=tile, BLOCK_D=block_d, num_warps=warps, num_stages=3,
    )  # fmt: skip


KERNELS = {
    "wide loads": lambda: row_kernel(logits_wide_kernel),
    "narrow loads": lambda: row_kernel(logits_narrow_kernel),
    "spill": lambda: linear(tile=256, warps=4),  # 512 accumulators a thread
    "sound matmul": lambda: linear(),
    "barriers": lambda: linear(search=True),
    "waits": lambda: linear(rescale=True, block_d=16),
    "bank conflicts": lambda: linear(dtype=torch.float32, tile=64, block_d=16, warps=16),
}
A = torch.zeros(8)
CALLS = {"few launches": lambda: A + A, "many launches": lambda: [A + A for _ in range(7)], "read-back": A.nonzero}


def main() -> None:
    said = {}
    for name, call in KERNELS.items():
        with on_device(ARCH), recorded() as launches:
            call()
        dtype = "fp32" if name == "bank conflicts" else "bf16"
        row = compile_row(Planned(Call("planted", ARCH, dtype, full=False), launches[0], auto=True))
        said[name] = gates([row], [])
    for name, call in CALLS.items():
        said[name] = gates([], [cost(name, "planted", call)])
    print(json.dumps(said))


if __name__ == "__main__":
    main()
