"""What each instruction returns, against values from the PTX ISA manual or worked out by hand."""

import math

import pytest
import torch

from assembly import evaluate, run

F32, I32, I64, I16, BF16, F16 = torch.float32, torch.int32, torch.int64, torch.int16, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan


def unsigned(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


INTEGERS = {
    "add.s32 $0, $1, $2;": [((2**31 - 1, 1), -(2**31)), ((-5, 3), -2)],
    "sub.s32 $0, $1, $2;": [((-(2**31), 1), 2**31 - 1)],
    "mul.lo.s32 $0, $1, $2;": [((1 << 20, 1 << 13), 0), ((-3, 7), -21)],
    "mul.hi.s32 $0, $1, $2;": [((-1, 1), -1), ((1 << 30, 8), 2)],
    "mul.hi.u32 $0, $1, $2;": [((-1, 2), 1), ((unsigned(0xAAAAAAAB), 9), 6)],
    "mad.lo.s32 $0, $1, $2, 5;": [((3, -4), -7)],
    "div.s32 $0, $1, $2;": [((-7, 2), -3), ((7, -2), -3), ((7, 2), 3)],
    "rem.s32 $0, $1, $2;": [((-7, 2), -1), ((7, -2), 1)],
    "div.u32 $0, $1, $2;": [((-1, 2), 2**31 - 1)],
    "shl.b32 $0, $1, $2;": [((1, 31), -(2**31)), ((1, 32), 0), ((5, 40), 0)],
    "shr.u32 $0, $1, $2;": [((-1, 28), 15), ((-1, 32), 0)],
    "shr.s32 $0, $1, $2;": [((-16, 2), -4), ((-16, 40), -1)],
    "and.b32 $0, $1, $2;": [((12, 10), 8)],
    "or.b32 $0, $1, $2;": [((12, 10), 14)],
    "xor.b32 $0, $1, $2;": [((12, 10), 6)],
    "not.b32 $0, $1;": [((0, 0), -1)],
    "neg.s32 $0, $1;": [((5, 0), -5)],
    "min.s32 $0, $1, $2;": [((-1, 1), -1)],
    "min.u32 $0, $1, $2;": [((-1, 1), 1)],
    "max.u32 $0, $1, $2;": [((-1, 1), -1)],
    "bfe.u32 $0, $1, 4, 8;": [((0xABCD, 0), 0xBC)],
    "bfe.s32 $0, $1, 4, 8;": [((0xABCD, 0), 0xBC - 256)],
    "bfi.b32 $0, $2, $1, 8, 4;": [((0xFFFF, 0), 0xF0FF), ((0, 0xFF), 0xF00)],
    "prmt.b32 $0, $1, $2, 0x5410;": [((0x33221100, 0x77665544), 0x55441100)],
    "prmt.b32 $0, $1, $2, 0x7531;": [((0x33221100, 0x77665544), 0x77553311)],
    "prmt.b32 $0, $1, $2, 0x8888;": [((0x80, 0), -1), ((0x7F, 0), 0)],
    "mov.b32 $0, {%h0, %h1};": [((0, 0), unsigned(0xFFFEFFFE))],  # registers that nobody wrote
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction):
    cases = INTEGERS[instruction]
    a, b = (torch.tensor([inputs[k] for inputs, _ in cases], dtype=I32) for k in (0, 1))
    assert evaluate(instruction, a, b, out=I32).tolist() == [want for _, want in cases]


def test_products_of_double_width():
    a, b = torch.tensor([-3, 2**31 - 1], dtype=I32), torch.tensor([7, 4], dtype=I32)
    assert evaluate("mul.wide.s32 $0, $1, $2;", a, b, out=I64).tolist() == [-21, 4 * (2**31 - 1)]
    assert evaluate("mul.wide.u32 $0, $1, $2;", a, b, out=I64).tolist() == [7 * (2**32 - 3), 4 * (2**31 - 1)]
    assert evaluate("mad.wide.s32 $0, $1, 8, 100;", a, out=I64).tolist() == [76, 8 * (2**31 - 1) + 100]


FLOATS = {
    "add.f32 $0, $1, $2;": [((1.0, 2.0**-25), 1.0), ((INF, -INF), NAN), ((1e-40, 0.0), 1e-40)],
    "add.ftz.f32 $0, $1, $2;": [((1e-40, 0.0), 0.0), ((1e-40, 1.0), 1.0)],
    "mul.f32 $0, $1, $2;": [((3e38, 10.0), INF), ((0.0, INF), NAN)],
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: the last term survives only if the product is not rounded
    "fma.rn.f32 $0, $1, $1, $2;": [((1 + 2.0**-12, -(1 + 2.0**-11)), 2.0**-24)],
    "div.full.f32 $0, $1, $2;": [((1.0, 3.0), 1 / 3), ((1.0, 0.0), INF), ((0.0, 0.0), NAN)],
    "max.f32 $0, $1, $2;": [((NAN, 1.0), 1.0), ((-INF, NAN), -INF), ((-1.0, 2.0), 2.0)],
    "max.NaN.f32 $0, $1, $2;": [((NAN, 1.0), NAN), ((1.0, 2.0), 2.0)],
    "min.f32 $0, $1, $2;": [((NAN, 1.0), 1.0), ((-1.0, 2.0), -1.0)],
    "abs.f32 $0, $1;": [((-INF, 0.0), INF)],
    "neg.f32 $0, $1;": [((0.0, 0.0), -0.0)],
    "ex2.approx.ftz.f32 $0, $1;": [
        ((0.0, 0.0), 1.0), ((0.5, 0.0), math.sqrt(2)), ((-INF, 0.0), 0.0), ((-127.0, 0.0), 0.0), ((128.0, 0.0), INF),
        ((NAN, 0.0), NAN), ((-126.0, 0.0), 2.0**-126),
    ],
    "ex2.approx.f32 $0, $1;": [((-127.0, 0.0), 2.0**-127)],
    "lg2.approx.f32 $0, $1;": [((8.0, 0.0), 3.0), ((0.0, 0.0), -INF), ((-1.0, 0.0), NAN)],
    "rcp.approx.f32 $0, $1;": [((4.0, 0.0), 0.25)],
    "rsqrt.approx.f32 $0, $1;": [((4.0, 0.0), 0.5)],
    "sqrt.approx.f32 $0, $1;": [((2.0, 0.0), math.sqrt(2))],
    "{ .reg .pred q; setp.lt.f32 q, $1, $2; selp.f32 $0, $1, $2, q; }": [((1.0, 2.0), 1.0), ((NAN, 2.0), 2.0)],
    "{ .reg .pred q; setp.ltu.f32 q, $1, $2; selp.f32 $0, $1, $2, q; }": [((3.0, 2.0), 2.0), ((NAN, 2.0), NAN)],
    "{ .reg .pred q; setp.ne.f32 q, $1, $2; selp.f32 $0, $1, $2, q; }": [((NAN, 2.0), 2.0), ((1.0, 2.0), 1.0)],
    "{ .reg .pred q; setp.neu.f32 q, $1, $2; selp.f32 $0, $1, $2, q; }": [((NAN, 2.0), NAN), ((2.0, 2.0), 2.0)],
    "{ .reg .pred q; setp.nan.f32 q, $1, $2; selp.f32 $0, 1.0, $2, q; }".replace("1.0", "0f3F800000"): [
        ((NAN, 2.0), 1.0), ((1.0, 2.0), 2.0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("instruction", FLOATS)
def test_floats(instruction):
    cases = FLOATS[instruction]
    a, b = (torch.tensor([inputs[k] for inputs, _ in cases], dtype=F32) for k in (0, 1))
    want = torch.tensor([want for _, want in cases], dtype=F32)
    got = evaluate(instruction, a, b, out=F32)
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number], want[number]) and torch.equal(got[number].signbit(), want[number].signbit())


CONVERSIONS = [
    # a tie goes to the even neighbour: 1 + 2^-8 down to 1, 1 + 3 * 2^-8 up to 1 + 2^-6
    ("cvt.rn.bf16.f32 $0, $1;", F32, [1 + 2.0**-8, 1 + 3 * 2.0**-8, INF], BF16, [1.0, 1 + 2.0**-6, INF]),
    ("cvt.f32.bf16 $0, $1;", BF16, [1.5, -INF, 2.0**-130], F32, [1.5, -INF, 2.0**-130]),
    ("cvt.rn.f16.f32 $0, $1;", F32, [65519.0, 65520.0, 2.0**-25], F16, [65504.0, INF, 0.0]),
    ("cvt.f32.f16 $0, $1;", F16, [65504.0, 2.0**-24], F32, [65504.0, 2.0**-24]),
    ("cvt.rn.f32.s32 $0, $1;", I32, [2**24 + 1, -3], F32, [2.0**24, -3.0]),
    ("cvt.rn.f32.u32 $0, $1;", I32, [-1], F32, [2.0**32]),
    ("cvt.rzi.s32.f32 $0, $1;", F32, [-2.7, 3e9, -3e9, NAN], I32, [-2, 2**31 - 1, -(2**31), 0]),
    ("cvt.rni.s32.f32 $0, $1;", F32, [2.5, 3.5], I32, [2, 4]),
    ("cvt.s64.s32 $0, $1;", I32, [-5], I64, [-5]),
    ("cvt.u64.u32 $0, $1;", I32, [-5], I64, [2**32 - 5]),
    ("cvt.u32.u64 $0, $1;", I64, [2**32 + 7], I32, [7]),
    ("cvt.s32.s16 $0, $1;", I16, [-2], I32, [-2]),
]


@pytest.mark.parametrize(("instruction", "source", "values", "target", "want"), CONVERSIONS, ids=lambda x: str(x)[:20])
def test_conversions(instruction, source, values, target, want):
    assert evaluate(instruction, torch.tensor(values, dtype=source), out=target).tolist() == want


def test_of_two_packed_numbers_the_first_operand_is_the_upper_half():
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    packed = evaluate("cvt.rn.bf16x2.f32 $0, $1, $2;", a, b, out=I32)
    assert packed.view(BF16).tolist() == [2.0, 1.0]


def test_a_narrow_load_is_extended_by_zeros_or_signs():
    x, out = torch.full((32, 1), -3, dtype=torch.int8), torch.zeros(32, 2, dtype=I32)
    run("ld.global.u8 %r0, [%x]; ld.global.s8 %r1, [%x]; st.global.v2.b32 [%out], {%r0, %r1};", x=x, out=out)
    assert out[0].tolist() == [253, -3]


def test_a_guard_chooses_threads():
    out = torch.zeros(32, 1, dtype=I32)
    run("setp.lt.u32 %p0, %t, 5; mov.b32 %r0, 1; @%p0 mov.b32 %r0, 2; @!%p0 st.global.b32 [%out], %r0;", out=out)
    assert out.flatten().tolist() == 5 * [0] + 27 * [1]


LOOP = """
mov.b32 %r0, 0;
mov.b32 %r1, 0;
again:
setp.ge.u32 %p0, %r0, %t;
@%p0 bra done;
add.s32 %r0, %r0, 1;
add.s32 %r1, %r1, %r0;
bra again;
done:
redux.sync.add.s32 %r2, %r1, -1;
st.global.v2.b32 [%out], {%r1, %r2};
"""


def test_threads_that_part_in_a_loop_meet_behind_it():
    out = torch.zeros(32, 2, dtype=I32)
    run(LOOP, out=out)
    want = [n * (n + 1) // 2 for n in range(32)]
    assert out[:, 0].tolist() == want and out[:, 1].tolist() == 32 * [sum(want)]


TABLE = """
and.b32 %r0, %t, 3;
table: .branchtargets first, second, first, third;
brx.idx %r0, table;
first: mov.b32 %r1, 10; bra end;
second: mov.b32 %r1, 20; bra end;
third: mov.b32 %r1, 30;
end:
st.global.b32 [%out], %r1;
"""


def test_a_branch_by_table():
    out = torch.zeros(32, 1, dtype=I32)
    run(TABLE, out=out)
    assert out[:4, 0].tolist() == [10, 20, 10, 30] and out[28:, 0].tolist() == [10, 20, 10, 30]
