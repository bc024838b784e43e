"""Finds accesses to shared memory that no barrier orders, by vector clocks (the FastTrack algorithm).

Agents are the warps, and the mbarriers as the writers of bulk copies. Each agent counts its own time. A warp's clock
says how much of every agent's past it is ordered behind; barriers join clocks. A byte remembers who wrote it when, and
when each warp last read it. An access is a race if the byte's past is not in the warp's clock. The order in which the
emulator happens to run the warps does not matter.
"""

import numpy as np

from .faults import NotEmulated, Race

MOST_MBARRIERS = 64


class Clocks:
    def __init__(self, warps: int, size: int):
        self.warps = warps
        self._now = np.zeros((warps, warps + MOST_MBARRIERS), np.int32)
        self._now[np.arange(warps), np.arange(warps)] = 1
        self._mbarriers: dict[int, int] = {}  # shared address: agent
        self._retired: dict[int, int] = {}  # shared address: time of the last mbarrier there, when it was invalidated
        self._writer = np.zeros(size, np.int16)
        self._written = np.zeros(size, np.int32)
        self._read = np.zeros((warps, size), np.int32)

    # ------------------------------------------------------------------------------------------------ accesses

    def read(self, at: np.ndarray, warps: np.ndarray, what: str) -> None:
        """Check and record that each warp of `warps` (n,) reads bytes `at` (n, size)."""
        self.check_read(at, warps, what)
        self.record_read(at, warps)

    def check_read(self, at: np.ndarray, warps: np.ndarray, what: str) -> None:
        self._check_writer(at, warps[:, None], what, "reads", True)

    def record_read(self, at: np.ndarray, warps: np.ndarray) -> None:
        self._read[warps[:, None], at] = self._now[warps, warps][:, None]

    def check_write(self, at: np.ndarray, warps: np.ndarray, what: str, changed=True) -> None:
        self._check_writer(at, warps[:, None], what, "overwrites", changed)
        for reader in range(self.warps):
            early = (self._read[reader][at] > self._now[warps, reader][:, None]) & changed
            if early.any():
                self._raise(at, early, warps, what, "overwrites", f"warp {reader} reads")

    def record_write(self, at: np.ndarray, agents, times=None) -> None:
        """Record that `agents` (one, or one for each byte of `at`) write. `times` default to the warps' present."""
        self._writer[at] = agents
        self._written[at] = self._now[agents, agents] if times is None else times

    def written(self, at: np.ndarray) -> np.ndarray:
        """Return which of the bytes anybody has written."""
        return self._written[at] > 0

    def _check_writer(self, at, warps, what, does, changed) -> None:
        writer = self._writer[at]
        early = (self._written[at] > self._now[warps, writer]) & changed
        if early.any():
            agent = int(writer[early][0])
            who = f"warp {agent} writes" if agent < self.warps else "a bulk copy writes"
            self._raise(at, early, warps[:, 0], what, does, who)

    @staticmethod
    def _raise(at, early, warps, what, does, other) -> None:
        lane = int(np.nonzero(early)[0][0])
        where = int(at[early][0])
        raise Race(f"{what}: warp {int(warps[lane])} {does} shared address {where}, which {other}; no barrier between")

    # ------------------------------------------------------------------------------------------------ barriers

    def join(self, warps: np.ndarray) -> None:
        """Order each of the warps behind all of them: they have met at a barrier."""
        self._now[warps] = self._now[warps].max(0)
        self._now[warps, warps] += 1

    def agent(self, address: int) -> int:
        """Return the number of the mbarrier at a shared address. A later one at the same place has the same number."""
        if address not in self._mbarriers and len(self._mbarriers) == MOST_MBARRIERS:
            raise NotEmulated(f"more than {MOST_MBARRIERS} mbarriers")
        return self._mbarriers.setdefault(address, self.warps + len(self._mbarriers))

    def of_mbarrier(self, address: int) -> np.ndarray:
        """Return the clock of an mbarrier at which nobody has arrived. Its own time goes on from the last one's."""
        clock = np.zeros_like(self._now[0])
        clock[self.agent(address)] = self._retired.get(address, 0)
        return clock

    def retire(self, address: int, clock: np.ndarray) -> None:
        self._retired[address] = clock[self.agent(address)]

    def release(self, warp: int) -> np.ndarray:
        """Return the clock of a warp that arrives at an mbarrier."""
        clock = self._now[warp].copy()
        self._now[warp, warp] += 1
        return clock

    def acquire(self, warp: int, clock: np.ndarray) -> None:
        """Order a warp behind those whose clocks were released into `clock`."""
        np.maximum(self._now[warp], clock, out=self._now[warp])
