"""wgmma and bulk tensor copies (TMA) of compute capability 9.0.

A bulk copy lands when a warp waits for its mbarrier. A wgmma computes when its warp waits for its group: until then it
reads shared memory, and its result registers hold what they held.

Both address shared memory in rows of 32, 64 or 128 bytes, swizzled: bits 4 to 6 of an address are XORed with bits 7 to
9, as far as the rows are wide. A matrix descriptor of wgmma has the start address (bits 0 to 13) and the distance
between groups of 8 rows (bits 32 to 45) in units of 16 bytes, and the kind of swizzle (bits 62, 63).
"""

import re

import numpy as np

from .barriers import find
from .convert import FROM_HALF
from .faults import Fault, Misaligned, OutOfBounds
from .lanes import whole_warps
from .matrix import PAIR, ROW, fragment_a
from .operands import PARAMETER_SIZE, PARAMETER_SPACE, Operands, reader
from .parse import split

SWIZZLED_BITS = {1: 3, 2: 2, 3: 1}  # by the descriptor's mode: rows of 128, 64, 32 bytes


def swizzle(addresses: np.ndarray, bits: int) -> np.ndarray:
    return addresses ^ (((addresses >> 7) & ((1 << bits) - 1)) << 4)


def matrix_places(descriptor: int, rows: np.ndarray) -> np.ndarray:
    """Return the addresses of 16 numbers of 16 bits in each of `rows` of the matrix that a descriptor describes."""
    start, stride, mode = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4, descriptor >> 62
    if mode not in SWIZZLED_BITS or (descriptor >> 49) & 7:
        raise Fault(f"wgmma: matrix descriptor {descriptor:#x} has no swizzle, or a base offset")
    bits = SWIZZLED_BITS[mode]
    columns = np.arange(0, 32, 2)
    return swizzle(start + (rows // 8 * stride + rows % 8 * (16 << bits))[:, None] + columns, bits)


def _commit(operands: Operands):
    def execute(block, threads):
        for warp in whole_warps(block, threads, operands.instruction.text):
            block.matmuls.commit(warp)

    return execute


def _wait(operands: Operands):
    ins = operands.instruction
    keep = int(ins.operands[0], 0)

    def execute(block, threads):
        for warp in whole_warps(block, threads, ins.text):
            for compute in block.matmuls.wait(warp, keep):
                compute()

    return execute


def _multiply(operands: Operands):
    """Decode wgmma.mma_async m64nNk16: D (64 x N) = A (64 x 16) B (16 x N) [+ D], 16 rows of D in each of four warps.

    A lies in registers, as for mma.m16n8k16, or in shared memory; B in shared memory, N rows of 16.
    """
    ins = operands.instruction
    shape = re.fullmatch(r"m64n(\d+)k16", ins.modifiers[3])
    if not shape or ins.type not in FROM_HALF or ins.modifiers[4] != "f32" or ins.operands[4:6] != ("1", "1"):
        raise operands.refuse("a matmul of another shape or type")
    if any(int(x) for x in ins.operands[6:]):
        raise operands.refuse("a transposed operand")
    convert, columns = FROM_HALF[ins.type], int(shape[1])
    in_registers = ins.operands[1].startswith("{")
    left = operands.reads(1, "b32") if in_registers else operands.read(1, "b64")
    right, adds = operands.read(2, "b64"), operands.read(3, "pred")
    results = [
        (reader(operands.program, name, "f32"), write, k)
        for k, (name, write) in enumerate(zip(split(ins.operands[0][1:-1]), operands.writes(0, "f32"), strict=True))
    ]

    def places(block, own, read, rows, what):
        (descriptor,) = np.unique(read(block, own)).tolist()
        at = matrix_places(int(descriptor), rows)
        if at.max() + 2 > block.shared.size:
            raise OutOfBounds(f"{what}: it reads shared address {at.max()} of {block.shared.size}")
        at = (at[..., None] + np.arange(2)).reshape(len(rows), -1)
        return at

    def start(block, warp, own):
        summed = bool(np.all(adds(block, own)))
        warps = np.array([warp])
        b_at = places(block, own, right, np.arange(columns), ins.text)
        block.shared.begin_read(b_at.reshape(1, -1), warps, ins.text)
        if in_registers:
            a_values = fragment_a([x(block, own).copy()[None] for x in left], convert)[0]
        else:
            a_at = places(block, own, left, 16 * (warp % 4) + np.arange(16), ins.text)
            block.shared.begin_read(a_at.reshape(1, -1), warps, ins.text)

        def compute():
            a = a_values if in_registers else _numbers(block, a_at, warps, convert)
            product = a @ _numbers(block, b_at, warps, convert).T
            for read, write, k in results:
                part = product[ROW + 8 * ((k & 3) >> 1), 8 * (k // 4) + PAIR + (k & 1)]
                write(block, own, (part + read(block, own) if summed else part).astype(np.float32))

        return compute

    def execute(block, threads):
        for warp in whole_warps(block, threads, ins.text):
            block.matmuls.add(warp, start(block, warp, slice(32 * warp, 32 * warp + 32)))

    return execute


def _numbers(block, at, warps, convert) -> np.ndarray:
    bytes_ = block.shared.end_read(at.reshape(1, -1), warps).reshape(at.shape)
    return convert(bytes_.view(np.uint16)).astype(np.float64)


def bulk_copy(operands: Operands):
    """Decode cp.async.bulk.tensor.2d [shared], [descriptor, {column, row}], [mbarrier]: a box of a matrix.

    What lies outside of the matrix becomes 0. The bytes count for the mbarrier all the same.
    """
    ins = operands.instruction
    if (
        ins.modifiers[2:4] != ("tensor", "2d")
        or any(m.startswith("multicast") for m in ins.modifiers)
        or not ins.modifiers[5].startswith("global")
    ):
        raise operands.refuse("a bulk copy of another form")
    target, mbarrier = operands.address(0), operands.address(2)
    descriptor, column, row = re.fullmatch(
        r"\[\s*([%\w]+)\s*,\s*\{\s*([%\w-]+)\s*,\s*([%\w-]+)\s*\}\s*\]", ins.operands[1]
    ).groups()
    map_, x, y = (reader(operands.program, *o) for o in ((descriptor, "u64"), (column, "s32"), (row, "s32")))

    def execute(block, threads):
        for thread in block.thread[threads].tolist():
            one = np.array([thread])
            number, offset = divmod(int(map_(block, one)[0]) - PARAMETER_SPACE, PARAMETER_SIZE)
            if offset or number not in block.boxes:
                raise Fault(f"{ins.text}: no tensor map at this address")
            box = block.boxes[number]
            at = box.places(int(target(block, one)[0]), ins.text)
            if at.max() >= block.shared.size:
                raise OutOfBounds(f"{ins.text}: it writes shared address {at.max()} of {block.shared.size}")
            data = box.read(block.memory, int(np.max(x(block, one))), int(np.max(y(block, one))), ins.text)
            barrier = find(block, int(mbarrier(block, one)[0]), thread // 32, ins.text)
            block.shared.begin_copy(at.reshape(1, -1), one // 32, ins.text)
            barrier.copies.append((at, data))
            barrier.bytes -= data.size
            barrier.complete_if_done(block)

    return execute


class Box:
    """What a tensor map describes: a matrix, and the size and swizzle of a copy."""

    def __init__(self, matrix, rows: int, columns: int, swizzle_mode: int):
        self.matrix, self.rows, self.columns, self.bits = matrix, rows, columns, swizzle_mode
        self.width = columns * matrix.element_size()  # bytes of a row of the box
        if self.bits and self.width != 16 << self.bits:
            raise Fault(f"a box of {self.width} bytes a row cannot have swizzle mode {self.bits}")

    def places(self, start: int, what: str) -> np.ndarray:
        if start % 128:
            raise Misaligned(f"{what}: shared address {start} is not a multiple of 128")
        return swizzle(start + np.arange(self.rows)[:, None] * self.width + np.arange(self.width), self.bits)

    def read(self, memory, column: int, row: int, what: str) -> np.ndarray:
        """Return (rows, width) bytes of the box whose corner is at (row, column)."""
        size, (height, width) = self.matrix.element_size(), self.matrix.shape
        data = np.zeros((self.rows, self.width), np.uint8)
        rows = np.arange(max(row, 0), min(row + self.rows, height))
        first, last = max(column, 0), min(column + self.columns, width)
        if len(rows) and first < last:
            start = self.matrix.data_ptr() + (rows * self.matrix.stride(0) + first) * size
            inside = memory.load(start, (last - first) * size, what, aligned=False)
            data[rows - row, (first - column) * size : (last - column) * size] = inside
        return data


INSTRUCTIONS = {
    "wgmma.commit_group": _commit, "wgmma.wait_group": _wait, "wgmma.mma_async": _multiply, "cp.async.bulk": bulk_copy,
}  # fmt: skip
