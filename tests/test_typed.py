"""The public signatures as type checkers and editors see them: complete, and without Any where a type is known."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import endoreward_fast
from endoreward_fast.model import model
from endoreward_fast.rivals import judges, reward_model
from endoreward_fast.scoring import options as scoring
from endoreward_fast.scoring.arguments import LoadKwargs, ScoreKwargs

TYPED = Path(__file__).with_name("typed")
ROOT = Path(endoreward_fast.__file__).parents[1]


def test_score_kwargs_are_the_fields_of_score_options():
    options = get_type_hints(scoring.ScoreOptions)
    given = get_type_hints(ScoreKwargs, localns={"Scorer": scoring.Scorer})
    assert given == {f.name: options[f.name] for f in dataclasses.fields(scoring.ScoreOptions)}
    assert not ScoreKwargs.__required_keys__ and not LoadKwargs.__required_keys__


@pytest.mark.parametrize("owner", [model.EndoRewardModel, reward_model.RewardModel, *judges.JUDGES.values()])
def test_no_public_method_takes_untyped_options(owner):
    for name, method in inspect.getmembers(owner, callable):
        if name.startswith("_") or method.__module__.partition(".")[0] != "endoreward_fast":
            continue
        for parameter in inspect.signature(method).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                assert "Unpack" in str(parameter.annotation), name


def test_a_users_file_passes_mypy_strict_and_wrong_uses_do_not(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path)]
    asked = subprocess.run(
        [*command, "right.py", "wrong.py"], cwd=TYPED, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    said = [line for line in asked.stdout.splitlines() if ": error:" in line]
    assert asked.returncode == 1 and not asked.stderr, asked.stderr
    assert [line for line in said if not line.startswith("wrong.py:")] == []
    refused = {int(line.split(":")[1]) for line in said}
    wanted = {n for n, line in enumerate((TYPED / "wrong.py").read_text().splitlines(), 1) if line.endswith("# no")}
    assert refused == wanted, "\n".join(said)
