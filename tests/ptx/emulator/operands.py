"""Operands as functions: `read(block, threads)` gives an operand's values, `write(block, threads, values)` sets it.

A register is an array with one element for each thread of the block: unsigned integers of its size, or bool for a
predicate. Floats are views of it. `threads` is a slice or an array of indices. An immediate is a numpy scalar.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .faults import NotEmulated
from .parse import Instruction, Program, vector

Read = Callable[..., np.ndarray]
Write = Callable[..., None]
TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
# What a register holds before it is written: NaN as a float, and an address outside of everything.
GARBAGE = {np.bool_: False, np.uint16: 0xFFFE, np.uint32: 0x7FC0DEAD, np.uint64: 0x7FF8DEAD7FC0DEAD}
SPECIAL = ("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
           "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank", "%clusterid.x", "%cluster_ctaid.x")  # fmt: skip
PARAMETER_SPACE = 0x7E00_0000  # address of the first parameter, and of one more every PARAMETER_SIZE bytes
PARAMETER_SIZE = 4096


def storage(type_: str) -> type:
    """Return the dtype that holds a register of a PTX type."""
    return np.bool_ if type_ == "pred" else BITS[np.dtype(TYPES[type_]).itemsize]


@dataclass(frozen=True)
class Operands:
    """The operands of one instruction, by number."""

    program: Program
    instruction: Instruction

    def read(self, k: int, type_: str) -> Read:
        return reader(self.program, self.instruction.operands[k], type_)

    def write(self, k: int, type_: str) -> Write:
        return writer(self.program, self.instruction.operands[k], type_)

    def reads(self, k: int, type_: str) -> list[Read]:
        return [reader(self.program, part, type_) for part in vector(self.instruction.operands[k])]

    def writes(self, k: int, type_: str) -> list[Write]:
        return [writer(self.program, part, type_) for part in vector(self.instruction.operands[k])]

    def address(self, k: int) -> Read:
        """Return a reader of the address in [register + offset], int64."""
        inner = self.instruction.operands[k].strip("[] ")
        base, offset = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\d+))?", inner).groups()
        return addition(self.program, base, int(offset or 0))

    def refuse(self, why: str) -> NotEmulated:
        return NotEmulated(f"{why}: {self.instruction.text}")


def addition(program: Program, base: str, offset: int) -> Read:
    if base not in program.registers:
        at = np.int64(immediate(program, base, np.int64) + offset)
        return lambda block, threads: np.full(len(block.thread[threads]), at)
    read = reader(program, base, program.registers[base])
    return lambda block, threads: read(block, threads).astype(np.int64) + offset


def reader(program: Program, operand: str, type_: str) -> Read:
    dtype = np.dtype(TYPES[type_])
    if operand.startswith("!"):
        positive = reader(program, operand[1:], type_)
        return lambda block, threads: ~positive(block, threads)
    if operand not in program.registers and operand not in SPECIAL:
        value = immediate(program, operand, dtype)
        return lambda block, threads: value
    held = np.dtype(storage(program.registers.get(operand, "b32")))
    if held == dtype:
        return lambda block, threads: block.registers[operand][threads]
    if held.itemsize == dtype.itemsize:
        return lambda block, threads: block.registers[operand][threads].view(dtype)
    narrow = np.dtype(BITS[dtype.itemsize])
    return lambda block, threads: block.registers[operand][threads].astype(narrow).view(dtype)


def writer(program: Program, operand: str, type_: str) -> Write:
    if operand == "_":
        return lambda block, threads, values: None
    held, dtype = np.dtype(storage(program.registers[operand])), np.dtype(TYPES[type_])
    if held.itemsize == dtype.itemsize:

        def write(block, threads, values):
            block.registers[operand].view(dtype)[threads] = values

    elif held.itemsize > dtype.itemsize:  # a narrow result is extended by its sign, or by zeros
        wide = SIGNED[held.itemsize] if dtype.kind == "i" else held

        def write(block, threads, values):
            block.registers[operand].view(wide)[threads] = values

    else:
        raise NotEmulated(f"a result of type {type_} in {operand}, a register of {held.itemsize} bytes")
    return write


def immediate(program: Program, operand: str, dtype) -> np.generic:
    dtype = np.dtype(dtype)
    if operand == "global_smem":
        return dtype.type(0)
    if operand in program.parameters:
        return dtype.type(PARAMETER_SPACE + PARAMETER_SIZE * program.parameters.index(operand))
    if dtype == np.bool_:
        return np.bool_(int(operand, 0))
    if re.match("0[fFdD]", operand):
        bits = int(operand[2:], 16)
    elif re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", operand):
        bits = int(operand.removesuffix("U"), 0)
    else:
        raise NotEmulated(f"operand {operand!r}")
    unsigned = np.dtype(BITS[dtype.itemsize]).type(bits & (2 ** (8 * dtype.itemsize) - 1))
    return unsigned.view(dtype)
