"""The forward of linear_vocab_stats.py for Hopper, in Gluon: the program says which warps do what, and when.

A program has three partitions: `produce` (one warp) issues bulk tensor copies, and two consumers (one warpgroup each)
multiply and summarise 64 tokens each. README.md draws the schedule. hopper_vocab_stats.py launches it.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .linear_vocab_stats import token_tile_and_split
from .primitives import NEG_INF, SUM_SCALE, apply_head, finite_or_zero, merge, tanh, weight_and_exponent

# Triton 3.9 renamed the copy.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

CONSUMER_N = gl.constexpr(64)  # tokens of one consumer: the rows of a wgmma
CONSUMERS = gl.constexpr(2)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Return the next place in the ring of stages. The phase flips when the ring starts again."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def produce(
    hidden, weight, h_ring, w_ring, full, empty, n_rows, vocab, dim,
    BLOCK_V: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Fill the ring with tiles of hidden and weight, in the order in which the consumers read them."""
    STAGES: gl.constexpr = h_ring.shape[0]
    BLOCK_N: gl.constexpr = h_ring.shape[1]
    BLOCK_D: gl.constexpr = h_ring.shape[2]
    splits = gl.cdiv(vocab, SPLIT)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for work in range(gl.program_id(0), gl.cdiv(n_rows, BLOCK_N) * splits, gl.num_programs(0)):
        tile, split = token_tile_and_split(work, n_rows, splits, BLOCK_N, GROUP)
        for o_v in range(split * SPLIT, gl.minimum((split + 1) * SPLIT, vocab), BLOCK_V):
            for o_d in range(0, dim, BLOCK_D):
                for consumer in gl.static_range(CONSUMERS):
                    mbarrier.wait(empty.index(consumer * STAGES + stage), phase ^ 1)
                arrived = full.index(stage)
                mbarrier.expect(arrived, hidden.block_type.nbytes + weight.block_type.nbytes)
                copy_tile(hidden, [tile * BLOCK_N, o_d], arrived, h_ring.index(stage))
                copy_tile(weight, [o_v, o_d], arrived, w_ring.index(stage))
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def logits_tile(h_ring, w_ring, full, empty, stage, phase, steps, CONSUMER: gl.constexpr, LOGITS: gl.constexpr):
    """Return hidden @ weight.T as (CONSUMER_N, BLOCK_V) fp32, and the next place in the ring.

    One wgmma group stays in flight. A stage is handed back when the group after it has been issued.
    """
    STAGES: gl.constexpr = h_ring.shape[0]
    BLOCK_V: gl.constexpr = w_ring.shape[1]
    acc = gl.zeros([CONSUMER_N, BLOCK_V], gl.float32, LOGITS)
    acc, before = multiply(h_ring, w_ring, full, stage, phase, acc, False, CONSUMER), stage
    for _ in range(1, steps):
        stage, phase = advance(stage, phase, STAGES)
        acc = multiply(h_ring, w_ring, full, stage, phase, acc, True, CONSUMER)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        mbarrier.arrive(empty.index(CONSUMER * STAGES + before))
        before = stage
    z = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(CONSUMER * STAGES + before))
    stage, phase = advance(stage, phase, STAGES)
    return z, stage, phase


@gluon.jit
def multiply(h_ring, w_ring, full, stage, phase, acc, use_acc, CONSUMER: gl.constexpr):
    """Wait for a stage and issue its wgmmas: acc (+)= hidden (64, BLOCK_D) @ weight (BLOCK_V, BLOCK_D).T."""
    mbarrier.wait(full.index(stage), phase)
    h = h_ring.index(stage).slice(CONSUMER * CONSUMER_N, CONSUMER_N)
    return warpgroup_mma(h, w_ring.index(stage).permute((1, 0)), acc, use_acc=use_acc, is_async=True)


@gluon.jit
def consume(
    h_ring, w_ring, full, empty, bias, targets, p_m, p_s, p_t, p_u, p_target,
    n_rows, vocab, dim, logit_scale, softcap, c,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    ENTROPY: gl.constexpr, LOGIT_MEAN: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr,
    LEAD: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Summarise 64 tokens of every piece of work: the epilogue of linear_partials_kernel."""
    STAGES: gl.constexpr = h_ring.shape[0]
    BLOCK_N: gl.constexpr = h_ring.shape[1]
    BLOCK_D: gl.constexpr = h_ring.shape[2]
    BLOCK_V: gl.constexpr = w_ring.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    FLAT: gl.constexpr = gl.BlockedLayout([BLOCK_V // 128], [32], [4], [0])
    splits = gl.cdiv(vocab, SPLIT)
    ragged = vocab // BLOCK_V * BLOCK_V  # where the tile starts that has columns outside the vocabulary, if one has
    steps = gl.cdiv(dim, BLOCK_D)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for work in range(gl.program_id(0), gl.cdiv(n_rows, BLOCK_N) * splits, gl.num_programs(0)):
        tile, split = token_tile_and_split(work, n_rows, splits, BLOCK_N, GROUP)
        row = tile * BLOCK_N + CONSUMER * CONSUMER_N + gl.arange(0, CONSUMER_N, ROWS)
        m_row = row < n_rows
        start = split * SPLIT
        end = gl.minimum(start + SPLIT, vocab)
        target = gl.load(targets + row, mask=m_row, other=-1)
        m_hit = (target >= start) & (target < end)
        target = gl.where(m_hit, target, -1).to(gl.int32)
        # One bit for each vocabulary tile of the split that holds a target: most tiles hold none.
        tiles_hit = gl.reduce_or(gl.where(m_hit, 1 << ((target - start) // BLOCK_V), 0), 0)

        m = gl.full([CONSUMER_N], NEG_INF, gl.float32, ROWS)
        s = gl.zeros([CONSUMER_N], gl.float32, ROWS)
        t = gl.zeros([CONSUMER_N], gl.float32, ROWS)
        u = gl.zeros([CONSUMER_N], gl.float32, ROWS)
        for o_v in range(start, end, BLOCK_V):
            if CONSUMER == 1 and LEAD > 0:
                ahead = stage + gl.minimum(LEAD, steps) - 1
                wrapped = ahead >= STAGES
                ahead = gl.where(wrapped, ahead - STAGES, ahead)
                mbarrier.wait(empty.index(ahead), phase ^ wrapped.to(gl.int32))
            z, stage, phase = logits_tile(h_ring, w_ring, full, empty, stage, phase, steps, CONSUMER, LOGITS)
            col = o_v + gl.arange(0, BLOCK_V, gl.SliceLayout(0, LOGITS))
            b_bias = 0.0
            if HAS_BIAS:
                flat = o_v + gl.arange(0, BLOCK_V, FLAT)
                b_bias = gl.load(bias + flat, mask=flat < vocab, other=0.0).to(gl.float32)
                b_bias = gl.convert_layout(b_bias, gl.SliceLayout(0, LOGITS))[None, :]
            z = apply_head(z, b_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, False)
            if HAS_SOFTCAP:
                z = softcap * gl.map_elementwise(tanh, z * (1.0 / softcap))
            if LOGIT_MEAN:  # columns outside the vocabulary are 0: the copies fill with zeros, and tanh(0) = 0
                u += gl.sum(z * SUM_SCALE, 1)
            hit = (tiles_hit >> ((o_v - start) // BLOCK_V)) & 1
            if (o_v == ragged) | (hit != 0):
                m_here = (target >= o_v) & (target < o_v + BLOCK_V)
                gl.store(p_target + row, gl.sum(gl.where(col[None, :] == target[:, None], z, 0.0), 1), mask=m_here)
                z = gl.where((col < vocab)[None, :], z, NEG_INF)

            b_m = gl.max(z, 1)
            e, d = weight_and_exponent(z, finite_or_zero(b_m)[:, None], c)
            b_t = t
            if ENTROPY:
                b_t = gl.sum(e * d, 1)
            m, s, t = merge(m, s, t, b_m, gl.sum(e, 1), b_t, c, ENTROPY)

        o = split.to(gl.int64) * n_rows + row
        gl.store(p_m + o, m, mask=m_row)
        gl.store(p_s + o, s, mask=m_row)
        if ENTROPY:
            gl.store(p_t + o, t, mask=m_row)
        if LOGIT_MEAN:
            gl.store(p_u + o, u, mask=m_row)


@gluon.jit(do_not_specialize=["n_rows", "vocab", "dim"])
def hopper_partials_kernel(
    hidden, weight, bias, targets, p_m, p_s, p_t, p_u, p_target,
    n_rows, vocab, dim, logit_scale, softcap, c,
    HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    ENTROPY: gl.constexpr, LOGIT_MEAN: gl.constexpr,
    SPLIT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    BLOCK_V: gl.constexpr = weight.block_type.shape[0]
    h_ring = gl.allocate_shared_memory(hidden.dtype, [STAGES] + hidden.block_type.shape, hidden.layout)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(CONSUMERS * STAGES):
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()  # before the copies signal the barriers

    gl.warp_specialize(
        [
            (consume, (
                h_ring, w_ring, full, empty, bias, targets, p_m, p_s, p_t, p_u, p_target,
                n_rows, vocab, dim, logit_scale, softcap, c,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ENTROPY, LOGIT_MEAN, SPLIT, GROUP, LEAD, 0,
            )),
            (consume, (
                h_ring, w_ring, full, empty, bias, targets, p_m, p_s, p_t, p_u, p_target,
                n_rows, vocab, dim, logit_scale, softcap, c,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ENTROPY, LOGIT_MEAN, SPLIT, GROUP, LEAD, 1,
            )),
            (produce, (hidden, weight, h_ring, w_ring, full, empty, n_rows, vocab, dim, BLOCK_V, SPLIT, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
