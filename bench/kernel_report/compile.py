"""One row of the report: a recorded launch, compiled for its architecture, and the figures of its machine code."""

import importlib
import re
from dataclasses import asdict, dataclass

from .archs import ARCHS, Arch
from .calls import Planned
from .code import amd_usage, main_width, nvidia_usage, sass, widths
from .loops import Loops, loops
from .shared import wavefronts_per_ffma
from .stand_in import Launch, on_device

# Static instruction counts of the epilogue, per logit. They include rarely taken branches (last tile, target).
INSTRUCTIONS = {
    "exp": r"\bMUFU\.EX2|\bv_exp_f32",
    "fp32": r"\bF(ADD|MUL|FMA|MNMX)\b|\bv_(add|sub|mul|fma|fmac|max|min|pk_\w+)_f32",
    "select": r"\b(FSEL|SEL|FSETP|ISETP)\b|\bv_cndmask|\bv_cmp_",
}


FFMA = r"\bFFMA"


@dataclass(frozen=True)
class Row:
    kernel: str
    source: str  # the call: logits, linear, or chunked
    arch: str
    dtype: str
    full: bool  # entropy and mean; from a linear call also bias and softcap
    aligned: bool
    auto: bool  # whether impl="auto" launches it
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
    wavefronts_per_ffma: float  # in the loop over D of a matmul without tensor cores, else 0
    fill_barriers: int  # these five: see loops.Loops
    step_barriers: int
    tile_barriers: int
    wgmmas: int
    waits: int


def compile_row(planned: Planned) -> Row:
    call, launch = planned.call, planned.launch
    arch = ARCHS[call.arch]
    binary = machine_code(call.arch, launch)
    text = binary.asm["amdgcn"] if arch.hip else sass(binary.asm["cubin"])
    usage = amd_usage(text) if arch.hip else nvidia_usage(binary.asm["cubin"])
    # Toolkits differ in what they call Blackwell's instruction, PTX does not.
    matmuls = len(re.findall(arch.tensor_core, text)) or len(re.findall(r"\btcgen05\.mma\b", binary.asm.get("ptx", "")))
    warps, shared = launch.options["num_warps"], binary.metadata.shared / 1024
    tile, logits = _tile(launch)
    a_logit = max(1, logits // (warps * arch.lanes))
    mix = {name: round(len(re.findall(pattern, text)) / a_logit, 1) for name, pattern in INSTRUCTIONS.items()}
    moved = widths(text)
    linear = planned.kernel.startswith("linear")
    on_cuda_cores = linear and not matmuls
    types = " ".join(launch.signature.values())
    return Row(
        kernel=planned.kernel, source=call.source, arch=call.arch, dtype=call.dtype if call.dtype in types else "fp32",
        full=call.full, aligned=call.aligned, auto=planned.auto, tma="tensordesc" in types, tile=tile, warps=warps,
        **usage, shared_kib=shared,
        programs=_resident(arch, warps, usage["registers"], shared), tensor_core_ops=matmuls,
        load_bytes=main_width(moved["load"]), loads=_counts(moved["load"]),
        store_bytes=main_width(moved["store"]), stores=_counts(moved["store"]), **mix,
        wavefronts_per_ffma=wavefronts_per_ffma(binary.asm["ptx"]) if on_cuda_cores else 0.0,
        **asdict(loops(text, FFMA if on_cuda_cores else arch.tensor_core) if linear else Loops()),
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


def _resident(arch: Arch, warps: int, registers: int, shared_kib: float) -> int:
    """Return how many programs fit on one processor. Registers come in eights, and shared memory costs 1 KiB extra."""
    by_registers = arch.registers // (-(-registers // 8) * 8 * warps * arch.lanes)
    by_shared = int(arch.shared_total_kib / (shared_kib + 1)) if shared_kib else arch.warps
    return min(by_registers, by_shared, arch.warps // warps)
