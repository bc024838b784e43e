"""One row of the report: a recorded launch, compiled for its architecture, and the figures of its machine code."""

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .archs import ARCHS, Arch
from .calls import Call, kernel_of
from .code import main_width, widths
from .stand_in import Launch, on_device

# Static instruction counts of the epilogue, per logit. They include rarely taken branches (last tile, target).
INSTRUCTIONS = {
    "exp": r"\bMUFU\.EX2|\bv_exp_f32",
    "fp32": r"\bF(ADD|MUL|FMA|MNMX)\b|\bv_(add|sub|mul|fma|fmac|max|min|pk_\w+)_f32",
    "select": r"\b(FSEL|SEL|FSETP|ISETP)\b|\bv_cndmask|\bv_cmp_",
}


@dataclass(frozen=True)
class Row:
    kernel: str
    source: str  # the call: logits, linear, or chunked
    arch: str
    dtype: str
    full: bool  # entropy and mean; from a linear call also bias and softcap
    aligned: bool
    tma: bool
    tile: str
    warps: int
    registers: int
    spill_bytes: int
    shared_kib: float
    programs: int  # programs resident on one processor
    tensor_core_ops: int
    load_bytes: int  # by one lane in one instruction, of the loads that move most; TMA's copies do not count
    loads: str  # their number by bytes a lane: "16x4 8x1"
    store_bytes: int
    stores: str
    exp: float
    fp32: float
    select: float


def compile_launch(call: Call, launch: Launch) -> Row:
    arch = ARCHS[call.arch]
    binary = machine_code(call.arch, launch)
    usage = _amd_usage(binary.asm["amdgcn"]) if arch.hip else _nvidia_usage(binary.asm["cubin"])
    text = binary.asm["amdgcn" if arch.hip else "sass"]
    # Disassembly for Blackwell differs between toolkits, so search its PTX for the instruction.
    matmuls = len(re.findall(arch.tensor_core, binary.asm["ptx"] if call.arch == "sm_100" else text))
    warps = launch.options["num_warps"]
    tile, logits = _tile(launch)
    a_logit = max(1, logits // (warps * arch.lanes))
    mix = {name: round(len(re.findall(pattern, text)) / a_logit, 1) for name, pattern in INSTRUCTIONS.items()}
    shared = binary.metadata.shared / 1024
    moved = widths(text)
    return Row(
        kernel=kernel_of(launch), source=call.source, arch=call.arch, dtype=call.dtype, full=call.full,
        aligned=call.aligned, tma=any(kind.startswith("tensordesc") for kind in launch.signature.values()),
        tile=tile, warps=warps, **usage, shared_kib=shared,
        programs=_resident(arch, warps, usage["registers"], shared), tensor_core_ops=matmuls,
        load_bytes=main_width(moved["load"]), loads=_counts(moved["load"]),
        store_bytes=main_width(moved["store"]), stores=_counts(moved["store"]), **mix,
    )  # fmt: skip


def machine_code(arch: str, launch: Launch):
    """Compile a recorded launch."""
    import triton
    from triton.runtime.driver import driver

    fn = getattr(importlib.import_module(launch.module), launch.function)
    with on_device(arch):
        target = driver.active.get_current_target()
        fn.device_caches[driver.active.get_current_device()]  # picks the front end, Triton's or Gluon's
        source = fn.ASTSource(fn, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=target, options=launch.options)


def _tile(launch: Launch) -> tuple[str, int]:
    """Return the tile as text and the number of its logits; for a kernel over rows, the number of rows."""
    sizes = {name: launch.constant(name) for name in ("BLOCK", "BLOCK_N", "BLOCK_V", "BLOCK_D")}
    sizes = {name: size for name, size in sizes.items() if size}
    logits = 1
    for name, size in sizes.items():
        logits *= 1 if name == "BLOCK_D" else size
    stages = f"/{launch.options['num_stages']}" if "BLOCK_D" in sizes else ""
    return "x".join(map(str, sizes.values())) + stages, logits


def _counts(counts: dict[int, int]) -> str:
    return " ".join(f"{width}x{count}" for width, count in counts.items())


def _nvidia_usage(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"no register count in the output of cuobjdump: {text[:200]!r}")
    return {"registers": int(found[1]), "spill_bytes": int(found[2])}


def _amd_usage(assembly: str) -> dict:
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
    return {"registers": registers, "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])}


def _resident(arch: Arch, warps: int, registers: int, shared_kib: float) -> int:
    """Return how many programs fit on one processor. Registers come in eights, and shared memory costs 1 KiB extra."""
    by_registers = arch.registers // (-(-registers // 8) * 8 * warps * arch.lanes)
    by_shared = int(arch.shared_total_kib / (shared_kib + 1)) if shared_kib else arch.warps
    return min(by_registers, by_shared, arch.warps // warps)
