"""linear_vocab_stats.py's forward for Hopper, in Gluon, where the program says which warps do what.

A program has three partitions. One warp issues bulk tensor copies (`produce`). Two warpgroups multiply and summarise 64
tokens each (`consume`). README.md draws the schedule, and hopper_vocab_stats.py launches it.
"""

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

copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed in Triton 3.9

CONSUMERS = gl.constexpr(2)
CONSUMER_N = gl.constexpr(64)  # tokens of a consumer: the rows of a wgmma


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Return the next stage of the ring. The phase flips each time the ring starts again."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def produce(
    hidden, weight, h_ring, w_ring, full, empty, n_rows, vocab, dim,
    SPLIT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Copy tiles of hidden and weight into the ring, in the order in which the consumers read them."""
    STAGES: gl.constexpr = h_ring.shape[0]
    BLOCK_N: gl.constexpr = h_ring.shape[1]
    BLOCK_V: gl.constexpr = w_ring.shape[1]
    BLOCK_D: gl.constexpr = w_ring.shape[2]
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
def multiply(h_ring, w_ring, full, stage, phase, acc, use_acc, CONSUMER: gl.constexpr):
    """Wait for a stage and start acc (+)= hidden @ weight.T on it, (64, BLOCK_D) @ (BLOCK_D, BLOCK_V)."""
    mbarrier.wait(full.index(stage), phase)
    h = h_ring.index(stage).slice(CONSUMER * CONSUMER_N, CONSUMER_N)
    return warpgroup_mma(h, w_ring.index(stage).permute((1, 0)), acc, use_acc=use_acc, is_async=True)


@gluon.jit
def logits_tile(h_ring, w_ring, full, empty, stage, phase, steps, CONSUMER: gl.constexpr, LOGITS: gl.constexpr):
    """Return hidden @ weight.T as (64, BLOCK_V) fp32, and the stage after it.

    One matmul stays in flight. A stage is given back once the matmul after it has started.
    """
    STAGES: gl.constexpr = h_ring.shape[0]
    BLOCK_V: gl.constexpr = w_ring.shape[1]
    acc = gl.zeros([CONSUMER_N, BLOCK_V], gl.float32, LOGITS)
    acc = multiply(h_ring, w_ring, full, stage, phase, acc, False, CONSUMER)
    before = stage
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
def let_the_first_lead(empty, stage, phase, steps, STAGES: gl.constexpr, LEAD: gl.constexpr):
    """Wait until consumer 0 has given back LEAD stages of the tile that begins at this stage."""
    ahead = stage + gl.minimum(steps, LEAD) - 1
    again = ahead >= STAGES
    mbarrier.wait(empty.index(gl.where(again, ahead - STAGES, ahead)), phase ^ again.to(gl.int32))


@gluon.jit
def consume(
    h_ring, w_ring, full, empty, bias, targets, rows, partials, p_target,
    n_rows, pitch, vocab, dim, logit_scale, softcap, c,
    HAS_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    ENTROPY: gl.constexpr, LOGIT_MEAN: gl.constexpr,
    SPLIT: gl.constexpr, GROUP: gl.constexpr, LEAD: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Write the partials of this consumer's 64 tokens of each piece of work."""
    STAGES: gl.constexpr = h_ring.shape[0]
    BLOCK_N: gl.constexpr = h_ring.shape[1]
    BLOCK_V: gl.constexpr = w_ring.shape[1]
    BLOCK_D: gl.constexpr = w_ring.shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    splits = gl.cdiv(vocab, SPLIT)
    steps = gl.cdiv(dim, BLOCK_D)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for work in range(gl.program_id(0), gl.cdiv(n_rows, BLOCK_N) * splits, gl.num_programs(0)):
        tile, split = token_tile_and_split(work, n_rows, splits, BLOCK_N, GROUP)
        o_n = tile * BLOCK_N + CONSUMER * CONSUMER_N
        start = split * SPLIT
        end = gl.minimum(start + SPLIT, vocab)
        target = targets_in_split(targets, rows, o_n, n_rows, start, end, HAS_ROWS, ROWS)
        tiles_hit = tiles_with_a_target(targets, rows, o_n, n_rows, start, end, HAS_ROWS, BLOCK_V)

        m = gl.full([CONSUMER_N], NEG_INF, gl.float32, ROWS)
        s = gl.zeros([CONSUMER_N], gl.float32, ROWS)
        t = gl.zeros([CONSUMER_N], gl.float32, ROWS)
        u = gl.zeros([CONSUMER_N], gl.float32, ROWS)
        for o_v in range(start, end, BLOCK_V):
            if LEAD > 0 and CONSUMER == 1:
                let_the_first_lead(empty, stage, phase, steps, STAGES, LEAD)
            b_bias = load_bias(bias, o_v, vocab, HAS_BIAS, BLOCK_V)  # in flight during the matmul
            z, stage, phase = logits_tile(h_ring, w_ring, full, empty, stage, phase, steps, CONSUMER, LOGITS)
            z = final_logits(z, b_bias, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
            if LOGIT_MEAN:  # columns outside the vocabulary are 0: the copies fill with zeros, and tanh(0) = 0
                u += gl.sum(z * SUM_SCALE, 1)
            # One branch for both rare cases: with two, Triton 3.8 spilled 48 bytes.
            if (tiles_hit & 1 != 0) | (end - o_v < BLOCK_V):
                col = gl.arange(0, BLOCK_V, gl.SliceLayout(0, LOGITS))
                b_target = gl.sum(gl.where(col[None, :] == target[:, None], z, 0.0), 1)
                row = o_n + gl.arange(0, CONSUMER_N, ROWS)
                gl.store(p_target + row, b_target, mask=(target >= 0) & (target < BLOCK_V))
                z = gl.where((col < end - o_v)[None, :], z, NEG_INF)

            b_m = gl.max(z, 1)
            e, d = weight_and_exponent(z, finite_or_zero(b_m)[:, None], c)
            b_t = t
            if ENTROPY:
                b_t = gl.sum(e * d, 1)
            m, s, t = merge(m, s, t, b_m, gl.sum(e, 1), b_t, c, ENTROPY)
            target -= BLOCK_V
            tiles_hit = tiles_hit >> 1

        row = o_n + gl.arange(0, CONSUMER_N, ROWS)
        m_row = row < n_rows
        p = partials + split.to(gl.int64) * pitch + row
        field = splits.to(gl.int64) * pitch
        gl.store(p, m, mask=m_row)
        gl.store(p + field, s, mask=m_row)
        if ENTROPY:
            gl.store(p + 2 * field, t, mask=m_row)
        if LOGIT_MEAN:
            gl.store(p + (2 + ENTROPY) * field, u, mask=m_row)


@gluon.jit
def targets_in_split(targets, rows, o_n, n_rows, start, end, HAS_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the targets of 64 tokens relative to the split; -1 outside of it."""
    row = o_n + gl.arange(0, CONSUMER_N, LAYOUT)
    o_target = row
    if HAS_ROWS:
        o_target = gl.load(rows + row, mask=row < n_rows, other=0)
    target = gl.load(targets + o_target, mask=row < n_rows, other=-1)
    return gl.where((target >= start) & (target < end), target - start, -1).to(gl.int32)


@gluon.jit
def tiles_with_a_target(targets, rows, o_n, n_rows, start, end, HAS_ROWS: gl.constexpr, BLOCK_V: gl.constexpr):
    """Return one bit for each vocabulary tile of the split that holds a target of these 64 tokens: few do.

    Each warp reads all of them, so that no barrier is needed.
    """
    WARP: gl.constexpr = gl.BlockedLayout([CONSUMER_N // 32], [32], [4], [0])
    target = targets_in_split(targets, rows, o_n, n_rows, start, end, HAS_ROWS, WARP)
    return gl.reduce_or(gl.where(target >= 0, 1 << (target // BLOCK_V), 0), 0)


@gluon.jit
def load_bias(bias, o_v, vocab, HAS_BIAS: gl.constexpr, BLOCK_V: gl.constexpr):
    """Return the bias of a tile, (BLOCK_V,), two words a thread; 0 outside the vocabulary."""
    col = o_v + gl.arange(0, BLOCK_V, gl.BlockedLayout([BLOCK_V // 128], [32], [4], [0]))
    return gl.load(bias + col, mask=(col < vocab) & HAS_BIAS, other=0.0)


@gluon.jit
def final_logits(
    z, b_bias, logit_scale, softcap, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr
):
    """Return apply_head(z). The tanh runs element by element: over the whole tile at once it spilled 432 bytes."""
    b_z = 0.0
    if HAS_BIAS:
        b_z = gl.convert_layout(b_bias.to(gl.float32), gl.SliceLayout(0, z.type.layout))[None, :]
    z = apply_head(z, b_z, logit_scale, softcap, HAS_BIAS, HAS_SCALE, False)
    if HAS_SOFTCAP:
        z = softcap * gl.map_elementwise(tanh, z * (1.0 / softcap))
    return z


@gluon.jit(do_not_specialize=["n_rows", "vocab", "dim"])
def hopper_partials_kernel(
    hidden, weight, bias, targets, rows, count, partials, p_target,
    n_rows, vocab, dim, logit_scale, softcap, c,
    HAS_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    ENTROPY: gl.constexpr, LOGIT_MEAN: gl.constexpr,
    SPLIT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = hidden.block_type.shape[0]
    BLOCK_V: gl.constexpr = weight.block_type.shape[0]
    BLOCK_D: gl.constexpr = weight.block_type.shape[1]
    pitch = n_rows
    if HAS_ROWS:
        n_rows = gl.load(count)
    h_ring = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_N, BLOCK_D], hidden.layout)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_D], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(CONSUMERS * STAGES):
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()  # the copies signal these barriers

    # Registers: 240 + 240 + 24 for each of 128 threads, 64512 of the processor's 65536.
    gl.warp_specialize(
        [
            (consume, (
                h_ring, w_ring, full, empty, bias, targets, rows, partials, p_target,
                n_rows, pitch, vocab, dim, logit_scale, softcap, c,
                HAS_ROWS, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ENTROPY, LOGIT_MEAN, SPLIT, GROUP, LEAD, 0,
            )),
            (consume, (
                h_ring, w_ring, full, empty, bias, targets, rows, partials, p_target,
                n_rows, pitch, vocab, dim, logit_scale, softcap, c,
                HAS_ROWS, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, ENTROPY, LOGIT_MEAN, SPLIT, GROUP, LEAD, 1,
            )),
            (produce, (hidden, weight, h_ring, w_ring, full, empty, n_rows, vocab, dim, SPLIT, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
