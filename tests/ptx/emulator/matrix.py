"""ldmatrix, stmatrix and mma.sync. Lane 4 g + q of a warp holds the parts of row g and column 2 q of each matrix.

An 8 x 8 matrix of 16-bit numbers takes one register: elements (g, 2 q) and (g, 2 q + 1).
D (16 x 8) = A (16 x K) B (K x 8) + C takes
- of A one register for each quarter: rows 0 to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15
- of B, which is stored by columns, one for each half of K
- of C and D two for rows 0 to 7, and two for rows 8 to 15

Products are summed in float64 and rounded once. A device rounds after fewer terms, in an order of its own.
"""

import numpy as np

from .convert import FROM_HALF
from .lanes import LANE, whole_warps
from .operands import Operands

ROW, PAIR = LANE >> 2, 2 * (LANE & 3)  # g and 2 q
HALF = np.uint32(16)


def unpack(register: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper 16 bits."""
    return (register & np.uint32(0xFFFF)).astype(np.uint16), (register >> HALF).astype(np.uint16)


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | (high.astype(np.uint32) << HALF)


def _matrices(operands: Operands) -> tuple[int, bool]:
    modifiers = operands.instruction.modifiers
    if "m8n8" not in modifiers or modifiers[-1] != "b16":
        raise operands.refuse("matrices of another shape than 8 x 8 of 16 bits")
    return next(int(m[1:]) for m in modifiers if m in ("x1", "x2", "x4")), "trans" in modifiers


def _rows(address, block, threads, matrix: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the (8 per warp, 16) places of a matrix, and their warps. Lanes 8 k to 8 k + 7 address matrix k."""
    warps = whole_warps(block, threads, what)
    rows = address(block, threads).reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8].ravel()
    return block.shared.where(rows, 16, what), np.repeat(warps, 8)


def load_matrices(operands: Operands):
    ins, (count, transposed) = operands.instruction, _matrices(operands)
    writes, address = operands.writes(0, "b32"), operands.address(1)

    def execute(block, threads):
        for k in range(count):
            at, warps = _rows(address, block, threads, k, ins.text)
            m = np.ascontiguousarray(block.shared.load(at, warps, ins.text)).view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                m = m.swapaxes(1, 2)
            writes[k](block, threads, pack(m[:, ROW, PAIR], m[:, ROW, PAIR + 1]).ravel())

    return execute


def store_matrices(operands: Operands):
    ins, (count, transposed) = operands.instruction, _matrices(operands)
    reads, address = operands.reads(1, "b32"), operands.address(0)

    def execute(block, threads):
        for k in range(count):
            at, warps = _rows(address, block, threads, k, ins.text)
            m = np.empty((len(warps) // 8, 8, 8), np.uint16)
            m[:, ROW, PAIR], m[:, ROW, PAIR + 1] = (x.reshape(-1, 32) for x in unpack(reads[k](block, threads)))
            if transposed:
                m = np.ascontiguousarray(m.swapaxes(1, 2))
            block.shared.store(at, m.reshape(-1, 8).view(np.uint8), warps, ins.text)

    return execute


def fragment_a(registers: list[np.ndarray], convert) -> np.ndarray:
    """Return A (W, 16, 4 len(registers)) of registers (W, 32) each."""
    a = np.empty((len(registers[0]), 16, 4 * len(registers)))
    for r, register in enumerate(registers):
        for k, bits in enumerate(unpack(register)):
            a[:, ROW + 8 * (r & 1), PAIR + k + 8 * (r >> 1)] = convert(bits)
    return a


def multiply(operands: Operands):
    """Decode mma.sync.aligned.m16n8k{8,16}.row.col.f32.T.T.f32 for T = bf16 and f16."""
    ins = operands.instruction
    shape, kind = ins.modifiers[2], ins.modifiers[-2]
    if shape not in ("m16n8k8", "m16n8k16") or kind not in FROM_HALF or ins.type != "f32":
        raise operands.refuse("a matmul of another shape or type")
    convert, depth = FROM_HALF[kind], int(shape[6:])
    a, b = operands.reads(1, "b32"), operands.reads(2, "b32")
    c, d = operands.reads(3, "f32"), operands.writes(0, "f32")

    def execute(block, threads):
        warps = len(whole_warps(block, threads, ins.text))
        left = fragment_a([x(block, threads).reshape(-1, 32) for x in a], convert)
        right = np.empty((warps, depth, 8))
        for r, read in enumerate(b):
            for k, bits in enumerate(unpack(read(block, threads).reshape(-1, 32))):
                right[:, PAIR + k + 8 * r, ROW] = convert(bits)
        product = left @ right
        for r, (read, write) in enumerate(zip(c, d, strict=True)):
            part = product[:, ROW + 8 * (r >> 1), PAIR + (r & 1)].ravel()
            write(block, threads, (part + read(block, threads)).astype(np.float32))

    return execute


INSTRUCTIONS = {"ldmatrix": load_matrices, "stmatrix": store_matrices, "mma": multiply}
