"""`python mutation_runner.py`: for each line FOLDER <tab> TEST on stdin, one line of JSON that says how that test went.

Importing torch and Triton takes seconds, so that is done once; each test then runs in a fork, which imports the
package and the tests that lie in its folder.
"""

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

IMPORTED_ONCE = (
    "hypothesis", "numpy", "pytest", "torch", "torch._dynamo.testing", "triton", "triton.tools.tensor_descriptor",
)  # fmt: skip
LIMIT = 120  # seconds for one test: a mutation may well make it run for ever


class LastError:
    """A pytest plugin that keeps the last exception: the phase it was raised in, its type, its message."""

    def __init__(self):
        self.phase = self.error = self.message = None

    def pytest_exception_interact(self, node, call, report):
        error = call.excinfo.value
        self.phase, self.error, self.message = call.when, type(error).__name__, str(error)


def run(folder: str, test: str) -> dict:
    """status (pytest's exit status), phase, error, message; of a process that a signal ended, `error` is its name."""
    child = os.fork()
    if child == 0:
        _run_here(folder, test)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return {"status": status, "phase": "call", "error": signal.Signals(-status).name, "message": None}
    return json.loads(Path(folder, "outcome.json").read_text())


def _run_here(folder: str, test: str):
    signal.alarm(LIMIT)
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")  # where compiled.cpp is built into
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    last = LastError()
    status = sys.modules["pytest"].main(["-q", "--tb=short", "-p", "no:cacheprovider", test], plugins=[last])
    Path("outcome.json").write_text(json.dumps({"status": int(status), **vars(last)}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: the tests are the copy's
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    gc.freeze()  # else each fork's collector walks through all of that
    for line in sys.stdin:
        print(json.dumps(run(*line.rstrip("\n").split("\t"))), flush=True)
