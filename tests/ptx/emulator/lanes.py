"""What the 32 lanes of a warp do together: shuffles, reductions, votes."""

import numpy as np

from .faults import Fault
from .operands import TYPES, Operands

LANE = np.arange(32)


def whole_warps(block, threads, what: str) -> np.ndarray:
    """Return the numbers of the warps of `threads`, which must be whole warps."""
    own = block.thread[threads]
    if len(own) % 32 or (own[::32] % 32).any() or (len(own) > 32 and (own[31::32] - own[::32] != 31).any()):
        raise Fault(f"{what}: only a part of a warp executes it")
    return own[::32] // 32


def shuffle(operands: Operands):
    """Decode shfl.sync: each lane takes the value of another one; of itself, if that one is out of range.

    The third operand holds the clamp (bits 0 to 4) and the mask of the segment (bits 8 to 12).
    """
    ins = operands.instruction
    mode = ins.modifiers[1]
    target, _, valid = ins.operands[0].partition("|")
    a, b, c = (operands.read(k, "b32") for k in (1, 2, 3))
    named = _renamed(operands, target)
    write, write_valid = named.write(0, "b32"), _renamed(operands, valid).write(0, "pred") if valid else None

    def execute(block, threads):
        warps = whole_warps(block, threads, ins.text)
        values, by, bounds = (np.broadcast_to(x(block, threads), (len(warps) * 32,)) for x in (a, b, c))
        values, by, bounds = (x.reshape(-1, 32).astype(np.int64) for x in (values, by, bounds))
        segment, clamp = (bounds >> 8) & 31, bounds & 31
        most = (LANE & segment) | (clamp & ~segment)
        source = {
            "idx": (LANE & segment) | (by & ~segment & 31), "bfly": LANE ^ by, "up": LANE - by, "down": LANE + by,
        }[mode]  # fmt: skip
        inside = source >= most if mode == "up" else source <= most
        source = np.where(inside, source, LANE)
        write(block, threads, np.take_along_axis(values, source, 1).astype(np.uint32).ravel())
        if write_valid:
            write_valid(block, threads, inside.ravel())

    return execute


def _renamed(operands: Operands, target: str) -> Operands:
    """Return the operands with another first one: half of a pair `value|predicate`."""
    ins = operands.instruction
    fields = {**vars(ins), "operands": (target.strip(), *ins.operands[1:])}
    return Operands(operands.program, type(ins)(**fields))


def reduction(operands: Operands):
    ins = operands.instruction
    dtype, read, write = TYPES[ins.type], operands.read(1, ins.type), operands.write(0, ins.type)
    reduce = {
        "max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }[ins.modifiers[1]]  # fmt: skip

    def execute(block, threads):
        warps = whole_warps(block, threads, ins.text)
        values = np.broadcast_to(read(block, threads), (len(warps) * 32,)).reshape(-1, 32)
        write(block, threads, np.repeat(reduce(values, axis=1).astype(dtype), 32))

    return execute


def vote(operands: Operands):
    ins = operands.instruction
    mode = ins.modifiers[1]
    read, write = operands.read(1, "pred"), operands.write(0, "b32" if mode == "ballot" else "pred")

    def execute(block, threads):
        warps = whole_warps(block, threads, ins.text)
        votes = np.broadcast_to(read(block, threads), (len(warps) * 32,)).reshape(-1, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        else:
            result = {"any": np.any, "all": np.all}[mode](votes, axis=1)
        write(block, threads, np.repeat(result, 32))

    return execute


def elect(operands: Operands):
    """Decode elect.sync: it elects lane 0. A device may elect another one, but always the same."""
    lane, _, chosen = operands.instruction.operands[0].partition("|")
    write_lane = _renamed(operands, lane).write(0, "b32")
    write = _renamed(operands, chosen).write(0, "pred")

    def execute(block, threads):
        whole_warps(block, threads, operands.instruction.text)
        write_lane(block, threads, np.uint32(0))
        write(block, threads, block.thread[threads] % 32 == 0)

    return execute


INSTRUCTIONS = {"shfl": shuffle, "redux": reduction, "vote": vote, "elect": elect}
