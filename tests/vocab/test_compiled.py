"""Requirements on the machine code of every kernel for every architecture, as `make kernel-report` has written it.

Compiling all of them takes 80 s, so the report in bench/results is read. It has to be of the kernels as they are now.
"""

import json

import pytest

from bench.kernel_report import ARCHS, DTYPES, RESULTS, sources


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((RESULTS / "kernel-report.json").read_text())


def test_the_report_is_of_these_kernels(report):
    assert report["sources"] == sources(), "the kernels have changed: run `make kernel-report` and commit its results"


@pytest.fixture(scope="module")
def compiled(report) -> list[dict]:
    return report["kernels"]


def test_every_gate_holds(report):
    """bench/kernel_report/gates.py has the requirements. `make kernel-report` fails on the same ones."""
    assert report["failures"] == []


def test_every_kernel_compiles_for_every_architecture_and_dtype(compiled):
    seen = {(r["kernel"], r["arch"], r["dtype"]) for r in compiled}
    assert len(compiled) == len({tuple(r.items()) for r in compiled})
    for arch in ARCHS:
        assert ("combine", arch, "fp32") in seen
        for dtype in DTYPES:
            for kernel in ("logits_forward", "logits_backward", "linear"):
                assert (kernel, arch, dtype) in seen
        for kernel in ("partials", "mixture", "backward"):
            assert {(f"divergence_{kernel}", arch, dtype) for dtype in ("bf16", "fp32")} <= seen


def test_no_register_spills_in_the_default_configs_of_hopper(compiled):
    hopper = [r for r in compiled if r["arch"] == "sm_90"]
    assert hopper and all(0 < r["registers"] <= 255 for r in hopper)
    assert [r for r in hopper if r["spill_bytes"]] == []


def test_only_unaligned_full_kernels_and_fp32_spill_a_few_bytes(compiled):
    """The full variant spills with unaligned rows on GPUs without wgmma, and fp32 spills on Blackwell."""
    spilling = [r for r in compiled if r["spill_bytes"]]
    assert all(r["spill_bytes"] <= 64 for r in spilling)
    assert all((r["full"] and not r["aligned"]) or r["dtype"] == "fp32" for r in spilling)


def test_the_epilogue_takes_one_exponential_per_logit_and_few_other_instructions(compiled):
    """The other fp32 instructions of the plain variant scale, subtract, take maxima, sum, and pick targets."""
    for r in compiled:
        if r["arch"] == "sm_90" and r["kernel"] == "linear" and r["dtype"] != "fp32" and not r["full"]:
            assert r["exp"] <= 1.1 and r["fp32"] <= 6


def test_enough_warps_of_the_logits_kernels_run_at_once_to_hide_loads(compiled):
    """Rows that are not aligned take two registers more for each logit, and 16 warps."""
    logits = [r for r in compiled if r["kernel"] == "logits_forward" and r["arch"] == "sm_90" and not r["full"]]
    assert logits and all(r["programs"] * r["warps"] >= (24 if r["aligned"] else 16) for r in logits)


def test_shared_memory_fits_the_chip(compiled):
    assert [r for r in compiled if r["shared_kib"] > ARCHS[r["arch"]].shared_kib] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_low_precision_matmuls_run_on_the_tensor_cores(compiled, arch):
    matmuls = [r for r in compiled if r["arch"] == arch and r["kernel"] == "linear" and r["dtype"] != "fp32"]
    assert matmuls and all(r["tensor_core_ops"] > 0 for r in matmuls), ARCHS[arch].tensor_core
