"""From instructions to steps: functions of a block and its threads, with the guard under which they run."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import arithmetic, barriers, hopper, lanes, loads, matrix
from .faults import NotEmulated
from .operands import Operands, Read
from .parse import Instruction, Program


class Step(NamedTuple):
    execute: Callable  # (block, threads)
    guard: Read | None  # the threads that execute it
    moves: bool  # whether it sets the threads' program counters, or blocks them


def branch(operands: Operands):
    target = operands.program.labels[operands.instruction.operands[0]]

    def execute(block, threads):
        block.pc[threads] = target

    return execute


def branch_by_table(operands: Operands):
    """Decode brx.idx index, table: to the label at that index."""
    table = operands.program.tables[operands.instruction.operands[1]]
    targets, index = np.array([operands.program.labels[label] for label in table]), operands.read(0, "u32")

    def execute(block, threads):
        block.pc[threads] = targets[index(block, threads)]

    return execute


def leave(operands: Operands):
    def execute(block, threads):
        block.alive[threads] = False

    return execute


def nothing(operands: Operands):
    """Decode what has no effect here: fences (accesses are in order), hints, and reallocations of registers."""
    return lambda block, threads: None


def hint(operands: Operands):
    write = operands.write(0, "b64")
    return lambda block, threads: write(block, threads, np.uint64(0))


MOVING = {"bra": branch, "brx": branch_by_table, "ret": leave, "exit": leave} | barriers.MOVING
INSTRUCTIONS = (
    arithmetic.INSTRUCTIONS | lanes.INSTRUCTIONS | loads.INSTRUCTIONS | matrix.INSTRUCTIONS | barriers.INSTRUCTIONS
    | hopper.INSTRUCTIONS | {"createpolicy": hint}
    | dict.fromkeys("fence membar griddepcontrol setmaxnreg prefetch nanosleep wgmma.fence bar.warp".split(), nothing)
)  # fmt: skip


def decode(program: Program, instruction: Instruction) -> Step:
    """Look the instruction up by its longest known prefix: cp.async.bulk is another one than cp.async."""
    words = (instruction.name, *instruction.modifiers)
    for n in range(min(3, len(words)), 0, -1):
        name = ".".join(words[:n])
        if name in MOVING or name in INSTRUCTIONS:
            operands = Operands(program, instruction)
            make = MOVING.get(name) or INSTRUCTIONS[name]
            return Step(make(operands), instruction.guard and _guard(operands), name in MOVING)
    raise NotEmulated(f"no such instruction: {instruction.text}")


def _guard(operands: Operands) -> Read:
    ins = operands.instruction
    if ins.unless:
        return lambda block, threads: ~block.registers[ins.guard][threads]
    return lambda block, threads: block.registers[ins.guard][threads]
