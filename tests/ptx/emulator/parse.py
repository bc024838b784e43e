"""From PTX text to a list of instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .faults import NotEmulated

WORDS = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|(?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)", re.DOTALL
)


@dataclass(frozen=True)
class Instruction:
    text: str  # for messages: long ones are shortened
    name: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[str, ...]
    guard: str | None = None  # the predicate under which a thread executes it
    unless: bool = False  # whether it executes where the guard is false

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass
class Program:
    name: str
    threads: int
    parameters: list[str] = field(default_factory=list)  # names, in the order of the arguments
    registers: dict[str, str] = field(default_factory=dict)  # name: type, as in "b32"
    labels: dict[str, int] = field(default_factory=dict)  # name: index of the instruction behind it
    tables: dict[str, list[str]] = field(default_factory=dict)  # labels that a brx.idx chooses from
    instructions: list[Instruction] = field(default_factory=list)
    code: list = field(default_factory=list)  # what decode.py makes of the instructions, once they first run


def parse(ptx: str) -> Program:
    """Return the program of the first kernel in a PTX module."""
    text = "\n".join(_without_comments(ptx))
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+[^{]*)?)\{", text, re.DOTALL)
    threads = entry and re.search(r"\.reqntid\s+(\d+)", entry[3])
    if not threads:
        raise NotEmulated("PTX without a kernel of a known number of threads")
    program = Program(entry[1], int(threads[1]))
    program.parameters = re.findall(r"([\w$]+_param_\d+)", entry[2])
    branches = []
    for kind, words, blocks in _statements(text, entry.end()):
        if kind == "label":
            program.labels[_scoped(words, blocks)] = len(program.instructions)
        elif words.startswith(".reg"):
            program.registers |= dict(_declared(words))
        elif words.startswith(".branchtargets"):
            program.tables[list(program.labels)[-1]] = [x.strip() for x in words.split(None, 1)[1].split(",")]
        elif words and not words.startswith("."):
            program.instructions.append(_instruction(words))
            if program.instructions[-1].name == "bra":
                branches.append((len(program.instructions) - 1, blocks))
    for at, blocks in branches:  # a label may stand in the branch's own block, or in one around it
        instruction = program.instructions[at]
        names = [_scoped(instruction.operands[0], blocks[:depth]) for depth in range(len(blocks), -1, -1)]
        label = next(name for name in names if name in program.labels)
        program.instructions[at] = replace(instruction, operands=(label,))
    program.code = [None] * len(program.instructions)
    return program


def _scoped(label: str, blocks: tuple[int, ...]) -> str:
    """Return a name for a label that no other block of the function uses. Inline assembly repeats its labels."""
    return f"{label}@{blocks[-1]}" if blocks else label


def _without_comments(ptx: str) -> Iterator[str]:
    for line in ptx.splitlines():
        line = line.partition("//")[0].strip()
        if line and not line.startswith(".loc"):
            yield line


def _statements(text: str, at: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield ("label", name, blocks) and ("statement", words, blocks) of the function body that begins at `at`.

    `blocks` are the places of the opening braces around it, from the outermost, without the function's own.
    """
    blocks = [at]
    while blocks:
        match = WORDS.match(text, at)
        if match is None:
            raise NotEmulated(f"PTX that does not parse: {text[at : at + 80]!r}")
        at = match.end()
        if match["brace"] == "{":
            blocks.append(at)
        elif match["brace"]:
            blocks.pop()
        else:
            yield match.lastgroup, match[match.lastgroup].strip(), tuple(blocks[1:])


def _declared(words: str) -> Iterator[tuple[str, str]]:
    """Yield (register, type) of `.reg .b32 %r<10>` or `.reg .pred p, q`."""
    type_, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", words, re.DOTALL).groups()
    for name in names.split(","):
        many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
        for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
            yield one, type_


def _instruction(words: str) -> Instruction:
    guard, name, operands = re.match(r"(?:@(!?%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", words, re.DOTALL).groups()
    base, *modifiers = name.split(".")
    text = " ".join(words.split())
    if len(text) > 160:  # wgmma names up to 128 registers
        text = f"{text[:90]} ... {text[-50:]}"
    unless = guard is not None and guard.startswith("!")
    guard = guard and guard.lstrip("!")
    return Instruction(text, base, tuple(modifiers), tuple(split(operands)), guard, unless)


def split(operands: str) -> list[str]:
    """Split at the commas outside of brackets: "{%r1, %r2}, [%rd1 + 4]" has two operands."""
    out, depth, start = [], 0, 0
    for i, letter in enumerate(operands):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            out.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*out, last] if last else out


def vector(operand: str) -> list[str]:
    """Return the parts of {a, b}; of anything else, itself."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]
