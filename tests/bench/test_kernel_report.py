"""The kernel report: how it reads machine code, and that each gate fails on a kernel or call with the loss it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.kernel_report.code import instructions, main_width, widths
from bench.kernel_report.loops import Loops, loops
from bench.kernel_report.shared import wavefronts, wavefronts_per_ffma

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """Return what the gates say of each planted kernel and call."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = ROOT / "tests/harness/planted_kernels.py"
    run = subprocess.run([sys.executable, script], check=True, env=environment, capture_output=True, text=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "planted, loss",
    {
        "narrow loads": "loads 2 bytes at a time",
        "spill": "spills",
        "barriers": "meets 3 barriers after each vocabulary tile",
        "waits": "they run one by one",
        "bank conflicts": "wavefronts of shared memory per FFMA",
        "many launches": "makes 7 launches",
        "read-back": "reads back 1 times",
    }.items(),
)
def test_a_gate_names_the_planted_loss(said, planted, loss):
    assert any(loss in line for line in said[planted])


@pytest.mark.parametrize("sound", ["wide loads", "sound matmul", "few launches"])
def test_the_gates_pass_the_sound_twins(said, sound):
    assert said[sound] == []


NVIDIA = """
LDG.E.128.CONSTANT R4, desc[UR4][R2.64]
@P0 LDG.E.U16 R8, [R2.64+0x10]
LDGSTS.E.BYPASS.LTC128B.128 [R3], [R2.64]
LDG.E R9, [R2.64]
STG.E.64 [R2.64], R4
"""
AMD = """
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tbuffer_load_ushort v1, v2, s[0:3], 0 offen
\tglobal_load_short_d16_hi v1, v[2:3], off
\tglobal_store_dwordx2 v[0:1], v[2:3], off
"""


def test_widths_of_accesses_to_global_memory():
    assert widths(NVIDIA) == {"load": {16: 2, 4: 1, 2: 1}, "store": {8: 1}}
    assert widths(AMD) == {"load": {16: 1, 2: 2}, "store": {8: 1}}


def test_the_main_width_is_that_of_most_bytes():
    assert main_width({8: 1, 2: 32, 1: 1}) == 2
    assert main_width({16: 4, 8: 1, 4: 5}) == 16
    assert main_width({}) == 0


def test_a_dump_is_read_beyond_4096_instructions():
    dump = "".join(f"        /*{16 * i:04x}*/    NOP ;    /* 0x00 */\n    /* 0x00 */\n" for i in range(5000))
    assert instructions(dump).count("NOP") == 5000


def code(lines: str) -> str:
    return "\n".join(f"/*{16 * i:04x}*/ {line}" for i, line in enumerate(lines.strip().splitlines()))


# The loop over vocabulary tiles is 0x00 to 0xd0, that over D 0x20 to 0x70, with a wait at 0xf0. A branch skips 0xa0.
NESTED = code("""
MOV R1, R2
BAR.SYNC 0x0
@!P1 BRA 0xf0
BAR.SYNC.DEFER_BLOCKING 0x0
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
@!P1 BRA 0x20
BAR.SYNC.DEFER_BLOCKING 0x0
@P2 BRA 0xb0
BAR.SYNC.DEFER_BLOCKING 0x0
BAR.SYNC.DEFER_BLOCKING 0x0
FADD R1, R2, R3
BRA.U UP0, 0x0
EXIT
@!P1 BRA 0xf0
BRA 0x30
""")


def test_the_loops_over_vocabulary_tiles_and_over_d():
    assert loops(NESTED, r"\bHGMMA") == Loops(fill_barriers=1, step_barriers=1, tile_barriers=2, wgmmas=2, waits=1)
    assert loops(code("FADD R1, R2, R3\nEXIT"), r"\bHGMMA") == Loops()


def test_loops_of_amd():
    text = "x:\n.LBB0_1:\n\ts_barrier\n\tv_mfma_f32 a[0:3], v0, v1\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm ; end\n"
    assert loops(text, r"\bv_mfma") == Loops(step_barriers=1)


@pytest.mark.parametrize(
    "pitch, size, expected", [(4, 4, 1), (16, 16, 4), (128, 4, 32), (128, 16, 32), (0, 16, 1), (8, 4, 2)]
)
def test_wavefronts_of_one_load(pitch, size, expected):
    """Neighbouring words take one wavefront, 512 bytes take four, and lanes 128 bytes apart take one each."""
    assert wavefronts(np.arange(32) * pitch, size) == expected


PTX = """
\tmov.u32 \t%r1, %tid.x;
\tand.b32 \t%r2, %r1, 31;
\tshl.b32 \t%r3, %r2, {shift};
\tmov.b32 \t%r4, global_smem;
\tadd.s32 \t%r5, %r4, %r3;
$L__BB0_1:
\tld.shared.b32 \t%r6, [%r5+8];
\tld.shared.b32 \t%r7, [%r5+12];
\tfma.rn.f32 \t%r8, %r6, %r7, %r8;
\tfma.rn.f32 \t%r9, %r6, %r7, %r9;
\t@%p1 bra \t$L__BB0_1;
"""


def test_addresses_are_followed_back_to_the_thread():
    """The two words merge into one load of 8 bytes, at pitches of 8 and of 128 bytes."""
    assert wavefronts_per_ffma(PTX.format(shift=3)) == 2 / 2
    assert wavefronts_per_ffma(PTX.format(shift=7)) == 32 / 2
