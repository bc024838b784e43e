"""How many cycles the loads from shared memory take beside the multiply-adds that they feed.

Shared memory has 32 banks of 4 bytes. A wavefront is one cycle of it: it serves any number of lanes, but one word of
each bank.

The addresses of the 32 lanes of a warp are computed from PTX: every load's address is followed back to the thread's
index. What is the same for all lanes (a pipeline stage, an argument) counts as 0. ptxas merges neighbouring loads, so
the words that a lane reads from one base register are counted in aligned pieces of up to 16 bytes. The count is a lower
bound: sm_90's fp32 kernel of 64x64x16 has 272 wavefronts in a step by it, and 340 by the loads in its SASS.
"""

import re

import numpy as np

LANES = BANKS = 32
LABEL = re.compile(r"^(\$L\w+):")
LOAD = re.compile(r"\bld\.shared(?:\.v(\d))?\.\w(\d+)\s+\S.*?\[\s*(%\w+)\s*(?:\+\s*(\d+))?\s*\]")
DEFINITION = re.compile(r"^\s*([a-z][\w.]*)\s+(%\w+), (.+);")
FFMA = re.compile(r"\bfma\.rn\.f32(x2)?\s")
OPERATIONS = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "bfe": lambda a, start, count: (a >> start) & ((1 << count) - 1),
    "selp": lambda a, b, condition: a,
    "rem": lambda a, b: a % b,
    "div": lambda a, b: a // b,
}


def wavefronts_per_ffma(ptx: str) -> float:
    """Return wavefronts of shared loads per FFMA of a warp, in the loop with most FFMAs; 0 if it loads none.

    A processor issues 4 FFMAs of a warp in a cycle, and one wavefront. Above 0.25, shared memory is the limit.
    """
    step = _step(ptx)
    multiply_adds = _ffmas(step)
    if not multiply_adds:
        return 0.0
    pieces: dict[str, set[int]] = {}
    for vector, bits, base, offset in LOAD.findall(step):
        first, size = int(offset or 0), int(vector or 1) * int(bits) // 8
        pieces.setdefault(base, set()).update(range(first // 4, -(-(first + size) // 4)))
    lanes = _Lanes(ptx)
    total = sum(
        wavefronts(lanes.of(base) + 4 * first, 4 * count)
        for base, words in pieces.items()
        for first, count in _aligned(words)
    )
    return round(total / multiply_adds, 2)


def wavefronts(addresses: np.ndarray, size: int) -> int:
    """Return the wavefronts of one load of `size` bytes at each address: the most words that one bank has to serve."""
    words = {int(address) // 4 + i for address in addresses for i in range(size // 4)}
    return int(np.bincount([word % BANKS for word in words]).max())


def _aligned(words: set[int]) -> list[tuple[int, int]]:
    """Cover words with pieces (first, count) of 4, 2 or 1 words, each aligned to its own size."""
    out, left = [], set(words)
    for count in (4, 2, 1):
        for first in sorted(word for word in left if word % count == 0):
            piece = set(range(first, first + count))
            if piece <= left:
                out.append((first, count))
                left -= piece
    return out


def _step(ptx: str) -> str:
    """Return the text of the innermost loop with most FFMAs."""
    lines = ptx.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := LABEL.match(line))}
    spans = []
    for i, line in enumerate(lines):
        back = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if back and labels[back[1]] <= i:
            spans.append((labels[back[1]], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    texts = ["\n".join(lines[start : end + 1]) for start, end in inner]
    return max(texts, key=_ffmas, default="")


def _ffmas(text: str) -> int:
    return sum(2 if pair else 1 for pair in FFMA.findall(text))


class _Lanes:
    """The value of an integer register in each lane of the first warp."""

    def __init__(self, ptx: str) -> None:
        self._definitions: dict[str, tuple[str, list[str]]] = {}
        for line in ptx.splitlines():
            if found := DEFINITION.match(line):
                self._definitions.setdefault(found[2], (found[1], [x.strip() for x in found[3].split(",")]))
        self._known: dict[str, np.ndarray] = {"%tid.x": np.arange(LANES)}

    def of(self, operand: str) -> np.ndarray:
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
            return np.full(LANES, int(operand, 0))
        if operand not in self._known:
            self._known[operand] = np.zeros(LANES, dtype=np.int64)  # a register that depends on itself counts a loop
            self._known[operand] = self._evaluate(operand)
        return self._known[operand]

    def _evaluate(self, register: str) -> np.ndarray:
        opcode, operands = self._definitions.get(register, ("ld", []))
        name = opcode.split(".")[0]
        if name in ("ld", "setp") or not register.startswith("%"):  # an argument, global_smem, or a condition
            return np.zeros(LANES, dtype=np.int64)
        if name not in OPERATIONS:
            raise RuntimeError(f"{opcode}: an address in shared memory uses it, and shared.py does not compute it")
        return OPERATIONS[name](*map(self.of, operands))
