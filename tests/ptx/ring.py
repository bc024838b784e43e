"""A small Gluon kernel with specialised warps: a producer fills a ring of stages, two consumers multiply from it.

out (128 x 64) = a (128 x K) @ b (64 x K)^T in bf16. Each consumer has four warps and computes 64 rows. A stage is full
when its bulk copies have landed, and empty when both consumers have arrived.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name before Triton 3.9


@gluon.jit
def produce(a, b, a_ring, b_ring, full, empty, steps, STAGES: gl.constexpr, MISTAKE: gl.constexpr, copy: gl.constexpr):
    for k in range(steps):
        stage = k % STAGES
        turn = k // STAGES
        if MISTAKE == "the producer waits for the other phase":
            mbarrier.wait(empty.index(stage), turn & 1)
        elif MISTAKE != "the producer does not wait":
            mbarrier.wait(empty.index(stage), (turn & 1) ^ 1)
        if MISTAKE == "too many bytes are announced":
            mbarrier.expect(full.index(stage), 4 * 64 * 64 * 2)
        else:
            mbarrier.expect(full.index(stage), 3 * 64 * 64 * 2)
        copy(a, [0, k * 64], full.index(stage), a_ring.index(2 * stage))
        copy(a, [64, k * 64], full.index(stage), a_ring.index(2 * stage + 1))
        copy(b, [0, k * 64], full.index(stage), b_ring.index(stage))


@gluon.jit
def consume(
    half: gl.constexpr, out, a_ring, b_ring, full, empty, steps, STAGES: gl.constexpr, MISTAKE: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    product = gl.zeros([64, 64], gl.float32, layout)
    for k in range(steps):
        stage = k % STAGES
        if MISTAKE == "a consumer waits for the other phase":
            mbarrier.wait(full.index(stage), ((k // STAGES) & 1) ^ 1)
        elif MISTAKE != "a consumer does not wait":
            mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        a, b = a_ring.index(2 * stage + half), b_ring.index(stage).permute((1, 0))
        product = warpgroup_mma(a, b, product, is_async=True)
        if MISTAKE == "a stage is given back while it is read":
            mbarrier.arrive(empty.index(stage))
        product = warpgroup_mma_wait(0, deps=[product])
        if MISTAKE != "a stage is given back while it is read":  # noqa: SIM102  Triton: one `if` for each constexpr
            if MISTAKE != "one consumer never gives a stage back" or half == 0:
                mbarrier.arrive(empty.index(stage))
    row = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    gl.store(out + row[:, None] * 64 + column[None, :], product)


@gluon.jit
def upper(out, a_ring, b_ring, full, empty, steps, STAGES: gl.constexpr, MISTAKE: gl.constexpr):
    consume(0, out, a_ring, b_ring, full, empty, steps, STAGES, MISTAKE)


@gluon.jit
def lower(out, a_ring, b_ring, full, empty, steps, STAGES: gl.constexpr, MISTAKE: gl.constexpr):
    consume(1, out, a_ring, b_ring, full, empty, steps, STAGES, MISTAKE)


@gluon.jit
def ring_kernel(a, b, out, steps, STAGES: gl.constexpr, MISTAKE: gl.constexpr, copy: gl.constexpr):
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, 64], a.layout)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (upper, (out, a_ring, b_ring, full, empty, steps, STAGES, MISTAKE)),
            (lower, (out, a_ring, b_ring, full, empty, steps, STAGES, MISTAKE)),
            (produce, (a, b, a_ring, b_ring, full, empty, steps, STAGES, MISTAKE, copy)),
        ],
        [4, 1],
        [152, 32],
    )


def ring_product(a: torch.Tensor, b: torch.Tensor, *, stages: int = 3, mistake: str = "none") -> torch.Tensor:
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    maps = [TensorDescriptor.from_tensor(x, [64, 64], layout) for x in (a, b)]
    out = torch.zeros(128, 64)
    ring_kernel[(1,)](*maps, out, a.shape[1] // 64, stages, mistake, copy, num_warps=4)
    return out
