"""Runs the tests of this folder in another process, because in pytest's own Triton is the interpreter.

Triton decides on import whether kernels are interpreted. The process here imports it without TRITON_INTERPRET, collects
the same tests, runs those that it is asked for, and sends their reports back. There is one for each pytest process.
"""

import multiprocessing
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
HERE = "ENDOREWARD_PTX_TESTS_RUN_HERE"  # set in the process that runs the tests


class OtherProcess:
    def __init__(self, config: pytest.Config):
        self._config = config
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = [f"--rootdir={config.rootpath}", f"-c{config.inipath}", "-m", ""]
        self._process = spawn.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, test: str, following: str | None) -> list[pytest.TestReport]:
        """Run one test and return its reports. `following` is the next one: fixtures that it needs are kept."""
        reports = []
        self._connection.send((test, following))
        try:
            while (data := self._connection.recv()) is not None:
                reports.append(self._config.hook.pytest_report_from_serializable(config=self._config, data=data))
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"the process that runs {test} has ended: run it with {HERE}=1 to see why") from error
        return reports

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection, arguments: list[str]) -> None:
    os.environ[HERE] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reports are all that is wanted
    plugins = ["-pno:cacheprovider", "-pno:xdist"]
    status = pytest.main([*arguments, *plugins, str(FOLDER)], plugins=[_OnRequest(connection)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}")


class _OnRequest:
    """A plugin that runs the tests whose names come through the connection."""

    def __init__(self, connection):
        self._connection, self._config = connection, None

    def pytest_configure(self, config):
        self._config = config

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        while True:
            try:
                test, following = self._connection.recv()
            except EOFError:
                return True
            after = items.get(following, session)  # of the session's fixtures none is torn down in between
            session.config.hook.pytest_runtest_protocol(item=items[test], nextitem=after)
            self._connection.send(None)

    def pytest_runtest_logreport(self, report):
        self._connection.send(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))
