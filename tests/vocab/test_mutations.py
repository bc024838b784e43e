"""Each mutation is applied to a copy of the package, and one named test must fail on that copy.

The copies always run in Triton's interpreter, also on a machine with a GPU. Nothing is written to the checkout.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from endoreward_fast.vocab.compiled import find_compiler
from mutations import HARD, Mutation
from mutations_around_kernels import AROUND_KERNELS
from mutations_of_divergence import OF_DIVERGENCE
from mutations_of_kernels import OF_KERNELS

ROOT = Path(__file__).parents[2]
ALL = OF_KERNELS | AROUND_KERNELS | OF_DIVERGENCE
TEST = f"{HARD}::test_nan_logits_are_not_swallowed[fused]"
A_TEST_OF_EACH_FILE = {mutation.test.partition("::")[0]: mutation.test for mutation in reversed(ALL.values())}
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
    "HYPOTHESIS_PROFILE": "fixed", "PYTEST_ADDOPTS": "", "PYTHONPATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Copy the package and its tests. The byte code that this copy gains is copied along to the broken copies."""
    copy = tmp_path_factory.mktemp("unbroken")
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "kernels")
    shutil.copytree(ROOT / "endoreward_fast", copy / "endoreward_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", copy / "endoreward_fast" / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory):
    """Return a function (folder, test) -> the outcome that mutation_runner.py reports."""
    command = [sys.executable, ROOT / "tests/harness/mutation_runner.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    folder = tmp_path_factory.mktemp("runner")
    with subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, **pipes) as runner:

        def ask(folder: Path, test: str) -> dict:
            print(folder, test, sep="\t", file=runner.stdin, flush=True)
            return json.loads(runner.stdout.readline())

        yield ask
        runner.stdin.close()


def broken_copy(unbroken: Path, copy: Path, mutation: Mutation) -> Path:
    shutil.copytree(unbroken, copy, dirs_exist_ok=True)
    target = copy / "endoreward_fast" / mutation.file
    text = target.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} does not hold {mutation.old!r} once"
    for stale in target.parent.glob(f"__pycache__/{target.stem}.*"):
        stale.unlink()
    target.write_text(text.replace(mutation.old, mutation.new))
    return copy


def objection(outcome: dict, fails_with: str) -> str | None:
    """Return why this outcome is not the expected failure; None if it is."""
    if outcome["status"] == 0:
        return "the test passed"
    if outcome["phase"] != "call":
        return f"the test never ran: {outcome['error']} in {outcome['phase'] or 'pytest itself'}"
    if not re.fullmatch(fails_with, outcome["error"]):
        return f"failed with {outcome['error']} in place of {fails_with}"
    return None


@pytest.mark.parametrize("file", A_TEST_OF_EACH_FILE)
def test_an_unbroken_copy_passes(file, unbroken, outcome_of):
    assert outcome_of(unbroken, A_TEST_OF_EACH_FILE[file])["status"] == 0, (unbroken / "output.txt").read_text()


@pytest.mark.parametrize("name", ALL)
def test_a_broken_copy_fails(name, unbroken, outcome_of, tmp_path):
    mutation = ALL[name]
    if mutation.file.endswith(".cpp") and find_compiler() is None:
        pytest.skip(f"the mutation {name!r} needs a C++ compiler")
    outcome = outcome_of(broken_copy(unbroken, tmp_path, mutation), mutation.test)
    wrong = objection(outcome, mutation.fails_with)
    assert wrong is None, f"{wrong}: {outcome['message']}\n{(tmp_path / 'output.txt').read_text()}"
    shutil.rmtree(tmp_path)


NO_FAILED_ASSERTION = {
    # name: (mutation, the objection)
    "nothing changed": (Mutation("vocab/plan.py", "row + 1, -1)", "row + 1, -1)", TEST), "the test passed"),
    "cannot be imported": (
        Mutation("vocab/reference.py", "import torch\n", "import torch as\n", TEST),
        "the test never ran: CollectError in collect",
    ),
    "a kernel that does not compile": (
        Mutation("kernels/primitives.py", "return tl.where(m == NEG_INF, 0.0, m)", "return mistyped", TEST),
        "failed with InterpreterError",
    ),
    "no such test": (Mutation("vocab/plan.py", "row + 1, -1)", "row, -1)", f"{TEST}s"), "the test never ran"),
}


@pytest.mark.parametrize("name", NO_FAILED_ASSERTION)
def test_a_copy_that_does_not_run_is_not_a_failed_assertion(name, unbroken, outcome_of, tmp_path):
    mutation, said = NO_FAILED_ASSERTION[name]
    outcome = outcome_of(broken_copy(unbroken, tmp_path, mutation), mutation.test)
    assert said in objection(outcome, mutation.fails_with)


# ------------------------------------------------------------------------------------------- the table in README.md

HEAD = "| case | tests | mutations they catch |\n|---|---|---|\n"
TABLE = (ROOT / "tests" / "README.md").read_text().split(HEAD)[1].partition("\n\n")[0]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines()]


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_case_has_tests_and_mutations_that_exist(row):
    _, tests, mutations = row
    assert tests and (quoted(mutations) or mutations.startswith("none: "))
    for file, _, test in (name.partition("::") for name in quoted(tests)):
        (path,) = ROOT.glob(f"tests/**/test_{file}.py")
        assert f"def test_{test}(" in path.read_text()
    for name in quoted(mutations):
        file, test = re.match(r"tests/(?:\w+/)?test_(\w+)\.py::test_(\w+)", ALL[name].test).groups()
        assert f"{file}::{test}" in quoted(tests), f"{name!r} is caught by another test: {file}::{test}"


def test_every_mutation_is_in_the_table():
    assert set(ALL) == {name for *_, mutations in ROWS for name in quoted(mutations)}
