"""Global memory, which is the tensors of one launch, and the shared memory of one block. Both check every access."""

import ctypes
import itertools

import numpy as np
import torch

from .faults import EarlyAccess, Misaligned, OutOfBounds, Unwritten
from .races import Clocks

MOST_PIECES = 4096  # of one tensor


class GlobalMemory:
    """The bytes that the tensors of a launch own. The gaps between the rows of a strided tensor belong to nobody."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        pieces = sorted((*piece, name) for name, tensor in tensors.items() for piece in _pieces(tensor))
        self.names = [name for *_, name in pieces]
        self._starts = np.array([start for start, *_ in pieces], np.int64)
        self._ends = np.array([end for _, end, _ in pieces], np.int64)
        for k in range(1, len(pieces)):  # tensors may overlap: each end is the furthest so far
            self._ends[k] = max(self._ends[k], self._ends[k - 1] if self._starts[k] < self._ends[k - 1] else 0)
        self._base = int(self._starts[0]) if pieces else 0
        span = int(self._ends.max()) - self._base if pieces else 0
        # The tensors lie where torch put them. What lies between them is never touched: see `check`.
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self._base)) if pieces else None

    def check(self, addresses: np.ndarray, size: int, what: str, aligned: bool = True) -> None:
        """Raise if any of the accesses of `size` bytes lies outside of every tensor."""
        k = np.searchsorted(self._starts, addresses, "right") - 1
        inside = (k >= 0) & (addresses + size <= self._ends[np.maximum(k, 0)])
        if not inside.all():
            address = int(addresses[~inside][0])
            raise OutOfBounds(f"{what}: {size} bytes at {self._place(address)} lie outside of every tensor")
        if aligned and (addresses % size).any():
            raise Misaligned(f"{what}: an address is not a multiple of {size}")

    def _place(self, address: int) -> str:
        if not self.names:
            return f"{address:#x}"
        k = max(int(np.searchsorted(self._starts, address, "right")) - 1, 0)
        offset, size = address - int(self._starts[k]), int(self._ends[k] - self._starts[k])
        return f"byte {offset} of {self.names[k]!r}, {size} bytes long,"

    def load(self, addresses: np.ndarray, size: int, what: str, aligned: bool = True) -> np.ndarray:
        """Return (n, size) bytes."""
        self.check(addresses, size, what, aligned)
        return self._bytes[(addresses - self._base)[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, data: np.ndarray, what: str) -> None:
        self.check(addresses, data.shape[1], what)
        self._bytes[(addresses - self._base)[:, None] + np.arange(data.shape[1])] = data


def _pieces(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return the (start, end) of each run of bytes that a tensor owns."""
    if not tensor.numel():
        return []
    size, start = tensor.element_size(), tensor.data_ptr()
    dims = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and stride)
    run = 1
    while dims and dims[0][0] == run:
        run *= dims.pop(0)[1]
    if int(np.prod([n for _, n in dims])) > MOST_PIECES:
        run, dims = sum((n - 1) * stride for stride, n in dims) + run, []
    offsets = itertools.product(*(range(0, stride * n, stride) for stride, n in dims))
    starts = [start + size * sum(offset) for offset in offsets]
    return [(one, one + size * run) for one in starts]


class SharedMemory:
    """The shared memory of one block. It starts as NaN, and knows which bytes an asynchronous operation still uses."""

    def __init__(self, size: int, clocks: Clocks):
        self.size, self.clocks = size, clocks
        self.bytes = np.full(size, 0xFF, np.uint8)
        self._landing = np.zeros(size, bool)  # a copy into this byte is on its way
        self._reading = np.zeros(size, np.uint8)  # number of matmuls that have yet to read this byte

    def where(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """Return the (n, size) indices of n accesses."""
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > self.size):
            beyond = int(addresses.max()) + size
            raise OutOfBounds(f"{what}: shared memory has {self.size} bytes, and the access reaches {beyond}")
        if (addresses % size).any():
            raise Misaligned(f"{what}: a shared address is not a multiple of {size}")
        return addresses[:, None] + np.arange(size)

    def load(self, at: np.ndarray, warps: np.ndarray, what: str) -> np.ndarray:
        """Return the bytes at `at` (n, size), which lanes of `warps` (n,) read."""
        self._refuse_landing(at, what)
        self._refuse_unwritten(at, what)
        self.clocks.read(at, warps, what)
        return self.bytes[at]

    def store(self, at: np.ndarray, data: np.ndarray, warps: np.ndarray, what: str) -> None:
        self._refuse_landing(at, what)
        self._refuse_reading(at, what)
        changed = self.bytes[at] != data  # warps may write equal values to one place
        self.clocks.check_write(at, warps, what, changed)
        self.clocks.record_write(at, warps[:, None])
        self.bytes[at] = data

    def begin_copy(self, at: np.ndarray, warps: np.ndarray, what: str) -> None:
        """Poison the bytes that a copy will fill. It lands with `land`."""
        self._refuse_landing(at, what)
        self._refuse_reading(at, what)
        self.clocks.check_write(at, warps, what)
        self._landing[at] = True
        self.bytes[at] = 0xFF

    def land(self, at: np.ndarray, data: np.ndarray, agent: int, time: int | None = None) -> None:
        """Let a copy land, as written by `agent` (a warp or an mbarrier) at a time of the agent (its present)."""
        self._landing[at] = False
        self.bytes[at] = data
        self.clocks.record_write(at, agent, time)

    def begin_read(self, at: np.ndarray, warps: np.ndarray, what: str) -> None:
        """Note that a matmul reads these bytes until `end_read`."""
        self._refuse_landing(at, what)
        self._refuse_unwritten(at, what)
        self.clocks.check_read(at, warps, what)
        self._reading[at] += 1

    def end_read(self, at: np.ndarray, warps: np.ndarray) -> np.ndarray:
        self._reading[at] -= 1
        self.clocks.record_read(at, warps)
        return self.bytes[at]

    def _refuse_unwritten(self, at: np.ndarray, what: str) -> None:
        written = self.clocks.written(at)
        if not written.all():
            raise Unwritten(f"{what}: nobody has written shared address {int(at[~written][0])}")

    def _refuse_landing(self, at: np.ndarray, what: str) -> None:
        if self._landing[at].any():
            where = int(at[self._landing[at]][0])
            raise EarlyAccess(f"{what}: nothing has waited for the copy into shared address {where}")

    def _refuse_reading(self, at: np.ndarray, what: str) -> None:
        if self._reading[at].any():
            where = int(at[self._reading[at] > 0][0])
            raise EarlyAccess(f"{what}: nothing has waited for the wgmma that reads shared address {where}")
