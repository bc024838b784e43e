"""docs/trainers.md: its Python runs, on the embedded model, and the errors that it explains are raised."""

import ast
import re
from pathlib import Path

import pytest

from endoreward_fast.checkpoint import pocket_path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
BLOCKS = [
    block.replace("Qwen/Qwen2.5-0.5B-Instruct", str(pocket_path()))
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)
]
TRL = [block for block in BLOCKS if "from trl" in block]
OTHERS = [block for block in BLOCKS if block not in TRL]
SAID = re.findall(r"^\| (.*?) \|", PAGE[PAGE.index("| it says |") :], re.M)[1:]


@pytest.mark.parametrize("block", TRL, ids=["reward function", "token-level, one forward"])
def test_training_runs(block, tmp_path):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    from trl_harness import SETTINGS

    quick = {name: value for name, value in SETTINGS.items() if f"{name}=" not in block and name != "temperature"}
    names = {}
    exec(block.replace('output_dir="out"', f"output_dir={str(tmp_path)!r}, **{quick!r}"), names)
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].state.log_history[0]["endo_reward/unscored"] == 0


def test_the_reward_file_for_openrlhf_runs():
    [block] = OTHERS
    names = {}
    exec(block, names)
    assert names["reward_func"](["<|user|>2 + 2<|end|>4"], ["<|user|>2 + 2<|end|>"], [None])["rewards"].shape == (1,)


def _strings(path):
    """Every string in a module; "..." stands for what an f-string fills in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("said", SAID)
def test_what_it_says_is_what_is_raised(said):
    assert any(said in text for path in (ROOT / "endoreward_fast").rglob("*.py") for text in _strings(path))
