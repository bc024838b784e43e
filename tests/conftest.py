"""Fixtures for every test: the device and the error budget against the fp64 oracle.

Without a GPU, Triton's kernels run in its interpreter on CPU tensors. With a GPU, the same tests run on it unchanged.
"""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it on import, and nothing has imported Triton yet
os.environ["ENDOREWARD_TUNED"] = "0"  # what this machine's user has tuned must not decide what is tested

if importlib.util.find_spec("hypothesis"):  # a GPU machine may lack it; `make gpu` names the files that need it
    from hypothesis import Phase, settings

    # "fixed" draws the same examples every time and shows the first failure. `HYPOTHESIS_PROFILE=long python -m pytest
    # tests/vocab/test_properties.py tests/test_identities.py` draws 1000 new examples per test and shrinks failures.
    settings.register_profile(
        "fixed", derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
    )
    settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

EPS32 = torch.finfo(torch.float32).eps
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items) -> None:
    """Mark the tests that touch the device. `make gpu` runs only those (bench/gpu/device_tests.py finds the files)."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_within_budget():
    """Return the check of the error budget, which only this fixture defines.

    The error against the fp64 oracle may exceed that of eager torch in the same dtypes by at most 16 units in the last
    place of float32, at the magnitude of the row or of the logits that it was summed from (`scale`). Infinities and
    NaNs must be those of the oracle.
    """

    def check(ours, torch_same_dtype, oracle, *, scale=1.0, name=""):
        ours, eager, oracle = (x.detach().double().cpu() for x in (ours, torch_same_dtype, oracle))
        assert ours.shape == oracle.shape, name
        special = ~oracle.isfinite()
        assert torch.equal(ours[special].nan_to_num(7), oracle[special].nan_to_num(7)), f"{name}: inf/nan differ"
        finite = ~special
        error = (ours - oracle)[finite].abs()
        eager_error = (eager - oracle)[finite].abs().nan_to_num(0.0, posinf=0.0)
        room = 16 * EPS32 * oracle[finite].abs().clamp(min=scale)
        excess = error - eager_error - room
        worst = int(excess.argmax()) if excess.numel() else 0
        assert not (excess > 0).any() and not error.isnan().any(), (
            f"{name}: error {error[worst]:.3e}, eager torch's {eager_error[worst]:.3e}, room {room[worst]:.3e}"
        )

    return check


def pytest_terminal_summary(terminalreporter) -> None:
    """Print where the kernels ran, so that nothing is skipped silently."""
    if torch.cuda.is_available():
        where = f"on {torch.cuda.get_device_name()} (compiled), bf16 and fp16 included"
    else:
        where = "in Triton's interpreter on the CPU (bf16 upcast inside the dot); without a GPU, nothing ran on one"
    terminalreporter.write_line(
        f"kernels: {where}; machine code for sm_80, sm_90, sm_100, sm_120, gfx942: test_compiled.py; "
        "PTX of sm_80 and sm_90, emulated: tests/ptx"
    )
