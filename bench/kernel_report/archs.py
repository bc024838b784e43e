"""The architectures of the report, and what one of their processors holds."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def sources() -> str:
    """Return a digest of the kernels and their launchers. The report keeps it, so that a test sees an old report."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Arch:
    """Resources of one processor (SM, CU), from the CUDA C++ Programming Guide's table and the CDNA3 ISA manual."""

    target: int | str
    shared_kib: int  # limit for one program
    shared_total_kib: int
    warps: int
    registers: int  # 32-bit registers
    tensor_core: str  # pattern of the matmul instruction in machine code
    processors: int  # of a common device

    @property
    def hip(self) -> bool:
        return isinstance(self.target, str)

    @property
    def lanes(self) -> int:
        return 64 if self.hip else 32


ARCHS = {
    "sm_80": Arch(80, 163, 164, 64, 65536, r"\bHMMA", 108),
    "sm_90": Arch(90, 227, 228, 64, 65536, r"\bHGMMA", 132),
    "sm_100": Arch(100, 227, 228, 64, 65536, r"\bUTC\w*MMA", 148),
    "sm_120": Arch(120, 99, 100, 48, 65536, r"\bHMMA", 170),
    "gfx942": Arch("gfx942", 64, 64, 32, 131072, r"\bv_mfma", 304),
}
