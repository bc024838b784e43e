"""Read figures from machine code: SASS of NVIDIA, assembly of AMD."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

# Bytes of one lane. An NVIDIA instruction without a width moves 4.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMD_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}
AMD_MEMORY = re.compile(r"\b(?:global|buffer|flat)_(load|store)_([a-z]+)(?:x(\d))?(?:_d16)?(?:_hi)?\b")
NVIDIA_MEMORY = re.compile(r"\b(LDGSTS|LDG|STG)\b((?:\.\w+)*)")


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


def sass(cubin: bytes) -> str:
    """Disassemble. Triton's own disassembly ends after 4096 instructions."""
    return instructions(_cuobjdump(cubin, "-sass"))


def instructions(dump: str) -> str:
    """Return the instructions in the output of cuobjdump, one line "/*address*/ instruction" each."""
    found = re.findall(r"^\s*/\*(\w{4,})\*/\s+(\S.*?)\s*;?\s*/\* 0x", dump, re.MULTILINE)
    if not found:
        raise RuntimeError("no instruction in the output of cuobjdump -sass")
    return "\n".join(f"/*{address}*/ {code}" for address, code in found)


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    text = _cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"no register count in the output of cuobjdump: {text[:200]!r}")
    return {"registers": int(found[1]), "spill_bytes": int(found[2])}


def amd_usage(assembly: str) -> dict[str, int]:
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
    return {"registers": registers, "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])}


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
