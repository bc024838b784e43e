"""Pages of docs/: what they print runs as printed, links lead somewhere, and every public name is documented."""

import importlib
import inspect
import re
import sys

import pytest

import endoreward_fast
from pages import ROOT, anchors, blocks, commands, links, pages, perform, runs_here, unknown_flags

DOCS = sorted((ROOT / "docs").glob("*.md"))
OWN_TESTS = {"trainers.md": "integrations/test_trainers_page.py"}
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in DOCS
    if page.name not in OWN_TESTS
    for i, block in enumerate(blocks(page, "python"))
    if "optimizer.step()" not in block.text
]
(REINFORCE,) = (block for block in blocks(ROOT / "docs" / "loop.md", "python") if "optimizer.step()" in block.text)
INTEGRATIONS = ("trl", "grpo", "monitor", "verl", "openrlhf", "prime_rl", "skyrl", "slime", "ray", "ray_serve")
NAMED = re.compile(r"^\.\. (?:currentmodule:: (\S+)|auto(?:function|class|exception|data):: (\S+))", re.M)


@pytest.mark.parametrize("block", EXAMPLES)
def test_python_runs_and_prints_what_is_shown(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block.text, {})
    if block.prints is not None:
        assert capsys.readouterr().out == block.prints


def test_reinforce_raises_the_mean_reward(capsys):
    """It rises by 0.38 to 0.46 (three seeds) from the first three steps to the last three."""
    exec(REINFORCE.text, {})
    rewards = [float(reward) for reward in re.findall(r"reward (\S+),", capsys.readouterr().out)]
    assert len(rewards) == 8
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


def test_python_that_cannot_run_here_says_what_it_needs():
    for page in DOCS:
        for block in blocks(page, "py"):
            assert "# needs " in block.text, page.name


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_commands_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh"):
        for line, words in commands(block.text):
            if {"endoreward", "endoreward_fast"} & set(words):
                assert unknown_flags(words) == [], line
                if runs_here(line, words):
                    perform(line, words)
            elif words[0] == "echo":
                perform(line, words)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_links_from_docs_to_folders_are_links_to_their_files():
    """The site copies files that stand outside docs/, and cannot copy a folder."""
    for page in DOCS:
        assert [
            link for link in links(page) if (page.parent / link.partition("#")[0]).is_dir() and link[0] != "#"
        ] == []


def documented():
    """Every "module.name" that the pages document."""
    found, module = set(), None
    for page in DOCS:
        for current, name in NAMED.findall(page.read_text()):
            module = current or module
            if name:
                found.add(f"{module}.{name}")
    return found


def offered():
    """Every public name: the package's own, and what its integrations are used through."""
    yield from (f"endoreward_fast.{name}" for name in endoreward_fast.__all__)
    for short in INTEGRATIONS:
        module = importlib.import_module(f"endoreward_fast.integrations.{short}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
            if own and (inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, tuple))):
                yield f"{module.__name__}.{name}"


def test_every_public_name_is_documented():
    assert set(offered()) - documented() == set()


def test_what_is_documented_exists():
    for name in documented():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    yield importlib.import_module
    for name in ("docstrings", "outside"):
        sys.modules.pop(name, None)


def test_docstrings_keep_their_columns_on_the_site(extension):
    lines = ["What it does to `x_`: a * b.", "", "    r = z - V", "", "x   (B, T)", "", "The end."]
    assert extension("docstrings").restructured(lines) == [
        r"What it does to ``x_``: a \* b.", "", ".. code-block:: text", "", "    r = z - V", "",
        ".. code-block:: text", "", "    x   (B, T)", "", "The end.", "",
    ]  # fmt: skip


def test_links_out_of_docs_lead_to_copies_on_the_site(extension):
    to_copies = extension("outside").to_copies
    assert (
        to_copies("[a](../README.md) [b](../bench/x/N.md#here)") == "[a](path:../README.md) [b](path:../bench/x/N.md)"
    )
    assert to_copies("[a](api.md#x) [b](../bench/x.json)") == "[a](api.md#x) [b](../bench/x.json)"
