"""Barriers: bar.sync with its numbers, and mbarriers in shared memory.

A thread that has to wait is blocked, and the scheduler runs others. `mbarrier.try_wait` blocks until its phase is
complete, so the loops around it do not spin.
"""

from dataclasses import dataclass, field

import numpy as np

from .faults import Fault
from .operands import Operands


@dataclass
class NamedBarrier:
    expected: int  # number of threads
    arrived: np.ndarray  # (threads of the block,) bool


def synchronize(operands: Operands):
    """Decode bar.sync and barrier.sync: number, and how many threads meet (default: all of the block)."""
    ins = operands.instruction
    number = operands.read(0, "u32")
    count = operands.read(1, "u32") if len(ins.operands) > 1 else None

    def execute(block, threads):
        for warp in np.unique(block.thread[threads] // 32):
            own = block.of_warp(warp, threads)
            expected = int(np.max(count(block, own))) if count else len(block.thread)
            _arrive(block, own, int(np.max(number(block, own))), expected, ins.text)

    return execute


def _arrive(block, threads, number: int, expected: int, what: str) -> None:
    barrier = block.barriers.setdefault(number, NamedBarrier(expected, np.zeros(len(block.thread), bool)))
    if barrier.expected != expected:
        raise Fault(f"{what}: others wait for {barrier.expected} threads at barrier {number}")
    barrier.arrived[threads] = True
    block.proceed(threads)
    block.blocked[threads] = True
    if barrier.arrived.sum() >= expected:
        if barrier.arrived.sum() > expected:
            raise Fault(f"{what}: {barrier.arrived.sum()} threads arrive at barrier {number} of {expected}")
        block.blocked[barrier.arrived] = False
        block.clocks.join(np.unique(block.thread[barrier.arrived] // 32))
        del block.barriers[number]


@dataclass
class MBarrier:
    """A phase completes when `count` threads have arrived and all announced bytes are there."""

    agent: int  # its number among the agents of races.py
    count: int
    arrivals: int  # still missing in this phase
    clock: np.ndarray  # what the arrivals are ordered behind; its own entry counts the phases that this place has seen
    bytes: int = 0  # still missing
    phases: int = 0  # completed ones
    copies: list = field(default_factory=list)  # of this phase
    landing: list = field(default_factory=list)  # complete, but nothing has waited for them yet
    completed: np.ndarray | None = None  # the clock that the completed phases hand to those who wait
    waiting: np.ndarray | None = None  # (threads of the block,) bool

    def complete_if_done(self, block) -> None:
        if self.arrivals or self.bytes:
            return
        self.phases += 1
        self.arrivals = self.count
        self.clock[self.agent] += 1
        self.completed = self.clock.copy()
        self.landing += [(*copy, self.agent, self.clock[self.agent]) for copy in self.copies]
        self.copies = []
        block.blocked[self.waiting] = False
        self.waiting[:] = False

    def describe(self, address: int) -> str:
        """Say what is missing of the phase that has not completed."""
        return (
            f"phase {self.phases} of the mbarrier at shared address {address}, where {self.arrivals} of {self.count} "
            f"arrivals and {self.bytes} bytes are missing"
        )

    def land(self, block) -> None:
        for copy in self.landing:
            block.shared.land(*copy)
        self.landing = []


def find(block, address: int, warp: int, what: str) -> MBarrier:
    """Return the mbarrier at an address, which counts as a read: a warp must be ordered behind its initialisation."""
    if address not in block.mbarriers:
        raise Fault(f"{what}: there is no mbarrier at shared address {address}")
    block.clocks.read(*_place(block, address, warp, what), what)
    return block.mbarriers[address]


def _place(block, address: int, warp: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    return block.shared.where(np.array([address]), 8, what), np.array([warp])


def _claim(block, address: int, warp: int, what: str) -> None:
    """Note that a warp makes or ends an mbarrier, which counts as a write."""
    at, warps = _place(block, address, warp, what)
    block.clocks.check_write(at, warps, what)
    block.clocks.record_write(at, warp)


def _init(operands: Operands):
    ins, address, count = operands.instruction, operands.address(0), operands.read(1, "u32")

    def execute(block, threads):
        for at, thread in zip(address(block, threads).tolist(), block.thread[threads].tolist(), strict=True):
            _claim(block, at, thread // 32, ins.text)
            n = int(np.max(count(block, threads)))
            clock, waiting = block.clocks.of_mbarrier(at), np.zeros(len(block.thread), bool)
            block.mbarriers[at] = MBarrier(block.clocks.agent(at), n, n, clock, waiting=waiting)

    return execute


def _invalidate(operands: Operands):
    ins, address = operands.instruction, operands.address(0)

    def execute(block, threads):
        for at, thread in zip(address(block, threads).tolist(), block.thread[threads].tolist(), strict=True):
            barrier = find(block, at, thread // 32, ins.text)
            _claim(block, at, thread // 32, ins.text)
            if barrier.copies or barrier.landing:
                raise Fault(f"{ins.text}: nothing has waited for a bulk copy of this mbarrier")
            del block.mbarriers[at]
            block.clocks.retire(at, barrier.clock)

    return execute


def _arrival(operands: Operands):
    ins, address = operands.instruction, operands.address(1)
    expects = "expect_tx" in ins.modifiers
    amount = operands.read(2, "u32") if len(ins.operands) > 2 else None

    def execute(block, threads):
        n = int(np.max(amount(block, threads))) if amount else 1
        for at, thread in zip(address(block, threads).tolist(), block.thread[threads].tolist(), strict=True):
            barrier = find(block, at, thread // 32, ins.text)
            barrier.bytes += n if expects else 0
            barrier.arrivals -= 1 if expects else n
            if barrier.arrivals < 0:
                raise Fault(f"{ins.text}: more arrivals than the {barrier.count} of the mbarrier at {at}")
            np.maximum(barrier.clock, block.clocks.release(thread // 32), out=barrier.clock)
            barrier.complete_if_done(block)

    return execute


def _wait(operands: Operands):
    """Decode try_wait.parity: true once the phase of this parity is complete."""
    ins, address, parity = operands.instruction, operands.address(1), operands.read(2, "u32")
    write = operands.write(0, "pred")

    def execute(block, threads):
        for warp in np.unique(block.thread[threads] // 32):
            own = block.of_warp(warp, threads)
            places, parities = np.unique(address(block, own)), np.unique(parity(block, own) & np.uint32(1))
            if len(places) > 1 or len(parities) > 1:
                raise operands.refuse("lanes of one warp that wait for different phases")
            barrier = find(block, int(places[0]), warp, ins.text)
            if barrier.phases & 1 == parities[0]:
                barrier.waiting[own] = True
                block.blocked[own] = True
                block.awaited[warp] = (barrier, int(places[0]))
                continue
            barrier.land(block)
            if barrier.completed is not None:
                block.clocks.acquire(warp, barrier.completed)
            write(block, own, True)
            block.proceed(own)

    return execute


MOVING = {"bar.sync": synchronize, "barrier.sync": synchronize, "mbarrier.try_wait": _wait}
INSTRUCTIONS = {"mbarrier.init": _init, "mbarrier.inval": _invalidate, "mbarrier.arrive": _arrival}
