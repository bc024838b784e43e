"""The Markdown pages of the repository, and what they print: blocks, links, anchors, commands."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

from cli_harness import run
from endoreward_fast.command.cli import app

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
NEEDS = "needs "
"""what a printed line says that cannot run here: a network, a GPU, an extra"""
PLACEHOLDERS = {"FILE", "MODEL", "pairs.jsonl"}
ELSEWHERE = {"torchrun", "pip", "make", "git", "zcat", "accelerate", "HYPOTHESIS_PROFILE=long"}


class Block(NamedTuple):
    """A fenced block, and the text block that stands directly below it: what it prints."""

    language: str
    text: str
    prints: str | None


def pages() -> list[Path]:
    """Every Markdown page that is tracked, or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split() if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md")]
    return [ROOT / name for name in dict.fromkeys(names) if (ROOT / name).is_file() and ".venv" not in name]


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks in one language."""
    text, found = page.read_text(), []
    matches = list(FENCE.finditer(text))
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        below = following and following[1] == "text" and not text[match.end() : following.start()].strip()
        found.append(Block(match[1], match[2], following[2] if below else None))
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The page without its blocks and its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text()))


def links(page: Path) -> Iterator[str]:
    """Where the page's links and pictures lead, but for other sites."""
    for match in LINK.finditer(prose(page)):
        target = match[1] or match[2]
        if "://" not in target and not target.startswith("mailto:"):
            yield target


def anchors(page: Path) -> set[str]:
    """The page's headings as a code host makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(script: str) -> Iterator[tuple[str, list[str]]]:
    """(command as printed, its words) of a block for the shell. A comment is no word; quotes may span lines."""
    printed = ""
    for line in script.splitlines():
        printed = f"{printed}\n{line}".strip()
        try:
            words = shlex.split(printed.replace("\\\n", " "), comments=True)
        except ValueError:  # a quote is open, or the line ends in a backslash
            continue
        if words:
            yield printed, words
        printed = ""
    assert not printed, f"a quote is never closed: {printed}"


def runs_here(line: str, words: list[str]) -> bool:
    own_tests = words[:2] == ["endoreward", "demo"]
    return not own_tests and NEEDS not in line and words[0] not in ELSEWHERE and not PLACEHOLDERS & set(words)


def perform(line: str, words: list[str]) -> str:
    """Run one line in the current folder; what it prints."""
    if words[0] == "endoreward" and not {">", "|"} & set(words):
        return run(*words[1:]).stdout
    return subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True).stdout


def unknown_flags(words: list[str]) -> list[str]:
    """Flags of an `endoreward` line that the command does not have."""
    after = words[next(i for i, word in enumerate(words) if word in ("endoreward", "endoreward_fast")) + 1 :]
    command = typer.main.get_command(app)
    if after and after[0] in command.commands:
        command, after = command.commands[after[0]], after[1:]
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}
    return [word for word in after if word.startswith("-") and word != "-" and word.split("=")[0] not in known]
