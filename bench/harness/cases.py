"""One line of a results table: what is computed, on what shape, and how much work that is by formula."""

from dataclasses import dataclass, replace

import torch

from bench.harness import peers as registry
from bench.harness import shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMULS = {"linear forward+backward": 3}  # the least: logits, gradient of hidden, gradient of weight; else 1
PASSES = {"logits backward": 2}  # logits read, their gradient written; else read once
BYTE_PASSES = {"linear forward+backward": 2}  # hidden and weight read, their gradients written


@dataclass(frozen=True)
class Case:
    """Subjects: see peers.SUBJECTS (CPU) and peers_gpu.SUBJECTS."""

    subject: str
    shape: str  # a name that shapes.find knows
    rows: int
    dtype: str = "fp32"
    rounds: int = 5
    without: tuple[str, ...] = ()  # peers to leave out, to save time
    memory: bool = False  # measure extra memory too
    isa: str | None = None  # hold oneDNN to this instruction set (ONEDNN_MAX_CPU_ISA): stands in for an older chip
    upcast: bool = False  # ours gets hidden as float32, so that it upcasts bfloat16 weights whatever the chip
    gpu: bool = False  # the peers of a GPU

    @property
    def name(self) -> str:
        held = f" {self.isa}" if self.isa else ""
        return f"{self.subject} {self.shape} N={self.rows} {self.dtype}{held}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def linear(self) -> bool:
        return self.subject.startswith("linear")

    def flops(self) -> int | None:
        """Matrix arithmetic, at least; None where the subject is not a fixed amount of it."""
        if not self.linear or self.subject == "linear masked":
            return None
        return MATMULS.get(self.subject, 1) * shapes.linear_flops(self.rows, shapes.find(self.shape))

    def bytes(self) -> int | None:
        """Traffic, at least; None where the subject is not a fixed amount of it."""
        shape, size = shapes.find(self.shape), self.torch_dtype.itemsize
        if self.subject == "linear masked":
            return None
        if self.linear:
            return BYTE_PASSES.get(self.subject, 1) * shapes.linear_bytes(self.rows, shape, size)
        return PASSES.get(self.subject, 1) * shapes.logits_bytes(self.rows, shape, size)

    def share_of_ceiling(self, baseline: str) -> float | None:
        """The subject's work over that of the baseline, if the baseline is a ceiling: matmuls, or bytes copied."""
        if baseline == registry.DEVICE_COPY:  # reads and writes: two passes
            return PASSES.get(self.subject, 1) / 2
        return 1.0 if baseline in (registry.BARE_MATMUL, registry.THREE_MATMULS) else None

    def for_peer(self, name: str, inputs: registry.Inputs) -> registry.Inputs:
        if self.upcast and name.startswith(registry.OURS):
            return replace(inputs, hidden=inputs.hidden.float())
        return inputs
