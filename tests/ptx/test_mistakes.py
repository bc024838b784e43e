"""Mistakes planted into the PTX or the source of our kernels. Each must be found, and for the stated reason."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import endoreward_fast as er
import endoreward_fast.kernels
from emulator.faults import Deadlock, EarlyAccess, OutOfBounds, Race, Unfinished, Unwritten

BF16, F32 = torch.bfloat16, torch.float32


def linear(rows, vocab, dim, dtype):
    def run():
        hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
        er.linear_vocab_stats(hidden, weight, torch.arange(rows), entropy=True, impl="fused")

    return run


def logits(dtype, backward=False):
    def run():
        z = torch.randn(3, 5, 295).to(dtype).requires_grad_(backward)
        out = er.vocab_stats(z, torch.arange(15).view(3, 5), entropy=True, impl="fused")
        if backward:
            out.lse.sum().backward()

    return run


CASES = {
    # name: (device, kernel, what launches it)
    "logits": (80, "logits_partials_kernel", logits(F32)),
    "gradient": (80, "logits_backward_kernel", logits(F32, backward=True)),
    "sm_80": (80, "linear_partials_kernel", linear(40, 72, 144, BF16)),
    "bulk copies": (90, "linear_partials_kernel", linear(70, 72, 264, BF16)),
}


def replaced(ptx: str, pattern: str, by: str, which: int | None) -> str:
    """Replace the match number `which` of a pattern (all of them if None), of which there must be one."""
    matches = list(re.finditer(pattern, ptx))
    assert matches, f"{pattern} is not in the PTX"
    for match in reversed(matches if which is None else [matches[which]]):
        ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
    return ptx


def in_kernel(kernel: str, pattern: str, by: str, which: int | None = None):
    """Return a function that rewrites the PTX of one kernel."""
    return lambda ptx: replaced(ptx, pattern, by, which) if f".entry {kernel}(" in ptx else ptx


TRY_WAIT = r"(mbarrier\.try_wait\S+\s+complete, \[%r\d+\]), (%r\d+);"
COPY_EARLY = "nothing has waited for the copy into shared address"
IN_PTX = {
    # mistake: (case, pattern, replacement, which, fault, what it says)
    "cp.async: no wait": ("sm_80", r"cp\.async\.wait_group\s+\d+;", "", None, EarlyAccess, COPY_EARLY),
    "cp.async: a wait one too short": (
        "sm_80", r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", None, EarlyAccess, COPY_EARLY,
    ),
    "cp.async: the last wait too short": (
        "sm_80", r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;", None,
        (EarlyAccess, Unfinished), "nothing has waited for",
    ),
    "cp.async: a copy in no group": (
        "sm_80", r"cp\.async\.commit_group;", "", None, (EarlyAccess, Unfinished), "nothing has waited for",
    ),
    "wgmma: no wait": (
        "bulk copies", r"wgmma\.wait_group\.sync\.aligned\s+\d;", "", None, EarlyAccess,
        "nothing has waited for the wgmma that reads shared address",
    ),
    "wgmma: a stage given back while it is read": (
        "bulk copies", r"wgmma\.wait_group\.sync\.aligned\s+1;", "wgmma.wait_group.sync.aligned 2;", None, EarlyAccess,
        "cp.async.bulk.*: nothing has waited for the wgmma that reads shared address",
    ),
    "mbarrier: the other phase": (
        "bulk copies", TRY_WAIT, r"{.reg .b32 other; xor.b32 other, \2, 1; \1, other;}", None,
        (Deadlock, EarlyAccess), "of the mbarrier at shared address|nothing has waited for the copy",
    ),
    "mbarrier: no wait": ("bulk copies", TRY_WAIT, "setp.eq.b32 complete, 0, 0;", None, EarlyAccess, COPY_EARLY),
    "mbarrier: too few bytes announced": (
        "bulk copies", r"(arrive\.expect_tx\S+\s+_, \[%r\d+\]), \d+", r"\1, 64", None, Deadlock,
        r"0 of 1 arrivals and -\d+ bytes are missing",
    ),
    "stores without their masks": ("sm_80", r"@%p\d+ (st\.global)", r"\1", None, OutOfBounds, "of 'p_"),
    "loads without their masks": ("logits", r"@%p\d+ (ld\.global)", r"\1", None, OutOfBounds, "of 'logits'"),
    "gradients stored without a mask": (
        "gradient", r"@%p\d+ (st\.global)", r"\1", None, OutOfBounds, "of 'grad'",
    ),
    "copies without their masks": (
        "sm_80", r"(cp\.async\.cg[^;]+), 0x10, %r\d+;", r"\1, 0x10, 16;", None, OutOfBounds, "of '(hidden|weight)'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", IN_PTX)
def test_a_mistake_in_the_ptx_is_found(mistake, package):
    case, pattern, by, which, fault, says = IN_PTX[mistake]
    arch, kernel, launch = CASES[case]
    package.on(arch, rewrite=in_kernel(kernel, pattern, by, which))
    with pytest.raises(fault, match=says):
        launch()


BARRIER = r"bar\.sync\s+0;"
ACCESS = r"(?:ld|st)\.shared|ldmatrix|cp\.async\.wait_group"
OTHER = r"cp\.async|mbarrier\.|wgmma\."


def barriers_between_accesses(ptx: str) -> list[int]:
    """Return the numbers of the barriers with a load or store of shared memory before and behind them.

    Triton also writes a barrier before each bulk copy, where one thread does all the work and several are superfluous.
    """
    kinds = [
        match.lastgroup for match in re.finditer(f"(?P<barrier>{BARRIER})|(?P<access>{ACCESS})|(?P<other>{OTHER})", ptx)
    ]
    places = [i for i, kind in enumerate(kinds) if kind == "barrier"]
    return [k for k, i in enumerate(places) if kinds[i - 1 : i] == ["access"] and kinds[i + 1 : i + 2] == ["access"]]


@pytest.mark.parametrize("case", ["logits", "sm_80", "bulk copies"])
def test_a_barrier_left_out_is_found(case, package):
    """One barrier is left out at a time. The order of warps does not matter: what no barrier orders is a race."""
    arch, kernel, launch = CASES[case]
    seen: list[str] = []
    package.on(arch, rewrite=lambda ptx: seen.append(ptx) or ptx)
    launch()
    (ptx,) = {x for x in seen if f".entry {kernel}(" in x}
    barriers = barriers_between_accesses(ptx)
    unmissed = []
    for k in barriers:
        package.on(arch, rewrite=in_kernel(kernel, BARRIER, "", k))
        try:
            launch()
        except (Race, EarlyAccess, Unwritten):
            continue
        unmissed.append(k)
    # One may guard what only another turn of the loop over pieces of work would overwrite; here there is one turn.
    assert len(barriers) >= 6 and len(unmissed) <= 1, unmissed


LINEAR = "linear_vocab_stats"
IN_SOURCE = {
    # mistake: (module, pattern, replacement, device, what launches it, fault, what it says)
    "the partials one row further": (
        LINEAR, r"(o = split\.to\(tl\.int64\) \* \w+ \+ row)\n", r"\1 + 1\n", 90, linear(70, 72, 64, BF16),
        OutOfBounds, "of 'p_[mst]'",
    ),
    "partials stored without a mask": (
        LINEAR, r"tl\.store\(p_m \+ o, m, mask=m_row\)", "tl.store(p_m + o, m)", 80, linear(40, 72, 64, BF16),
        OutOfBounds, "of 'p_m'",
    ),
    "rows of the weight without a mask": (
        LINEAR, r"mask=\(col < vocab\)\[:, None\] & ", "mask=", 80, linear(40, 72, 70, BF16),
        OutOfBounds, "of 'weight'",
    ),
    "columns of hidden without a mask": (
        LINEAR, r"mask=\(row < n_rows\)\[:, None\] & \(k < dim\)\[None, :\]", "mask=(row < n_rows)[:, None]", 90,
        linear(40, 72, 70, BF16), OutOfBounds, "of 'hidden'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", IN_SOURCE)
def test_a_mistake_in_the_source_is_found(mistake, package, monkeypatch, tmp_path):
    module, pattern, by, arch, launch, fault, says = IN_SOURCE[mistake]
    monkeypatch.setitem(sys.modules, f"{KERNELS}.{module}", changed_module(module, pattern, by, tmp_path))
    package.on(arch)
    with pytest.raises(fault, match=says):
        launch()


KERNELS = endoreward_fast.kernels.__name__


def changed_module(name: str, pattern: str, by: str, folder: Path):
    """Import a copy of a file of kernels/ in which every match of a pattern, of which there is one, is replaced."""
    source = Path(endoreward_fast.kernels.__path__[0], f"{name}.py").read_text()
    source, count = re.subn(pattern, by, source)
    assert count == 1, f"{name}.py holds {pattern} {count} times"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{KERNELS}.{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
