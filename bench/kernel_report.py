"""Compile every kernel for every architecture without a GPU, and report registers, spills and shared memory.

    python -m bench.kernel_report                 # writes bench/results/kernel-report.md and .json

Triton's wheel includes ptxas and cuobjdump, so all figures are read from the machine code. None of them is a time.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Arch:
    """Resources of one processor (SM, CU), from the CUDA C++ Programming Guide's table and the CDNA3 ISA manual."""

    target: int | str
    shared_kib: int  # limit for one program
    shared_total_kib: int
    warps: int
    registers: int  # 32-bit registers
    tensor_core: str  # pattern of the matmul instruction


ARCHS = {
    "sm_80": Arch(80, 163, 164, 64, 65536, r"\bHMMA"),
    "sm_90": Arch(90, 227, 228, 64, 65536, r"\bHGMMA"),
    "sm_100": Arch(100, 227, 228, 64, 65536, r"\btcgen05\.mma\b"),
    "sm_120": Arch(120, 99, 100, 48, 65536, r"\bHMMA"),
    "gfx942": Arch("gfx942", 64, 64, 32, 131072, r"\bv_mfma"),
}
# Static instruction counts of the epilogue, per logit. They include rarely taken branches (last tile, target).
INSTRUCTIONS = {
    "exp": r"\bMUFU\.EX2|\bv_exp_f32",
    "fp32": r"\bF(ADD|MUL|FMA|MNMX)\b|\bv_(add|sub|mul|fma|fmac|max|min|pk_\w+)_f32",
    "select": r"\b(FSEL|SEL|FSETP|ISETP)\b|\bv_cndmask|\bv_cmp_",
}
# With a width such as 70, or a sliced weight, pitches are unaligned, which gives other code with more registers.
ALIGNED = {True: ("dim", "stride", "vocab"), False: ()}


@dataclass(frozen=True)
class Job:
    kernel: str
    arch: str
    dtype: str
    full: bool  # entropy and mean, with bias and softcap
    tma: bool = False
    aligned: bool = True


@dataclass(frozen=True)
class Compiled(Job):
    tile: str = ""
    warps: int = 0
    registers: int = 0
    spill_bytes: int = 0
    shared_kib: float = 0.0
    programs: int = 0  # programs resident on one processor
    tensor_core_ops: int = 0
    exp: float = 0.0
    fp32: float = 0.0
    select: float = 0.0


def jobs() -> list[Job]:
    """List the compilations: each kernel plain and full; the linear kernel also unaligned, and with TMA where used."""
    out = []
    for arch in ARCHS:
        out += [Job("combine", arch, "fp32", full) for full in (False, True)]
        for dtype in DTYPES:
            for full in (False, True):
                out += [Job(kernel, arch, dtype, full) for kernel in ("logits_forward", "logits_backward")]
                out += [Job("linear", arch, dtype, full, aligned=aligned) for aligned in ALIGNED]
                if arch in ("sm_90", "sm_100") and DTYPES[dtype] == 2:
                    out.append(Job("linear", arch, dtype, full, tma=True))
    return out


def compile_job(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    arch = ARCHS[job.arch]
    hip = arch.target == "gfx942"
    target = GPUTarget("hip", "gfx942", 64) if hip else GPUTarget("cuda", arch.target, 32)
    fn, constants, types, tile, logits, warps, stages = _specialise(job)
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in fn.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(fn.arg_names)
        if signature[n].startswith("*") or (n.startswith(ALIGNED[job.aligned]) and n not in fn.do_not_specialize)
    }
    source = triton.compiler.ASTSource(fn, signature, constants, aligned)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    usage = _amd_usage(binary.asm["amdgcn"]) if hip else _nvidia_usage(binary.asm["cubin"])
    text = binary.asm["amdgcn" if hip else "sass"]
    # Disassembly for Blackwell differs between toolkits, so search its PTX for the instruction.
    matmuls = len(re.findall(arch.tensor_core, binary.asm["ptx"] if job.arch == "sm_100" else text))
    lanes = 64 if hip else 32
    a_logit = max(1, logits // (warps * lanes))
    mix = {name: round(len(re.findall(pattern, text)) / a_logit, 1) for name, pattern in INSTRUCTIONS.items()}
    shared = binary.metadata.shared / 1024
    programs = _resident(arch, warps, usage["registers"], shared, lanes)
    return Compiled(
        **asdict(job), **usage, **mix, tile=tile, warps=warps, shared_kib=shared, programs=programs,
        tensor_core_ops=matmuls,
    )  # fmt: skip


def _specialise(job: Job):
    """Return (jit function, constexprs, argument types, tile, logits per tile, warps, stages) as in the launchers."""
    from endoreward_fast.kernels import combine, config, linear_vocab_stats, vocab_stats

    flags = {"HAS_NEEDED": True, "ENTROPY": job.full, "LOGIT_MEAN": job.full}
    head = {"HAS_BIAS": job.full, "HAS_SCALE": False, "HAS_SOFTCAP": job.full}
    partials = "p_m p_s p_t p_u p_target shift log_total entropy g_lse g_target g_entropy g_mean"
    outputs = "o_lse o_target o_entropy o_mean o_shift o_log_total o_reward o_logprob o_value"
    types = {n: "*fp32" for n in f"{partials} {outputs}".split()}
    types |= {n: f"*{job.dtype}" for n in ("bias", "logits", "grad", "hidden", "weight")}
    types |= {"targets": "*i64", "successor": "*i64", "needed": "*i1"}
    types |= {n: "i32" for n in "n_rows n_inner n_splits vocab total_vocab first dim".split()}
    types |= {n: "i64" for n in "stride_outer stride_inner stride_hidden stride_weight".split()}
    if job.kernel == "combine":
        block = combine.ROWS_PER_PROGRAM
        return combine.combine_kernel, flags | {"REWARDS": True, "BLOCK": block}, types, str(block), block, 4, 1
    if job.kernel != "linear":
        tile = config.LogitsConfig()
        forward = job.kernel == "logits_forward"
        fn = vocab_stats.logits_partials_kernel if forward else vocab_stats.logits_backward_kernel
        constants = flags | head | {"stride_vocab": 1, "BLOCK_V": tile.block_v}
        return fn, constants, types, str(tile.block_v), tile.block_v, tile.num_warps, 1
    family = "hip" if job.arch == "gfx942" else ARCHS[job.arch].target // 10
    tile = config.linear_config(family, DTYPES[job.dtype], job.tma)
    constants = {k: v for k, v in (flags | head).items() if k != "HAS_NEEDED"} | {
        "TMA": job.tma, "UPCAST": False, "PRECISION": "ieee", "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d, "SPLIT": tile.split, "GROUP": tile.group,
    }  # fmt: skip
    if job.tma:
        for name, rows in (("hidden", tile.block_n), ("weight", tile.block_v)):
            types[name] = f"tensordesc<{job.dtype}[{rows},{tile.block_d}]>"
    name, logits = f"{tile.block_n}x{tile.block_v}x{tile.block_d}/{tile.num_stages}", tile.block_n * tile.block_v
    return linear_vocab_stats.linear_partials_kernel, constants, types, name, logits, tile.num_warps, tile.num_stages


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


def _resident(arch: Arch, warps: int, registers: int, shared_kib: float, lanes: int) -> int:
    """Return how many programs fit on one processor. Registers come in eights, and shared memory costs 1 KiB extra."""
    by_registers = arch.registers // (-(-registers // 8) * 8 * warps * lanes)
    by_shared = int(arch.shared_total_kib / (shared_kib + 1)) if shared_kib else arch.warps
    return min(by_registers, by_shared, arch.warps // warps)


def compile_all(workers: int) -> list[Compiled]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_job, jobs()))


def markdown(rows: list[Compiled]) -> str:
    lines = [
        "# Registers, spills and shared memory of each kernel",
        "",
        "The kernels were compiled ahead of time and not run, so no figure is a time.",
        "",
        "- form: full computes entropy and mean, with bias and softcap",
        "- aligned: whether D and pitches are multiples of 16",
        "- programs: how many fit on one processor (SM, CU), given registers, shared memory and warps",
        "- exp, fp32, select: instructions of that kind per logit of a thread, with rare branches (last tile, target)",
        "",
        "| kernel | arch | dtype | form | loads | aligned | tile | warps | registers | spilled bytes | shared KiB | "
        "programs | tensor-core ops | exp | fp32 | select |",
        "|---" * 16 + "|",
    ]
    for r in rows:
        form, loads = ("full" if r.full else "plain"), ("TMA" if r.tma else "pointer")
        cells = (
            r.kernel, r.arch, r.dtype, form, loads, "yes" if r.aligned else "no", r.tile, r.warps, r.registers,
            r.spill_bytes, f"{r.shared_kib:.0f}", r.programs, r.tensor_core_ops, r.exp, r.fp32, r.select,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for kernel-report.json and .md")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    import torch
    import triton

    rows = compile_all(args.workers)
    args.output.mkdir(parents=True, exist_ok=True)
    record = {"triton": triton.__version__, "torch": torch.__version__, "kernels": [asdict(r) for r in rows]}
    (args.output / "kernel-report.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "kernel-report.md").write_text(markdown(rows))
    print(f"{len(rows)} kernels compiled; {sum(r.spill_bytes > 0 for r in rows)} spill", file=sys.stderr)


if __name__ == "__main__":
    main()
