"""Arithmetic, comparisons and bit operations: what a thread does alone.

Approximate functions (ex2.approx, div.full, ...) return the exact result, rounded. A device may be off by 2 units in
the last place. fma rounds through float64, which differs from one rounding in about one case in 2^29.
"""

import numpy as np

from .convert import INSTRUCTIONS as CONVERSIONS
from .operands import BITS, TYPES, Operands, vector

F32, F64, I64, U64 = np.float32, np.float64, np.int64, np.uint64
TINY = np.finfo(F32).tiny


def flush(x):
    """Return x with denormal numbers replaced by zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def _elementwise(compute, count: int):
    """Decode an instruction whose result and `count` operands have one type."""

    def decode(operands: Operands):
        ins = operands.instruction
        reads = [operands.read(k, ins.type) for k in range(1, count + 1)]
        write, dtype = operands.write(0, ins.type), np.dtype(TYPES[ins.type])
        if "sat" in ins.modifiers:
            raise operands.refuse("saturation")
        if "ftz" in ins.modifiers:

            def execute(block, threads):
                values = (flush(read(block, threads)) for read in reads)
                write(block, threads, flush(compute(*values)).astype(dtype, copy=False))

        else:

            def execute(block, threads):
                write(block, threads, compute(*(read(block, threads) for read in reads)))

        return execute

    return decode


def _approximate(function):
    return _elementwise(lambda x: function(x.astype(F64)).astype(F32), 1)


def _extreme(integers, floats):
    """max and min: of a number and a NaN the number, unless the instruction says .NaN."""

    def decode(operands: Operands):
        ins = operands.instruction
        propagates = ins.type.startswith("f") and "NaN" not in ins.modifiers
        return _elementwise(floats if propagates else integers, 2)(operands)

    return decode


def fma(a, b, c):
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


def divide(operands: Operands):
    """Decode div and rem. Integers are divided towards zero."""
    ins = operands.instruction
    if ins.type == "f32":
        return _elementwise(lambda a, b: (a.astype(F64) / b.astype(F64)).astype(F32), 2)(operands)
    a, b, write = operands.read(1, ins.type), operands.read(2, ins.type), operands.write(0, ins.type)

    def execute(block, threads):
        x, y = a(block, threads), b(block, threads)
        remainder = np.fmod(x, y)
        write(block, threads, remainder if ins.name == "rem" else (x - remainder) // np.where(y == 0, 1, y))

    return execute


def multiply(operands: Operands):
    """Decode mul and mad: of floats, or .lo, .hi and .wide of integers."""
    ins = operands.instruction
    if ins.type.startswith("f"):
        return _elementwise(np.multiply, 2)(operands)
    size = np.dtype(TYPES[ins.type]).itemsize
    double = f"{ins.type[0]}{min(64, 16 * size)}"
    result = double if "wide" in ins.modifiers else ins.type
    a, b, write = operands.read(1, ins.type), operands.read(2, ins.type), operands.write(0, result)
    c = operands.read(3, result) if ins.name == "mad" else None
    if "hi" in ins.modifiers and size == 8:
        raise operands.refuse("the upper half of a product of 128 bits")
    inner = TYPES[double if "lo" not in ins.modifiers else ins.type]

    def execute(block, threads):
        product = np.multiply(a(block, threads), b(block, threads), dtype=inner)
        if "hi" in ins.modifiers:
            product = (product >> inner(8 * size)).astype(TYPES[ins.type])
        write(block, threads, product if c is None else product + c(block, threads))

    return execute


def shift(operands: Operands):
    """Decode shl and shr. A shift by more than the width leaves zeros, or signs."""
    ins = operands.instruction
    bits = 8 * np.dtype(TYPES[ins.type]).itemsize
    a, by, write = operands.read(1, ins.type), operands.read(2, "u32"), operands.write(0, ins.type)
    signed = ins.type.startswith("s")
    most = bits - 1 if signed else 63

    def execute(block, threads):
        x, n = a(block, threads), np.minimum(by(block, threads).astype(I64), bits)
        if signed:
            write(block, threads, x.astype(I64) >> np.minimum(n, most))
            return
        wide, few = x.astype(U64), np.minimum(n, most).astype(U64)
        moved = wide << few if ins.name == "shl" else wide >> few
        write(block, threads, np.where(n >= bits, U64(0), moved).astype(BITS[bits // 8]))

    return execute


def extract(operands: Operands):
    """Decode bfe: `length` bits of a from `position` on, with the sign of the highest of them if it is signed."""
    ins = operands.instruction
    a, position, length = operands.read(1, "u32"), operands.read(2, "u32"), operands.read(3, "u32")
    write = operands.write(0, "u32")

    def execute(block, threads):
        p, n = (x(block, threads).astype(U64) & U64(255) for x in (position, length))
        field = (a(block, threads).astype(U64) >> np.minimum(p, U64(63))) & ((U64(1) << n) - U64(1))
        if ins.type == "s32":
            sign = (field >> (n - U64(1))) & U64(1)
            field = np.where(sign == 1, field | (U64(0xFFFFFFFF) << n), field)
        write(block, threads, (field & U64(0xFFFFFFFF)).astype(np.uint32))

    return execute


def insert(operands: Operands):
    """Decode bfi: b with `length` bits from `position` on replaced by those of a."""
    a, b, position, length = (operands.read(k, "u32") for k in (1, 2, 3, 4))
    write = operands.write(0, "u32")

    def execute(block, threads):
        x, y, p, n = (read(block, threads).astype(U64) for read in (a, b, position, length))
        mask = ((U64(1) << n) - U64(1)) << p
        write(block, threads, (((y & ~mask) | ((x << p) & mask)) & U64(0xFFFFFFFF)).astype(np.uint32))

    return execute


def permute(operands: Operands):
    """Decode prmt: four bytes chosen from the eight of (a, b), or the sign of one of them."""
    a, b, selector = (operands.read(k, "u32") for k in (1, 2, 3))
    write = operands.write(0, "u32")

    def execute(block, threads):
        pair = a(block, threads).astype(U64) | (b(block, threads).astype(U64) << U64(32))
        chosen, out = selector(block, threads).astype(U64), U64(0)
        for k in range(4):
            n = (chosen >> U64(4 * k)) & U64(15)
            byte = (pair >> ((n & U64(7)) * U64(8))) & U64(255)
            byte = np.where(n & U64(8), np.where(byte & U64(128), U64(255), U64(0)), byte)
            out = out | (byte << U64(8 * k))
        write(block, threads, out.astype(np.uint32))

    return execute


def select(operands: Operands):
    ins = operands.instruction
    a, b, p = operands.read(1, ins.type), operands.read(2, ins.type), operands.read(3, "pred")
    write = operands.write(0, ins.type)

    def execute(block, threads):
        write(block, threads, np.where(p(block, threads), a(block, threads), b(block, threads)))

    return execute


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(operands: Operands):
    """Decode setp. A comparison with a NaN is false; with the suffix u (equ, ltu, ...) it is true."""
    ins = operands.instruction
    kind, floats = ins.modifiers[0], ins.type.startswith("f")
    a, b, write = operands.read(1, ins.type), operands.read(2, ins.type), operands.write(0, "pred")
    combine = COMBINATIONS.get(ins.modifiers[1])
    c = operands.read(3, "pred") if combine else None
    if kind in ("nan", "num"):

        def test(x, y):
            return (np.isnan(x) | np.isnan(y)) ^ (kind == "num")

    elif floats and kind.endswith("u"):
        opposite = COMPARISONS[{"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}[kind[:-1]]]

        def test(x, y):
            return np.isnan(x) | np.isnan(y) | ~opposite(x, y)

    elif floats and kind == "ne":

        def test(x, y):
            return (x != y) & ~np.isnan(x) & ~np.isnan(y)

    else:
        test = COMPARISONS[kind]

    def execute(block, threads):
        result = test(a(block, threads), b(block, threads))
        write(block, threads, combine(result, c(block, threads)) if combine else result)

    return execute


def move(operands: Operands):
    """Decode mov: a copy, or the parts of a register packed or unpacked."""
    ins = operands.instruction
    target, source = ins.operands
    size = np.dtype(TYPES[ins.type]).itemsize
    if not target.startswith("{") and not source.startswith("{"):
        read, write = operands.read(1, ins.type), operands.write(0, ins.type)
        return lambda block, threads: write(block, threads, read(block, threads))
    parts = vector(target if target.startswith("{") else source)
    width = size // len(parts)
    shifts, part = [np.dtype(BITS[size]).type(8 * width * k) for k in range(len(parts))], f"b{8 * width}"
    if target.startswith("{"):
        read, writes = operands.read(1, ins.type), operands.writes(0, part)

        def execute(block, threads):
            whole = read(block, threads)
            for write, by in zip(writes, shifts, strict=True):
                write(block, threads, (whole >> by).astype(BITS[width]))

    else:
        reads, write = operands.reads(1, part), operands.write(0, ins.type)

        def execute(block, threads):
            whole = np.dtype(BITS[size]).type(0)
            for read, by in zip(reads, shifts, strict=True):
                whole = whole | (read(block, threads).astype(BITS[size]) << by)
            write(block, threads, whole)

    return execute


INSTRUCTIONS = CONVERSIONS | {
    "add": _elementwise(np.add, 2), "sub": _elementwise(np.subtract, 2), "fma": _elementwise(fma, 3),
    "mul": multiply, "mad": multiply, "div": divide, "rem": divide,
    "max": _extreme(np.maximum, np.fmax), "min": _extreme(np.minimum, np.fmin),
    "neg": _elementwise(np.negative, 1), "abs": _elementwise(np.abs, 1),
    "ex2": _approximate(np.exp2), "lg2": _approximate(np.log2), "sqrt": _approximate(np.sqrt),
    "rcp": _approximate(lambda x: 1 / x), "rsqrt": _approximate(lambda x: 1 / np.sqrt(x)),
    "and": _elementwise(np.bitwise_and, 2), "or": _elementwise(np.bitwise_or, 2),
    "xor": _elementwise(np.bitwise_xor, 2), "not": _elementwise(np.invert, 1),
    "shl": shift, "shr": shift, "bfe": extract, "bfi": insert, "prmt": permute, "selp": select, "setp": compare,
    "mov": move,
}  # fmt: skip
