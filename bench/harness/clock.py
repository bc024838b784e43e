"""How one call is timed and weighed: on the host, or on a CUDA or ROCm device. No other part knows the difference."""

import gc
import time

import torch

MIB = 1 << 20


class Host:
    """Wall clock; memory is measured in processes of their own (see: memory.py)."""

    device = torch.device("cpu")

    def seconds(self, call) -> float:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # its release is no part of the measurement, and must not overlap the next one
        return elapsed

    def free_bytes(self) -> int | None:
        return None

    def queue_seconds(self, call) -> float | None:
        return None

    def weigh(self, case, calls: dict) -> dict[str, float]:
        from bench.harness.memory import weigh

        return weigh(case, calls)


class Device:
    """Events around the call on the device's own stream, each time with cold caches.

    Before the first event the device overwrites a buffer of several times its L2 cache, then idles for COVER_CYCLES,
    while the host queues the call: what is timed is the device's work, not Python's. A call that waits for the device
    itself (to read a number of rows back, say) is timed with that wait. `queue_seconds` is the host's part.
    """

    COVER_CYCLES = 4_000_000  # about 2 ms
    LEAST_FLUSH = 256 * MIB

    def __init__(self, device: str = "cuda"):
        self.device = torch.device(device)
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flush = torch.empty(max(self.LEAST_FLUSH, 4 * cache), dtype=torch.int8, device=self.device)

    def seconds(self, call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        torch.cuda._sleep(self.COVER_CYCLES)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def free_bytes(self) -> int:
        """What a call may take: free memory, and what torch's allocator holds unused."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def queue_seconds(self, call) -> float:
        """The host's time until the call is queued (or returns, where it waits for the device); best of three."""
        best = float("inf")
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = call()
            best = min(best, time.perf_counter() - start)
            del result
        torch.cuda.synchronize()
        return best

    def weigh(self, case, calls: dict) -> dict[str, float]:
        return {name: self._extra_mib(call) for name, call in calls.items()}

    def _extra_mib(self, call) -> float:
        """Peak of the memory that torch's allocator hands out during one call, over that before it; MiB."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / MIB
