"""`python mutation_runner.py FOLDER TEST FOLDER TEST ...`: in each folder run one test, and leave its output there.

Importing torch takes seconds, so that is done once; each test then runs in a fork, which imports the folder's copy of
the package.
"""

import os
import sys

import hypothesis
import numpy
import pytest
import torch

IMPORTED = hypothesis, numpy, torch


def run(folder: str, test: str) -> int:
    """Exit status of the test; its output is in FOLDER/output."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
    output = os.open("output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", test])
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: the tests are the copy's
    for folder, test in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(run(folder, test), flush=True)
