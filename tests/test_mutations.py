"""A deliberately broken copy must fail: each mutation is applied to one, where one named test must notice."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from endoreward_fast.compiled import find_compiler
from more_mutations import MORE_MUTATIONS
from mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
ALL = MUTATIONS | MORE_MUTATIONS
NEEDS_COMPILER = [name for name in ALL if name.startswith("compiled")]
PROCESSES = 2


def break_a_copy(copy: Path, file: str, old: str, new: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "kernels")
    shutil.copytree(ROOT / "endoreward_fast", copy / "endoreward_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", copy / "endoreward_fast" / "kernels")
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    target = copy / "endoreward_fast" / file
    text = target.read_text()
    assert text.count(old) == 1, f"{file} no longer holds {old!r} once"
    target.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """name: (exit status, output) of the test that must fail."""
    folder = tmp_path_factory.mktemp("mutations")
    runs = []
    for number, (name, (file, old, new, test)) in enumerate(ALL.items()):
        break_a_copy(folder / str(number), file, old, new)
        runs.append((name, folder / str(number), test))

    def work(share):
        arguments = [str(x) for _, copy, test in share for x in (copy, test)]
        command = [sys.executable, ROOT / "tests/mutation_runner.py", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )
        statuses = done.stdout.split()
        return {
            name: (status, (copy / "output").read_text())
            for (name, copy, _), status in zip(share, statuses, strict=True)
        }

    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = pool.map(work, [runs[i::PROCESSES] for i in range(PROCESSES)])
        return {name: outcome for share in shares for name, outcome in share.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_broken_copy_fails(name, outcomes):
    if name in NEEDS_COMPILER and find_compiler() is None:
        pytest.skip("impl='compiled' needs a C++ compiler")
    status, output = outcomes[name]
    crashed = status == str(-signal.SIGSEGV)  # in the interpreter a wild address is one of this process
    assert crashed or (status == "1" and "1 failed" in output), f"exit status {status}: {output[-2000:]}"
