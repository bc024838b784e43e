"""A benchmark case: what is computed, on which shape, and how much work that is by formula."""

from dataclasses import dataclass, replace

import torch

from bench.harness import peers as registry
from bench.harness import shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMULS = {"linear forward+backward": 3}  # minimum: logits, gradient of hidden, gradient of weight; other subjects: 1
PASSES = {"logits backward": 2}  # reads the logits and writes their gradient; other subjects read once
BYTE_PASSES = {"linear forward+backward": 2}  # reads hidden and weight, writes their gradients


@dataclass(frozen=True)
class Case:
    """One line of a results table. Subjects are listed in peers.SUBJECTS (CPU) and peers_gpu.SUBJECTS."""

    subject: str
    shape: str  # a name for shapes.find
    rows: int
    dtype: str = "fp32"
    rounds: int = 5
    without: tuple[str, ...] = ()  # peers to skip, to save time
    memory: bool = False  # also measure extra memory
    isa: str | None = None  # limit oneDNN to this instruction set (ONEDNN_MAX_CPU_ISA), to imitate an older CPU
    upcast: bool = False  # give ours float32 hidden states, so that it upcasts bfloat16 weights on any CPU
    gpu: bool = False  # compare with the GPU peers
    only: tuple[str, ...] = ()  # peers of the record; (): all

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
        """Return the minimum flops of the matmuls; None if they depend on the mask."""
        if not self.linear or self.subject == "linear masked":
            return None
        return MATMULS.get(self.subject, 1) * shapes.linear_flops(self.rows, shapes.find(self.shape))

    def bytes(self) -> int | None:
        """Return the minimum memory traffic; None if it depends on the mask."""
        shape, size = shapes.find(self.shape), self.torch_dtype.itemsize
        if self.subject == "linear masked":
            return None
        if self.linear:
            return BYTE_PASSES.get(self.subject, 1) * shapes.linear_bytes(self.rows, shape, size)
        return PASSES.get(self.subject, 1) * shapes.logits_bytes(self.rows, shape, size)

    def share_of_ceiling(self, baseline: str) -> float | None:
        """Return the subject's work over the baseline's if the baseline is a ceiling: matmuls or a copy. Else None."""
        if baseline == registry.DEVICE_COPY:  # a copy makes two passes: it reads and writes
            return PASSES.get(self.subject, 1) / 2
        return 1.0 if baseline in (registry.BARE_MATMUL, registry.THREE_MATMULS) else None

    def for_peer(self, name: str, inputs: registry.Inputs) -> registry.Inputs:
        if self.upcast and name.startswith(registry.OURS):
            return replace(inputs, hidden=inputs.hidden.float())
        return inputs
