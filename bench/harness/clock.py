"""Measure time and memory of one call, on the host or on a CUDA or ROCm device. Both clocks have one interface."""

import gc
import time

import torch

MIB = 1 << 20


class Host:
    """Wall clock. Memory is measured in separate processes (memory.py)."""

    device = torch.device("cpu")

    def seconds(self, call) -> float:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # free it outside the measurement, and before the next one
        return elapsed

    def free_bytes(self) -> int | None:
        return None

    def queue_seconds(self, call) -> float | None:
        return None

    def weigh(self, case, calls: dict) -> dict[str, float]:
        from bench.harness.memory import weigh

        return weigh(case, calls)


class Processor(Host):
    """Processor time of all threads of this process, for a machine on which other programs run."""

    def seconds(self, call) -> float:
        start = time.process_time()
        result = call()
        elapsed = time.process_time() - start
        del result
        return elapsed


class Device:
    """Device time between two events on the current stream, with cold caches.

    Before the first event, the device overwrites a buffer of four times its L2 cache and then idles for COVER_CYCLES.
    The host queues the call meanwhile, so the time excludes Python. If the call itself waits for the device, to read
    back a number of rows for example, the time includes that wait. `queue_seconds` gives the host's time.
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
        """Return the device memory that a call can use, after emptying the cache of torch's allocator."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def queue_seconds(self, call) -> float:
        """Return the host's time until the call returns: to queue it, plus any wait for the device. Best of three."""
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
        """Return by how many MiB the memory allocated by torch rises at its peak during one call."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / MIB
