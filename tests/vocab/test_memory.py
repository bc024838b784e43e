"""Extra memory of the chunked path, as measured by the operating system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, torch
from pathlib import Path
from endoreward_fast.vocab import chunked
from endoreward_fast.vocab.rows import RowGrads

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024

def run(rows, dim, vocab):
    hidden, weight = (torch.randn(n, dim).to(dtype) for n in (rows, vocab))
    targets, g = torch.randint(0, vocab, (rows,)), torch.ones(rows)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    head = dict(bias=None, logit_scale=1.0, softcap=None, alpha=1.0)
    stats, _ = chunked.linear_forward(hidden, weight, targets, entropy=True, logit_mean=True, **head)
    outputs = 0
    if backward:
        grads = RowGrads(g, g, g, g)
        d = chunked.linear_backward(hidden, weight, targets, stats, grads, needs=(True, True, False), **head)
        outputs = sum(x.numel() * x.element_size() for x in d[:2]) / 2**20
    return resident("VmHWM") - before - outputs

torch.set_num_threads(2)
dtype, backward = getattr(torch, sys.argv[1]), sys.argv[2] == "backward"
run(4, 16, 100)
print(run(*map(int, sys.argv[3:6])))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize(
    ("dtype", "direction", "rows", "dim", "vocab"),
    [
        ("float32", "forward", 4096, 64, 10000),  # its logits would be 156 MiB
        ("bfloat16", "forward", 4096, 64, 10000),
        ("bfloat16", "backward", 4096, 1024, 3000),  # dhidden's accumulator alone would be 16 MiB
    ],
)
def test_extra_memory_is_under_64_mib(dtype, direction, rows, dim, vocab):
    """Counts all memory of the process, with that of the matmul library but without the returned gradients."""
    command = [sys.executable, "-c", MEASURE, dtype, direction, *map(str, (rows, dim, vocab))]
    threshold = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed means returned
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | threshold)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout) < 64
