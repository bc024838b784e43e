"""Which code `auto` runs: the rule, on devices that are not here."""

from types import SimpleNamespace

import pytest
import torch

from endoreward_fast.functional import choose_impl
from endoreward_fast.vocab import choice, chunked, workspace

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that has the kernels, as far as the rule asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("dtypes", "linear", "expected"),
    [
        ((BF16, BF16), True, "fused"),
        ((F16, F16), True, "fused"),
        ((F32, F32), True, "chunked"),
        ((F32, BF16), True, "chunked"),
        ((F64, F64), True, "chunked"),
        ((F32,), False, "fused"),
        ((BF16,), False, "fused"),
        ((F64,), False, "chunked"),
    ],
)
def test_auto_on_cuda_multiplies_float32_with_the_library(hopper, dtypes, linear, expected):
    assert choose_impl("auto", CUDA, *dtypes, linear=linear) == expected


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_auto_on_rocm_is_fused(hopper, monkeypatch, dtype):
    """gfx942 multiplies float32 on its matrix units."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_impl("auto", CUDA, dtype, dtype, linear=True) == "fused"


@pytest.mark.parametrize("impl", ["fused", "chunked", "reference"])
def test_a_named_implementation_is_what_runs(hopper, impl):
    assert choose_impl(impl, CUDA, F32, F32, linear=True) == impl


def test_chunked_on_a_gpu_with_kernels_is_the_workspace(hopper):
    """Float32 takes it: cuBLAS into a workspace, then the row kernels."""
    hidden = SimpleNamespace(device=CUDA, dtype=F32)
    weight = torch.empty(0)
    assert choice.backend("chunked", hidden, weight) is workspace
    hidden.dtype = F64
    assert choice.backend("chunked", hidden, weight) is chunked
    assert choice.backend("chunked", SimpleNamespace(device=CPU, dtype=F32), weight) is chunked
