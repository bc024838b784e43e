"""Compile every kernel for every architecture, without a device, and say what the compiler made of it.

    python -m bench.kernel_report                 # table to bench/results/kernel-report.md and .json

Triton's wheel carries ptxas and cuobjdump, so registers, spills, shared memory and the tensor-core instructions are
read from the machine code itself. Nothing here is a time.
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
ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Shared memory one program may take, KiB: CUDA C++ Programming Guide, table of technical specifications; CDNA3 ISA.
SHARED_LIMIT_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# The instruction that shows the matmul on the tensor cores.
TENSOR_CORE = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\btcgen05\.mma\b", "gfx942": r"\bv_mfma"}


@dataclass(frozen=True)
class Job:
    kernel: str
    arch: str
    dtype: str
    entropy: bool
    tma: bool = False


@dataclass(frozen=True)
class Compiled(Job):
    registers: int = 0
    spill_bytes: int = 0
    shared_kib: float = 0.0
    tensor_core_ops: int = 0
    warps: int = 0


def jobs() -> list[Job]:
    """Each kernel in its plain and its fullest form; the linear one also with bulk copies where the chip has them."""
    out = []
    for arch in ARCHS:
        out += [Job("combine", arch, "fp32", entropy) for entropy in (False, True)]
        for dtype in DTYPES:
            for entropy in (False, True):
                out += [Job(kernel, arch, dtype, entropy) for kernel in ("logits_forward", "logits_backward", "linear")]
                if arch in ("sm_90", "sm_100") and DTYPES[dtype] == 2:
                    out.append(Job("linear", arch, dtype, entropy, tma=True))
    return out


def compile_job(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    hip = job.arch == "gfx942"
    target = GPUTarget("hip", "gfx942", 64) if hip else GPUTarget("cuda", ARCHS[job.arch], 32)
    fn, constants, types, warps, stages = _specialise(job)
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in fn.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(fn.arg_names)
        if signature[n].startswith("*") or n in ("dim", "stride_hidden", "stride_weight", "vocab", "stride_inner")
    }
    source = triton.compiler.ASTSource(fn, signature, constants, aligned)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    usage = _amd_usage(binary.asm["amdgcn"]) if hip else _nvidia_usage(binary.asm["cubin"])
    # Blackwell's disassembly warns and differs between toolkits; its PTX names the instruction as well.
    text = binary.asm["amdgcn" if hip else "ptx" if job.arch == "sm_100" else "sass"]
    count = len(re.findall(TENSOR_CORE[job.arch], text))
    return Compiled(
        **asdict(job), **usage, shared_kib=binary.metadata.shared / 1024, tensor_core_ops=count, warps=warps
    )


def _specialise(job: Job):
    """(jit function, constexprs, argument types, warps, stages) as the launchers would have them."""
    from endoreward_fast.kernels import combine, config, linear_vocab_stats, vocab_stats

    pointer = f"*{job.dtype}"
    flags = {"HAS_NEEDED": True, "ENTROPY": job.entropy, "LOGIT_MEAN": job.entropy}
    head = {"HAS_BIAS": job.entropy, "HAS_SCALE": False, "HAS_SOFTCAP": job.entropy}
    types = {
        n: "*fp32" for n in ("p_m p_s p_t p_u p_target shift log_total entropy g_lse g_target g_entropy g_mean").split()
    }
    types |= {
        n: "*fp32" for n in "o_lse o_target o_entropy o_mean o_shift o_log_total o_reward o_logprob o_value".split()
    }
    types |= {
        "targets": "*i64",
        "successor": "*i64",
        "needed": "*i1",
        "bias": pointer,
        "logits": pointer,
        "grad": pointer,
    }
    types |= {n: "i32" for n in "n_rows n_inner n_splits vocab dim".split()}
    types |= {n: "i64" for n in "stride_outer stride_inner stride_hidden stride_weight".split()}
    unit_stride = {"stride_vocab": 1}
    if job.kernel == "combine":
        return combine.combine_kernel, flags | {"REWARDS": True, "BLOCK": combine.ROWS_PER_PROGRAM}, types, 4, 1
    if job.kernel != "linear":
        tile = config.LogitsConfig()
        forward = job.kernel == "logits_forward"
        fn = vocab_stats.logits_partials_kernel if forward else vocab_stats.logits_backward_kernel
        constants = flags | unit_stride | {"BLOCK_V": tile.block_v}
        return fn, constants, types, tile.num_warps, 1
    arch = "hip" if job.arch == "gfx942" else ARCHS[job.arch] // 10
    tile = config.linear_config(arch, DTYPES[job.dtype])
    constants = {k: v for k, v in (flags | head).items() if k != "HAS_NEEDED"} | {
        "TMA": job.tma, "UPCAST": False, "PRECISION": "ieee", "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d, "SPLIT": tile.split, "GROUP": tile.group,
    }  # fmt: skip
    for name, rows in (("hidden", tile.block_n), ("weight", tile.block_v)):
        types[name] = f"tensordesc<{job.dtype}[{rows},{tile.block_d}]>" if job.tma else pointer
    return linear_vocab_stats.linear_partials_kernel, constants, types, tile.num_warps, tile.num_stages


def _nvidia_usage(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text[:200]!r}")
    return {"registers": int(found[1]), "spill_bytes": int(found[2])}


def _amd_usage(assembly: str) -> dict:
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
    return {"registers": registers, "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])}


def compile_all(workers: int) -> list[Compiled]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: unset it, the interpreter compiles nothing")
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_job, jobs()))


def markdown(rows: list[Compiled]) -> str:
    lines = [
        "# What the compiler made of each kernel",
        "",
        "Compiled ahead of time, not run: no figure here is a time. Full = entropy and mean, with bias and softcap.",
        "",
        "| kernel | arch | dtype | form | loads | warps | registers | spilled bytes | shared KiB | tensor-core ops |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        form, loads = ("full" if r.entropy else "plain"), ("TMA" if r.tma else "pointer")
        cells = (r.kernel, r.arch, r.dtype, form, loads, r.warps, r.registers, r.spill_bytes)
        lines.append("| " + " | ".join(map(str, cells)) + f" | {r.shared_kib:.0f} | {r.tensor_core_ops} |")
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
