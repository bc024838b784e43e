"""One block of threads, and the order in which its warps run.

Each thread has a program counter. Of the threads that may run, those with the lowest counter run together, so that
branches come together again where they meet. A warp runs until all of its threads wait or have ended; then another one
runs. The orders are

    "lockstep"     all warps at once, as far as they are at the same instruction
    "up", "down"   one warp after another, each as far as it gets
    a number       seed of a random order, in which a warp is interrupted after some branches and barriers
"""

import numpy as np

from .barriers import MBarrier, NamedBarrier
from .decode import Step, decode
from .faults import Deadlock, Fault, Unfinished
from .loads import CopyGroups
from .memory import GlobalMemory, SharedMemory
from .operands import GARBAGE, storage
from .parse import Program
from .races import Clocks

MOST_STEPS = 20_000_000
FOREVER = 1 << 60
MOST_STEPS_IN_A_TURN = 40  # branches and barriers, in a random order


class Block:
    def __init__(
        self, program: Program, memory: GlobalMemory, parameters: dict[str, bytes], boxes: dict, shared: int,
        index: tuple[int, int, int], grid: tuple[int, int, int],
    ):  # fmt: skip
        n = program.threads
        self.program, self.memory, self.parameters, self.boxes = program, memory, parameters, boxes
        self.warps, self.thread = n // 32, np.arange(n)
        self.clocks = Clocks(self.warps, shared)
        self.shared = SharedMemory(shared, self.clocks)
        self.registers = _registers(program) | _special_registers(n, index, grid)
        self.pc = np.zeros(n, np.int64)
        self.alive, self.blocked = np.ones(n, bool), np.zeros(n, bool)
        self.barriers: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[int, MBarrier] = {}
        self.copies, self.matmuls = CopyGroups(self.warps), CopyGroups(self.warps)
        self.awaited: dict[int, tuple[MBarrier, int]] = {}  # by warp: the mbarrier that it waited for last, its address
        self._targets = frozenset(program.labels.values())
        self._steps = 0

    # --------------------------------------------------------------------------------- for instructions that move

    def proceed(self, threads) -> None:
        """Let threads go on behind the present instruction."""
        self.pc[threads] += 1

    def of_warp(self, warp: int, threads) -> np.ndarray:
        """Return those of `threads` that belong to a warp."""
        own = self.thread[threads]
        return own[own // 32 == warp]

    # ------------------------------------------------------------------------------------------------ scheduling

    def run(self, order: str | int) -> None:
        turns = _turns(order, self.warps)
        with np.errstate(all="ignore"):
            while self.alive.any():
                if self.blocked[self.alive].all():
                    raise Deadlock(self._why())
                self._run_warps(*next(turns))
        self._expect_finished()

    def _run_warps(self, warps: range, most: int) -> None:
        """Run some warps until they wait or end, or for `most` steps that move."""
        ours = np.zeros(len(self.thread), bool)
        for warp in warps:
            ours[32 * warp : 32 * warp + 32] = True
        for _ in range(most):
            ready = ours & self.alive & ~self.blocked
            if not ready.any():
                return
            at = int(self.pc[ready].min())
            here = ready & (self.pc == at)
            self._run_straight(at, _compact(here), bool((here == ready).all()))

    def _run_straight(self, at: int, threads, alone: bool) -> None:
        """Run from `at` to a step that moves, or to a label where threads that ran ahead may wait."""
        code = self.program.code
        while True:
            step = code[at]
            if step is None:
                step = code[at] = decode(self.program, self.program.instructions[at])
            self._steps += 1
            if step.moves:
                self.pc[threads] = at
                self._run_step(step, threads)
                break
            self._run_step(step, threads)
            at += 1
            if not alone and at in self._targets:
                self.pc[threads] = at
                break
        if self._steps > MOST_STEPS:
            raise Fault(f"the program does not end within {MOST_STEPS} steps")

    def _run_step(self, step: Step, threads) -> None:
        if step.guard is None:
            step.execute(self, threads)
            return
        chosen = step.guard(self, threads)
        if chosen.all():
            step.execute(self, threads)
            return
        everyone = self.thread[threads]
        if step.moves:
            self.proceed(everyone[~chosen])
        if chosen.any():
            step.execute(self, everyone[chosen])

    def _why(self) -> str:
        """Say what each warp waits for."""
        waiting: dict[str, list[str]] = {}
        for warp in range(self.warps):
            if self.alive[32 * warp : 32 * warp + 32].any():
                waiting.setdefault(self._what_a_warp_waits_for(warp), []).append(str(warp))
        parts = (f"warp{'s' * (len(warps) > 1)} {', '.join(warps)}: {what}" for what, warps in waiting.items())
        return "; ".join(("every warp waits", *parts))

    def _what_a_warp_waits_for(self, warp: int) -> str:
        for number, barrier in self.barriers.items():
            if barrier.arrived[32 * warp : 32 * warp + 32].any():
                return f"barrier {number}, where {barrier.arrived.sum()} of {barrier.expected} threads are"
        mbarrier, address = self.awaited[warp]
        return mbarrier.describe(address)

    def _expect_finished(self) -> None:
        if any(b.copies or b.landing for b in self.mbarriers.values()):
            raise Unfinished("the program ends, and nothing has waited for a bulk copy")
        if self.matmuls.unfinished():
            raise Unfinished("the program ends, and nothing has waited for a wgmma")
        if self.copies.unfinished():
            raise Unfinished("the program ends, and nothing has waited for a cp.async")


def _turns(order: str | int, warps: int):
    """Yield (warps that run together, steps that they have), for ever."""
    if order == "lockstep":
        while True:
            yield range(warps), FOREVER
    sequence = list(range(warps))
    random = None if isinstance(order, str) else np.random.default_rng(order)
    while True:
        if random:
            random.shuffle(sequence)
        for warp in reversed(sequence) if order == "down" else sequence:
            yield range(warp, warp + 1), FOREVER if random is None else int(random.integers(1, MOST_STEPS_IN_A_TURN))


def _compact(chosen: np.ndarray):
    """Return the indices of the chosen threads, as a slice if they are neighbours: arrays then need no copies."""
    indices = np.nonzero(chosen)[0]
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _registers(program: Program) -> dict[str, np.ndarray]:
    """Return all registers, full of garbage."""
    out = {}
    for dtype, garbage in GARBAGE.items():
        names = [name for name, type_ in program.registers.items() if storage(type_) == dtype]
        out |= zip(names, np.full((len(names), program.threads), garbage, dtype), strict=True)
    return out


def _special_registers(n: int, index, grid) -> dict[str, np.ndarray]:
    thread = np.arange(n, dtype=np.uint32)
    values = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32, "%ntid.x": n}
    values |= {f"%ctaid.{axis}": i for axis, i in zip("xyz", index, strict=True)}
    values |= {f"%nctaid.{axis}": i for axis, i in zip("xyz", grid, strict=True)}
    values |= {"%tid.y": 0, "%tid.z": 0, "%cluster_ctarank": 0, "%clusterid.x": index[0], "%cluster_ctaid.x": 0}
    return {name: np.broadcast_to(np.asarray(value, np.uint32), n).copy() for name, value in values.items()}
