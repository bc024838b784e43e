"""What the Hopper candidate says before it runs: tests/ptx/test_hopper.py executes it."""

import subprocess
import sys

import pytest
import torch

from endoreward_fast.kernels import hopper_vocab_stats
from endoreward_fast.kernels.hopper_vocab_stats import HOPPER_SEARCH, HopperConfig, hopper_obstacle


def tensors(dtype=torch.bfloat16, dim=64):
    return torch.zeros(4, dim, dtype=dtype), torch.zeros(8, dim, dtype=dtype)


def on_a_hopper(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(hopper_vocab_stats, "_capability", lambda device: capability)


def test_tensors_that_are_not_on_a_hopper_are_refused(monkeypatch):
    assert "on cpu" in hopper_obstacle(*tensors()) or torch.cuda.is_available()
    on_a_hopper(monkeypatch, (10, 0))
    assert "compute capability 9.0" in hopper_obstacle(*tensors())


def test_other_dtypes_and_weights_that_tma_cannot_read_are_refused(monkeypatch):
    on_a_hopper(monkeypatch)
    assert hopper_obstacle(*tensors()) is None
    assert hopper_obstacle(*tensors(torch.float16)) is None
    assert "float32" in hopper_obstacle(*tensors(torch.float32))
    assert "float16 with" in hopper_obstacle(tensors(torch.float16)[0], tensors()[1])
    assert "16 bytes" in hopper_obstacle(*tensors(dim=70))


def test_a_triton_without_gluon_is_named(monkeypatch):
    on_a_hopper(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    assert "has no Gluon" in hopper_obstacle(*tensors())


def test_configs_that_cannot_work_are_refused():
    for split in (0, 1000, 33 * 256):
        with pytest.raises(ValueError, match="multiple of 256"):
            HopperConfig(split=split)
    for lead in (-1, 4):
        with pytest.raises(ValueError, match="num_stages"):
            HopperConfig(lead=lead)
    assert len(set(HOPPER_SEARCH)) == len(HOPPER_SEARCH)


def test_other_kernels_do_not_need_gluon():
    code = (
        "import sys; sys.modules['triton.experimental.gluon.language.nvidia.hopper'] = None\n"
        "import endoreward_fast.kernels.combine, endoreward_fast.kernels.hopper_vocab_stats as h\n"
        "assert 'endoreward_fast.kernels.hopper_kernel' not in sys.modules and h.HOPPER_SEARCH"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
