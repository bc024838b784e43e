"""Read figures from machine code: SASS of NVIDIA, assembly of AMD."""

import re
from collections import Counter

# Bytes of one lane. An NVIDIA instruction without a width moves 4.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMD_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}
AMD_MEMORY = re.compile(r"\b(?:global|buffer|flat)_(load|store)_([a-z]+)(?:x(\d))?(?:_d16)?(?:_hi)?\b")
NVIDIA_MEMORY = re.compile(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)")


def widths(text: str) -> dict[str, dict[int, int]]:
    """Count accesses to global memory by bytes a lane: {"load": {16: 4, 8: 1}, "store": {4: 2}}.

    Copies by the bulk copy engine (TMA) have no lanes and are left out.
    """
    found: dict[str, Counter] = {"load": Counter(), "store": Counter()}
    for opcode, suffixes in NVIDIA_MEMORY.findall(text):
        width = next((WIDTHS[part] for part in reversed(suffixes.split(".")) if part in WIDTHS), 4)
        found["store" if opcode == "STG" else "load"][width] += 1
    for kind, unit, count in AMD_MEMORY.findall(text):
        found[kind][AMD_WIDTHS[unit] * int(count or 1)] += 1
    return {kind: dict(sorted(counts.items(), reverse=True)) for kind, counts in found.items()}


def main_width(counts: dict[int, int]) -> int:
    """Return the width that moves most of the bytes, which is that of the big operand; 0 without an access."""
    return max(counts, key=lambda width: (width * counts[width], -width), default=0)
