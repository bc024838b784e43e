"""docs/trainers.md: its Python blocks run as printed, and the package raises the errors that it explains."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
TRL = [block for block in BLOCKS if "from trl" in block]
(TOOLS,) = (block for block in BLOCKS if "tools=[double]" in block)
OTHERS = [block for block in BLOCKS if block not in (*TRL, TOOLS)]
SAID = re.findall(r"^\| (.*?) \|", PAGE[PAGE.index("| it says |") :], re.M)[1:]


@pytest.mark.parametrize("block", TRL, ids=["reward function", "token-level, one forward", "watched"])
def test_training_blocks_run(block, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["trainer"].state.global_step == 2


def test_the_example_with_tools_runs():
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    names = {}
    exec(TOOLS, names)
    assert names["double"](3) == 6


def test_the_reward_file_for_openrlhf_runs():
    [block] = OTHERS
    names = {}
    exec(block, names)
    assert names["reward_func"](["<|user|>2 + 2<|end|>4"], ["<|user|>2 + 2<|end|>"], [None])["rewards"].shape == (1,)


def _strings(path):
    """Yield every string in a module, with "..." for the fields of an f-string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("said", SAID)
def test_every_error_that_the_page_explains_is_raised(said):
    assert any(said in text for path in (ROOT / "endoreward_fast").rglob("*.py") for text in _strings(path))
