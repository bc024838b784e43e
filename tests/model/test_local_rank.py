"""The device of a model under a launcher, on simulated machines."""

import pytest
import torch

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import devices
from endoreward_fast.model.devices import device_of


@pytest.fixture
def machine(monkeypatch):
    """Simulate a machine with this many devices, for one local rank. The devices are never used."""

    def simulated(count, rank=None, current=None):
        kind = torch.cuda
        monkeypatch.setattr(kind, "is_available", lambda: count > 0)
        monkeypatch.setattr(kind, "device_count", lambda: count)
        monkeypatch.setattr(kind, "is_initialized", lambda: current is not None)
        monkeypatch.setattr(kind, "current_device", lambda: current)
        monkeypatch.setattr(devices, "_touch", lambda device: None)
        if rank is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", rank)

    return simulated


@pytest.mark.parametrize("asked", [None, "auto", "cuda", "gpu", torch.device("cuda")])
def test_a_device_type_means_the_device_of_the_local_rank(machine, asked):
    for rank in range(4):
        machine(4, str(rank))
        assert device_of(asked) == torch.device("cuda", rank)
    machine(2, "5")  # more ranks than devices
    assert device_of(asked) == torch.device("cuda", 1)
    machine(1, "3")  # the launcher shows each rank only its own device
    assert device_of(asked) == torch.device("cuda", 0)
    machine(4, "1", current=3)  # chosen by the process itself
    assert device_of(asked) == torch.device("cuda", 3)
    machine(4, "2", current=0)
    assert device_of(asked) == torch.device("cuda", 2)
    machine(4)  # no launcher
    assert device_of(asked) == torch.device("cuda")


def test_a_device_with_an_index_is_kept(machine):
    machine(4, "2")
    assert device_of("cuda:1") == torch.device("cuda:1") and device_of("cpu") == torch.device("cpu")
    assert device_of("meta").type == "meta"
    machine(0, "2")
    assert device_of(None) == device_of("auto") == torch.device("cpu")


@pytest.mark.parametrize("rank", ["one", "", "-1", "1.0"])
def test_a_local_rank_that_is_not_a_number_is_refused(machine, rank):
    machine(2, rank)
    with pytest.raises(EndoRewardError, match=f"LOCAL_RANK is {rank!r}"):
        device_of(None)
    assert device_of("cpu") == torch.device("cpu")  # LOCAL_RANK has no effect on the CPU


def test_other_accelerators_use_the_local_rank_too(machine, monkeypatch):
    machine(0, "3")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: False)
    assert device_of("xpu") == torch.device("xpu", 1)
    assert device_of("mps") == torch.device("mps")  # there is only one


def test_models_and_trainers_use_the_device_of_the_local_rank(machine, monkeypatch):
    """For example EndoReward("pocket") in a trainer's script, before the trainer has chosen a device."""
    from endoreward_fast.integrations.generated import scorer_of

    machine(2, "1")
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(EndoRewardModel, "__init__", lambda self, model, tokenizer=None: None)
    scorer_of("pocket")
    assert moved == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:77", "cannot be used"),
        ("abacus", "cannot be used"),
        ("", "used"),
        ("vulkan", "has no backend"),
        ("hpu", "has no backend"),
    ],
)
def test_a_missing_device_is_an_error_of_one_line(device, said):
    with pytest.raises(EndoRewardError, match=said) as caught:
        device_of(device)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
