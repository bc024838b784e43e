"""The loops of machine code, and what one trip through them costs.

A linear kernel has three loops inside each other: over pieces of work, over vocabulary tiles, and over D. The loop over
D is the innermost one with matmul instructions; the loop over vocabulary tiles is the smallest one around it.
"""

import heapq
import re
from dataclasses import dataclass

NVIDIA_LINE = re.compile(r"^/\*(?P<address>\w+)\*/ (?P<code>.+)$")  # as code.sass writes it
AMD_LABEL = re.compile(r"^(\.LBB\w+):")
AMD_LINE = re.compile(r"^\t(?P<code>[a-z]\w+(?: [^;]*)?)")
# ptxas jumps over a long way by CALL.REL.NOINC. Where it is a call, control comes back.
BRANCH = re.compile(r"\b(?:BRA|CALL|s_c?branch)[.\w]* (?:(?P<condition>!?U?[PR]\w+), ?)?(?P<to>\.?\w+)$")
END = re.compile(r"^(?:EXIT|RET|BRX|s_endpgm|s_setpc)")
BARRIER = re.compile(r"\bBAR\.SYNC|\bs_barrier\b")
WGMMA = re.compile(r"\bHGMMA")
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR")


@dataclass(frozen=True)
class Loops:
    """Barriers are those that every trip meets: a branch that only some tiles take does not count."""

    fill_barriers: int = 0  # of a vocabulary tile, before its first step over D
    step_barriers: int = 0  # of a step over D
    tile_barriers: int = 0  # of a vocabulary tile, after its last step
    wgmmas: int = 0  # asynchronous matmul instructions of a step
    waits: int = 0  # how often a step waits for them


def loops(text: str, matmul: str) -> Loops:
    """Read the loops around the instructions that match `matmul`; all 0 if no loop has one."""
    code = Code(text)
    found = code.loops()
    matmuls = {i for i, line in enumerate(code.lines) if re.search(matmul, line)}
    with_matmul = [loop for loop in found if loop.body & matmuls]
    if not with_matmul:
        return Loops()
    # An epilogue can have the instruction too (FFMA): the loop over D has most of them for its size.
    innermost = [x for x in with_matmul if not any(y.body < x.body for y in with_matmul)]
    step = max(innermost, key=lambda loop: len(loop.body & matmuls))
    around = [loop for loop in found if step.body < loop.body]
    steps = [code.lines[i] for i in step.body]
    counts = {
        "step_barriers": code.fewest_barriers({step.header}, step.latches, step.body),
        "wgmmas": sum(bool(WGMMA.search(line)) for line in steps),
        "waits": sum(bool(WAIT.search(line)) for line in steps),
    }
    if around:
        tile = min(around, key=lambda loop: len(loop.body))
        rest = tile.body - step.body
        leaves = {j for i in step.body for j in code.after[i] if j in rest}
        enters = {i for i in rest if step.header in code.after[i]}
        counts["fill_barriers"] = code.fewest_barriers({tile.header}, enters, rest)
        counts["tile_barriers"] = code.fewest_barriers(leaves, tile.latches, rest)
    return Loops(**counts)


@dataclass(frozen=True)
class Loop:
    header: int
    latches: frozenset[int]  # from where control goes back to the header
    body: frozenset[int]


class Code:
    """Instructions by position, and for each one the positions that control may go to."""

    def __init__(self, text: str) -> None:
        self.lines: list[str] = []
        places: dict[str, int] = {}
        for line in text.splitlines():
            if label := AMD_LABEL.match(line):
                places[label[1]] = len(self.lines)
            elif found := NVIDIA_LINE.match(line):
                places[hex(int(found["address"], 16))] = len(self.lines)
                self.lines.append(found["code"])
            elif found := AMD_LINE.match(line):
                self.lines.append(found["code"].strip())
        self.after = [self._after(i, places) for i in range(len(self.lines))]

    def _after(self, i: int, places: dict[str, int]) -> list[int]:
        line = self.lines[i]
        following = [i + 1] if i + 1 < len(self.lines) else []
        if branch := BRANCH.search(line):
            sometimes = line.startswith("@") or branch["condition"] or "CALL" in line or "s_cbranch" in line
            return [places[branch["to"]], *(following if sometimes else [])]
        return [] if END.match(line) else following

    def loops(self) -> list[Loop]:
        """Return the natural loops, one for each header."""
        before: list[list[int]] = [[] for _ in self.lines]
        for i, following in enumerate(self.after):
            for j in following:
                before[j].append(i)
        latches: dict[int, set[int]] = {}
        for i, header in self._back_edges():
            latches.setdefault(header, set()).add(i)
        found = []
        for header, ends in latches.items():
            body, todo = {header}, list(ends)
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += before[i]
            found.append(Loop(header, frozenset(ends), frozenset(body)))
        return found

    def _back_edges(self) -> list[tuple[int, int]]:
        """Return the edges to an instruction that the walk in depth from the first one has not left yet."""
        found, open_, seen = [], {0}, {0}
        walk = [(0, iter(self.after[0]))]
        while walk:
            i, following = walk[-1]
            j = next(following, None)
            if j is None:
                open_.discard(i)
                walk.pop()
            elif j in open_:
                found.append((i, j))
            elif j not in seen:
                seen.add(j), open_.add(j)
                walk.append((j, iter(self.after[j])))
        return found

    def fewest_barriers(self, starts: set[int], ends: frozenset[int] | set[int], inside: frozenset[int]) -> int:
        """Return the fewest barriers on a way from a start to an end that stays inside; 0 if there is no way."""
        cost = {i: int(bool(BARRIER.search(self.lines[i]))) for i in inside}
        queue = [(cost[i], i) for i in starts]
        best: dict[int, int] = {}
        while queue:
            barriers, i = heapq.heappop(queue)
            if i in ends:
                return barriers
            if i not in best:
                best[i] = barriers
                for j in self.after[i]:
                    if j in inside and j not in best:
                        heapq.heappush(queue, (barriers + cost[j], j))
        return 0
