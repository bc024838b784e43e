"""Loads, stores, and cp.async, the copies of compute capability 8.0.

A cp.async lands when its warp waits for its group, not before. Until then, touching its bytes is a fault.
"""

import re
from collections import deque

import numpy as np

from .operands import BITS, TYPES, Operands


def _space(operands: Operands) -> str:
    names = [m.partition("::")[0] for m in operands.instruction.modifiers]
    for space in ("param", "shared", "global"):
        if space in names:
            return space
    raise operands.refuse("an access without a known space")


def _warps(block, threads) -> np.ndarray:
    return block.thread[threads] // 32


def load(operands: Operands):
    ins, space = operands.instruction, _space(operands)
    if space == "param":
        return _load_parameter(operands)
    size, writes, address = np.dtype(TYPES[ins.type]).itemsize, operands.writes(0, ins.type), operands.address(1)
    dtype, total = TYPES[ins.type], size * len(writes)

    def execute(block, threads):
        where = address(block, threads)
        if space == "global":
            data = block.memory.load(where, total, ins.text)
        else:
            at = block.shared.where(where, total, ins.text)
            data = block.shared.load(at, _warps(block, threads), ins.text)
        values = np.ascontiguousarray(data).view(dtype)
        for k, write in enumerate(writes):
            write(block, threads, values[:, k])

    return execute


def _load_parameter(operands: Operands):
    ins = operands.instruction
    match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", ins.operands[1])
    if not match:
        raise operands.refuse("a parameter's address in a register")
    name, offset = match.groups()
    dtype, start, write = np.dtype(TYPES[ins.type]), int(offset or 0), operands.write(0, ins.type)

    def execute(block, threads):
        bytes_ = block.parameters[name][start : start + dtype.itemsize]
        write(block, threads, np.frombuffer(bytes_, dtype)[0])

    return execute


def store(operands: Operands):
    ins, space = operands.instruction, _space(operands)
    size = np.dtype(TYPES[ins.type]).itemsize
    reads, address = operands.reads(1, f"b{8 * size}"), operands.address(0)

    def execute(block, threads):
        where = address(block, threads)
        data = np.empty((len(where), len(reads)), BITS[size])
        for k, read in enumerate(reads):
            data[:, k] = read(block, threads)
        data = data.view(np.uint8)
        if space == "global":
            block.memory.store(where, data, ins.text)
        else:
            at = block.shared.where(where, data.shape[1], ins.text)
            block.shared.store(at, data, _warps(block, threads), ins.text)

    return execute


class CopyGroups:
    """The groups of copies of each warp: committed ones, oldest first, and the open one at the end."""

    def __init__(self, warps: int):
        self._groups = [deque([[]]) for _ in range(warps)]

    def add(self, warp: int, copy: tuple) -> None:
        self._groups[warp][-1].append(copy)

    def commit(self, warp: int) -> None:
        self._groups[warp].append([])

    def wait(self, warp: int, keep: int) -> list:
        """Return the copies of all committed groups but the `keep` youngest."""
        groups, done = self._groups[warp], []
        while len(groups) - 1 > keep:
            done += groups.popleft()
        return done

    def unfinished(self) -> bool:
        return any(group for groups in self._groups for group in groups)


def copy(operands: Operands):
    """Decode cp.async [shared], [global], size, source size: what lies beyond the source size becomes 0."""
    ins = operands.instruction
    target, source, size = operands.address(0), operands.address(1), int(ins.operands[2], 0)
    source_size = operands.read(3, "u32") if len(ins.operands) > 3 else lambda block, threads: np.uint32(size)

    def execute(block, threads):
        to, origin, warps = target(block, threads), source(block, threads), _warps(block, threads)
        sizes = np.broadcast_to(source_size(block, threads), to.shape)
        data = np.zeros((len(to), size), np.uint8)
        for n in np.unique(sizes[sizes > 0]):
            lanes = sizes == n
            data[lanes, :n] = block.memory.load(origin[lanes], int(n), ins.text, aligned=n == size)
        at = block.shared.where(to, size, ins.text)
        block.shared.begin_copy(at, warps, ins.text)
        for warp in np.unique(warps):
            block.copies.add(warp, (at[warps == warp], data[warps == warp]))

    return execute


def _groups(operands: Operands):
    ins = operands.instruction
    commits = ins.modifiers[1] == "commit_group"
    keep = int(ins.operands[0], 0) if ins.operands else 0

    def execute(block, threads):
        for warp in np.unique(_warps(block, threads)):
            if commits:
                block.copies.commit(warp)
                continue
            for at, data in block.copies.wait(warp, keep):
                block.shared.land(at, data, warp)

    return execute


INSTRUCTIONS = {
    "ld": load, "st": store, "cp.async": copy, "cp.async.commit_group": _groups, "cp.async.wait_group": _groups,
    "cp.async.wait_all": _groups,
}  # fmt: skip
