"""Conversions between types."""

import numpy as np

from .operands import TYPES, Operands

ROUNDINGS = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


def from_bf16(bits):
    """Return the float32 numbers whose upper halves are `bits`."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """Return the bits of x rounded to bf16, to the nearest and then to even. A NaN becomes 0x7FFF."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_f16(bits):
    return bits.view(np.float16).astype(np.float32)


def to_f16(x):
    return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


FROM_HALF = {"bf16": from_bf16, "f16": from_f16}
TO_HALF = {"bf16": to_bf16, "f16": to_f16}


def convert(operands: Operands):
    """Decode cvt.rounding.TO.FROM."""
    ins = operands.instruction
    to, source = ins.modifiers[-2:]
    if "sat" in ins.modifiers or "relu" in ins.modifiers:
        raise operands.refuse("saturation")
    if to in ("bf16x2", "f16x2"):  # the first operand becomes the upper half
        high, low, write = operands.read(1, "f32"), operands.read(2, "f32"), operands.write(0, "b32")
        half = TO_HALF[to.removesuffix("x2")]

        def execute(block, threads):
            upper, lower = (half(x(block, threads)).astype(np.uint32) for x in (high, low))
            write(block, threads, lower | (upper << np.uint32(16)))

        return execute
    if source in FROM_HALF and to == "f32":
        read, write, half = operands.read(1, "b16"), operands.write(0, "f32"), FROM_HALF[source]
        return lambda block, threads: write(block, threads, half(read(block, threads)))
    if to in TO_HALF and source == "f32":
        read, write, half = operands.read(1, "f32"), operands.write(0, "b16"), TO_HALF[to]
        return lambda block, threads: write(block, threads, half(read(block, threads)))
    read, write, dtype = operands.read(1, source), operands.write(0, to), np.dtype(TYPES[to])
    if dtype.kind != "f" and source.startswith("f"):  # out of range gives the end of the range; a NaN gives 0
        rounding = next((ROUNDINGS[m] for m in ins.modifiers if m in ROUNDINGS), np.trunc)
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

        def execute(block, threads):
            x = rounding(read(block, threads).astype(np.float64))
            inside = np.where(np.isnan(x), 0, x).clip(low, high)
            write(block, threads, np.where(x >= high, dtype.type(high), inside.astype(dtype)))

        return execute
    return lambda block, threads: write(block, threads, read(block, threads).astype(dtype))


def address_space(operands: Operands):
    """Decode cvta: addresses are the same numbers in every space here."""
    read, write = operands.read(1, "b64"), operands.write(0, "b64")
    return lambda block, threads: write(block, threads, read(block, threads))


INSTRUCTIONS = {"cvt": convert, "cvta": address_space}
