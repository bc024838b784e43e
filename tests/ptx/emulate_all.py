"""`python -m pytest -p emulate_all -k fused tests/...`: the package's own tests, on an emulated device.

ENDOREWARD_EMULATED_ARCH is its compute capability, 80 or 90. PYTHONPATH has to name this folder.
"""

import os

import pytest

os.environ.pop("TRITON_INTERPRET", None)
from emulated_package import Package  # noqa: E402  it imports Triton, and with it the kernels, not to be interpreted

from endoreward_fast.kernels import combine, linear_vocab_stats, vocab_stats  # noqa: E402, F401

ARCH = int(os.environ["ENDOREWARD_EMULATED_ARCH"])


def pytest_collection_finish(session):
    os.environ.pop("TRITON_INTERPRET", None)  # tests/conftest.py has set it
    patch = pytest.MonkeyPatch()
    session.config.add_cleanup(patch.undo)
    session.config.stash[DRIVER] = Package(patch).on(ARCH)


def pytest_terminal_summary(terminalreporter, config):
    launches = config.stash[DRIVER].launches
    names = sorted({program.name for program in launches})
    terminalreporter.write_line(f"emulated on sm_{ARCH}: {len(launches)} launches of {', '.join(names)}")


DRIVER = pytest.StashKey()
