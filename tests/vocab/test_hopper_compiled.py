"""The Gluon forward compiled ahead of time for sm_90, and requirements on its machine code.

A subprocess compiles it, because in this process Triton may be the interpreter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

import pytest

FULL = {"HAS_BIAS": True, "HAS_SCALE": True, "HAS_SOFTCAP": True, "ENTROPY": True, "LOGIT_MEAN": True}
FORMS = {
    "plain": {},
    "bias": {"HAS_BIAS": True, "ENTROPY": True, "LOGIT_MEAN": True},
    "full": FULL | {"HAS_ROWS": True},
}


def jobs():
    """List (form, dtype, config): the forms that were the hardest to compile without a spill, not all of them."""
    from endoreward_fast.kernels.hopper_vocab_stats import HOPPER_SEARCH

    first, longest = HOPPER_SEARCH[0], max(HOPPER_SEARCH, key=lambda config: config.lead)
    return [("plain", "bf16", first), ("bias", "bf16", first), ("full", "fp16", first), ("full", "bf16", longest)]


def compile_form(form: str, dtype: str, config) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from endoreward_fast.kernels.hopper_kernel import hopper_partials_kernel as kernel
    from endoreward_fast.kernels.hopper_vocab_stats import BLOCK_N, BLOCK_V, tile_layout

    layout = tile_layout(config.block_d)
    types = {n: "fp32" for n in ("logit_scale", "softcap", "c")} | {n: "i32" for n in ("n_rows", "vocab", "dim")}
    types |= {
        "bias": f"*{dtype}",
        "targets": "*i64",
        "rows": "*i32",
        "count": "*i32",
        "partials": "*fp32",
        "p_target": "*fp32",
    }
    for name, rows in (("hidden", BLOCK_N), ("weight", BLOCK_V)):
        types[name] = f"tensordesc<{dtype}[{rows}, {config.block_d}],{layout!r}>"
    flags = (
        dict.fromkeys(("HAS_ROWS", "HAS_BIAS", "HAS_SCALE", "HAS_SOFTCAP", "ENTROPY", "LOGIT_MEAN"), False)
        | FORMS[form]
    )
    constants = flags | {
        "SPLIT": config.split, "GROUP": config.group, "STAGES": config.num_stages, "LEAD": config.lead,
    }  # fmt: skip
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code, stack = _disassemble(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", binary.asm["cubin"])
    return {"name": f"{form} {dtype} {astuple(config)}", "code": code, "stack": stack, "shared": binary.metadata.shared}


def _disassemble(tool: Path, cubin: bytes) -> tuple[list[str], int]:
    """Return (instructions, bytes of stack). Triton's own "sass" ends after 4096 instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text), int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    # As a file, because other packages install a package of the name `tests`.
    done = subprocess.run([sys.executable, __file__], check=True, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_no_register_is_spilled(compiled):
    assert {r["name"]: r["stack"] for r in compiled if r["stack"]} == {}


def test_registers_move_from_the_producer_to_the_consumers(compiled):
    for r in compiled:
        counts = {line.split()[-1] for line in r["code"] if "USETMAXREG" in line}
        assert {"0xf0", "0x18"} <= counts, r["name"]  # 240 and 24


def test_one_matmul_stays_in_flight(compiled):
    """Each consumer has two groups of wgmmas, of the first stage and of the rest, and one wait after each."""
    for r in compiled:
        waits = [line.split()[-1] for line in r["code"] if "WARPGROUP.DEPBAR" in line]
        groups = [line for line in r["code"] if "HGMMA" in line and "gsb0" in line]
        assert waits == ["0x1", "0x0"] * 2 and len(groups) == 4, r["name"]


def test_the_matmuls_are_as_wide_as_they_can_be(compiled):
    for r in compiled:
        assert {line.split()[0] for line in r["code"] if line.startswith("HGMMA")} <= {
            "HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x16.F32",
        }, r["name"]  # fmt: skip


def test_one_warp_loads_both_tiles_by_bulk_copies(compiled):
    for r in compiled:
        assert sum("UTMALDG" in line for line in r["code"]) == 2, r["name"]


def test_shared_memory_fits_the_chip(compiled):
    assert max(r["shared"] for r in compiled) <= 227 * 1024


if __name__ == "__main__":
    print(json.dumps([compile_form(*job) for job in jobs()]))
