"""Fixtures of the emulator's tests. other_process.py says where these tests run."""

import os

import pytest

from other_process import FOLDER, HERE, OtherProcess

RUN_HERE = HERE in os.environ
if RUN_HERE:
    os.environ.pop("TRITON_INTERPRET", None)  # tests/conftest.py has set it; nothing has imported Triton yet

OTHER = pytest.StashKey[OtherProcess]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if RUN_HERE or not item.path.is_relative_to(FOLDER):
        return None
    if OTHER not in item.config.stash:
        item.config.stash[OTHER] = OtherProcess(item.config)
        item.config.add_cleanup(item.config.stash[OTHER].close)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.config.stash[OTHER].run(item.nodeid, nextitem and nextitem.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture(scope="session", autouse=True)
def _emulated_device():
    """Leave no moment without a driver: Triton 3.9 asks for one whenever a kernel is collected."""
    from emulator.driver import EmulatedDriver, use

    with pytest.MonkeyPatch.context() as patch:
        use(patch, EmulatedDriver(80))
        yield


@pytest.fixture
def package(monkeypatch):
    """Return a way to run the package on CPU tensors as if they were on an emulated device: see emulated_package.py."""
    from emulated_package import Package  # it imports Triton

    return Package(monkeypatch)
