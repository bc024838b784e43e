"""`python -m pytest -p emulate_all -k fused tests/...`: the package's own tests, on an emulated device.

ENDOREWARD_EMULATED_ARCH is its compute capability, 80 or 90. PYTHONPATH has to name this folder.
"""

import importlib
import os
import pkgutil

import pytest

import endoreward_fast.kernels

os.environ.pop("TRITON_INTERPRET", None)
for file in pkgutil.iter_modules(endoreward_fast.kernels.__path__):  # now, while nothing makes Triton the interpreter
    importlib.import_module(f"{endoreward_fast.kernels.__name__}.{file.name}")

ARCH = int(os.environ["ENDOREWARD_EMULATED_ARCH"])


def pytest_collection_finish(session):
    os.environ.pop("TRITON_INTERPRET", None)  # tests/conftest.py has set it
    from emulated_package import Package  # it imports Triton

    patch = pytest.MonkeyPatch()
    session.config.add_cleanup(patch.undo)
    session.config.stash[DRIVER] = Package(patch).on(ARCH)


def pytest_terminal_summary(terminalreporter, config):
    launches = config.stash[DRIVER].launches
    names = sorted({program.name for program in launches})
    terminalreporter.write_line(f"emulated on sm_{ARCH}: {len(launches)} launches of {', '.join(names)}")


DRIVER = pytest.StashKey()
