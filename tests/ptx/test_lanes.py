"""Shuffles, votes and the layouts of matrices, against the tables of the PTX ISA manual."""

import pytest
import torch

from assembly import run

I32, BF16, F16 = torch.int32, torch.bfloat16, torch.float16
SHUFFLES = {
    "bfly.b32 {}, %r0, 1, 31, -1": lambda lane: lane ^ 1,
    "idx.b32 {}, %r0, 5, 31, -1": lambda lane: 5,
    "up.b32 {}, %r0, 3, 0, -1": lambda lane: lane - 3,
    "down.b32 {}, %r0, 3, 31, -1": lambda lane: lane + 3,
    "idx.b32 {}, %r0, 1, 0x1807, -1": lambda lane: lane // 8 * 8 + 1,  # segments of 8 lanes
    "down.b32 {}, %r0, 2, 0x1807, -1": lambda lane: lane + 2 if lane % 8 < 6 else -1,
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles(shuffle):
    """A lane whose source is out of range keeps its own value, and its predicate is false."""
    out = torch.zeros(32, 2, dtype=I32)
    ptx = "add.s32 %r0, %t, 100; shfl.sync." + shuffle.format("%r1|%p0") + "; selp.b32 %r2, 1, 0, %p0;"
    run(f"{ptx} st.global.v2.b32 [%out], {{%r1, %r2}};", out=out)
    sources = [SHUFFLES[shuffle](lane) for lane in range(32)]
    inside = [0 <= source < 32 for source in sources]
    want = [100 + (source if ok else lane) for lane, (source, ok) in enumerate(zip(sources, inside, strict=True))]
    assert out[:, 0].tolist() == want and out[:, 1].tolist() == [int(ok) for ok in inside]


def test_reductions_and_votes():
    out = torch.zeros(64, 4, dtype=I32)
    body = """
    sub.s32 %r0, 40, %t;
    redux.sync.max.s32 %r1, %r0, -1;
    setp.lt.u32 %p0, %t, 3;
    vote.sync.ballot.b32 %r2, %p0, -1;
    vote.sync.any.pred %p1, %p0, -1;
    selp.b32 %r3, 1, 0, %p1;
    elect.sync %r4|%p2, -1;
    selp.b32 %r4, 1, 0, %p2;
    st.global.v4.b32 [%out], {%r1, %r2, %r3, %r4};
    """
    run(body, threads=64, out=out)
    assert out[5].tolist() == [40, 7, 1, 0] and out[40].tolist() == [8, 0, 0, 0]
    assert out[:, 3].tolist() == [1, *31 * [0], 1, *31 * [0]]


def matrix(rows, columns, dtype=torch.int16):
    return torch.arange(rows * columns).view(rows, columns).to(dtype)


STORE_ROWS = """
ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x];
mad.lo.s32 %r4, %t, 16, 0;
st.shared.v4.b32 [%r4], {%r0, %r1, %r2, %r3};
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Row i of matrix k comes from the address of lane 8 k + i; lane 4 g + q gets elements 2 q and 2 q + 1 of row g."""
    x, out, back = matrix(32, 8), torch.zeros(32, 8, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)
    trans = ".trans" if transposed else ""
    body = f"""{STORE_ROWS}
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r4];
    st.global.v4.b32 [%out], {{%r5, %r6, %r7, %r8}};
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r4+512], {{%r5, %r6, %r7, %r8}};
    ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%r4+512];
    st.global.v4.b32 [%back], {{%r0, %r1, %r2, %r3}};
    """
    run(body, shared=1024, x=x, out=out, back=back)
    for lane in range(32):
        for k in range(4):
            m = x[8 * k : 8 * k + 8]
            m = m.T if transposed else m
            g, q = divmod(lane, 4)
            assert out[lane, 2 * k : 2 * k + 2].tolist() == m[g, 2 * q : 2 * q + 2].tolist()
    assert torch.equal(back, x)


def fragment(lane: int, i: int, kind: str) -> tuple[int, int]:
    """Return (row, column) of element i that a lane holds of a matrix of mma.m16n8k16, by the manual's formulas."""
    g, q = divmod(lane, 4)
    if kind == "A":
        return g + (8 if i % 4 >= 2 else 0), 2 * q + i % 2 + (8 if i >= 4 else 0)
    if kind == "B":
        return 2 * q + i % 2 + (8 if i >= 2 else 0), g
    return g + (8 if i >= 2 else 0), 2 * q + i % 2


def distributed(m: torch.Tensor, kind: str, count: int) -> torch.Tensor:
    """Return (32, count) elements: what each lane holds."""
    places = [[fragment(lane, i, kind) for i in range(count)] for lane in range(32)]
    return torch.stack([torch.stack([m[place] for place in row]) for row in places])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_mma_m16n8k16(dtype):
    a, b, c = (torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8))
    out, kind = torch.zeros(32, 4), {BF16: "bf16", F16: "f16"}[dtype]
    body = f"""
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%a];
    ld.global.v2.b32 {{%r4, %r5}}, [%b];
    ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%c];
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
      {{%r10, %r11, %r12, %r13}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%r6, %r7, %r8, %r9}};
    st.global.v4.b32 [%out], {{%r10, %r11, %r12, %r13}};
    """
    run(body, a=distributed(a, "A", 8), b=distributed(b, "B", 4), c=distributed(c, "C", 4), out=out)
    want = c.double() + a.double() @ b.double()
    assert torch.equal(out, distributed(want.float(), "C", 4))


SWIZZLES = {
    # bytes a row, mode of the tensor map: where chunk k of 16 bytes of row r lies in the row
    (128, 3): lambda r, k: k ^ (r % 8),
    (64, 2): lambda r, k: k ^ (r // 2 % 4),
    (32, 1): lambda r, k: k ^ (r // 4 % 2),
    (32, 0): lambda r, k: k,
}
COPY = """
setp.eq.u32 %p0, %t, 0;
@%p0 mbarrier.init.shared::cta.b64 [8192], 1;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [8192], {bytes};
@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [0], [%x, {{{column}, {row}}}], [8192];
bar.sync 0;
wait: mbarrier.try_wait.parity.shared::cta.b64 %p1, [8192], 0;
@!%p1 bra wait;
"""


@pytest.mark.parametrize(("width", "mode"), SWIZZLES)
def test_a_bulk_copy_is_swizzled_and_padded_with_zeros(width, mode):
    x, out = matrix(32, width // 2) + 1, torch.full((32, width // 2), -1, dtype=torch.int16)
    loads = [f"ld.shared.b32 %r0, [%r1+{4 * k}]; st.global.b32 [%out+{4 * k}], %r0;" for k in range(width // 4)]
    body = COPY.format(bytes=32 * width, column=8, row=-4) + f"mul.lo.s32 %r1, %t, {width};" + "".join(loads)
    run(body, shared=8200, boxes={"x": (32, width // 2, mode)}, x=x, out=out)
    for r in range(32):
        for k in range(width // 16):
            at = 8 * SWIZZLES[width, mode](r, k)
            chunk = x[r - 4, 8 * k + 8 : 8 * k + 16].tolist() if r >= 4 else []
            assert out[r, at : at + 8].tolist() == (chunk or 8 * [0])


WGMMA = """
setp.eq.u32 %p0, %t, 0;
@%p0 mbarrier.init.shared::cta.b64 [20480], 1;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [20480], 10240;
@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [0], [%a, {0, 0}], [20480];
@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [8192], [%b, {0, 0}], [20480];
bar.sync 0;
wait: mbarrier.try_wait.parity.shared::cta.b64 %p1, [20480], 0;
@!%p1 bra wait;
wgmma.fence.sync.aligned;
mov.pred %p2, 0;
mov.pred %p3, 1;
"""
MODE_128, ROWS_OF_1024 = 1 << 62, 64 << 32  # a descriptor: rows of 128 bytes, groups of 8 rows 1024 bytes apart


def test_wgmma_reads_swizzled_rows_and_writes_its_fragments():
    """D (64 x 16) = A (64 x 64) B (16 x 64)^T in four steps of 16: warp w has rows 16 w to 16 w + 15, as in mma."""
    a, b, out = torch.randn(64, 64).to(BF16), torch.randn(16, 64).to(BF16), torch.zeros(128, 8)
    steps = []
    for k in range(4):  # 16 numbers are 32 bytes, 2 units of the start address
        descriptors = [MODE_128 | ROWS_OF_1024 | (start // 16 + 2 * k) for start in (0, 8192)]
        steps.append(
            f"mov.b64 %d0, {descriptors[0]}; mov.b64 %d1, {descriptors[1]};"
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7}, %d0, %d1, "
            f"{'%p3' if k else '%p2'}, 1, 1, 0, 0;"
        )
    end = """wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    st.global.v4.b32 [%out], {%r0,%r1,%r2,%r3}; st.global.v4.b32 [%out+16], {%r4,%r5,%r6,%r7};"""
    boxes = {"a": (64, 64, 3), "b": (16, 64, 3)}
    for order in ("lockstep", "down"):
        run(WGMMA + "".join(steps) + end, threads=128, shared=20488, order=order, boxes=boxes, a=a, b=b, out=out)
        want = a.double() @ b.double().T
        for warp in range(4):
            for j in range(2):  # groups of 8 columns
                part = want[16 * warp : 16 * warp + 16, 8 * j : 8 * j + 8]
                ours = out[32 * warp : 32 * warp + 32, 4 * j : 4 * j + 4]
                torch.testing.assert_close(ours.double(), distributed(part, "C", 4), rtol=0, atol=1e-5)
