"""The GPU benchmark's parts that need no GPU: every subject runs on a tiny head, ratios, rates, skips, the picture."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, harness, peers, peers_gpu, plot_gpu, shapes
from bench.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", Shape("tiny", 16, 333))


def run(subject, device, rounds=4, rows=40, deadline=None, timer=None):
    ticks = iter(range(1, 10_000))
    deadline = time.monotonic() + 60 if deadline is None else deadline
    timer = timer or (lambda call: float(next(ticks)))
    return gpu.run_case(gpu.Case(subject, "tiny", rows, rounds), device, timer, lambda call: 1.0, deadline)


@pytest.mark.parametrize("subject", gpu.SUBJECTS)
def test_every_subject_runs_and_says_what_it_left_out(subject, device, monkeypatch):
    monkeypatch.setattr(peers_gpu, "compiled", lambda function: function)  # which takes a minute to compile
    result = run(subject, device)
    assert result["rounds_done"] == 4 and next(iter(result["peers"])) == result["ceiling"]
    assert result["peers"][result["ceiling"]]["ratio"] == 1.0
    assert all(reason for reason in result["skipped"].values())
    candidates = {"linear": peers_gpu.linear_peers(), "logits": peers_gpu.logits_peers(False)}.get(subject, {})
    assert set(candidates) <= set(result["peers"]) | set(result["skipped"])
    assert json.dumps(result) and gpu.table(result).count("\n") == len(result["peers"]) + len(result["skipped"])


def test_ratios_are_taken_within_rounds_and_the_order_rotates(device, monkeypatch):
    seen = []
    calls = {"ceiling": lambda: "ceiling", "ours": lambda: "ours"}
    monkeypatch.setitem(gpu.SUBJECTS, "linear", lambda inputs: (calls, {}))

    def timer(call):
        seen.append(call())
        busy = 10.0 if len(seen) > 4 else 1.0  # the machine slows down for everyone
        return busy * (2.0 if seen[-1] == "ours" else 1.0)

    result = run("linear", device, timer=timer)
    assert result["peers"]["ours"]["ratio"] == 2.0
    assert seen == ["ceiling", "ours", "ours", "ceiling"] * 2


def test_past_the_deadline_a_case_has_three_rounds(device, monkeypatch):
    monkeypatch.setitem(gpu.SUBJECTS, "linear", lambda inputs: ({"ceiling": lambda: None}, {}))
    assert run("linear", device, rounds=9, deadline=0.0)["rounds_done"] == 3


def test_rates_are_those_of_the_formulas():
    shape, case = Shape("x", 1024, 100_000), gpu.Case("linear", "x", 1000)
    linear = gpu.summary(case, shape, "ours", [2.0] * 3, [1.0] * 3, 0.0)
    assert linear["tflops"] == pytest.approx(2 * 1000 * 1024 * 100_000 / 2e-3 / 1e12) and linear["ratio"] == 2.0
    case = gpu.Case("logits", "x", 1000)
    assert gpu.summary(case, shape, "ours", [1.0] * 3, [1.0] * 3, 0.0)["gbps"] == pytest.approx(200.0)
    assert gpu.summary(case, shape, "device copy", [1.0] * 3, [1.0] * 3, 0.0)["gbps"] == pytest.approx(400.0)


def test_a_wrong_peer_is_not_timed_and_ours_must_not_fail(device):
    inputs = peers.make_inputs("linear", shapes.SHAPES["tiny"], 40, torch.float32, device=device)
    wrong = peers.Peer(lambda i: (torch.zeros(40, device=device), torch.zeros(40, device=device)))
    calls, skipped = gpu._gated({}, {"theirs": wrong}, inputs)
    assert not calls and "off by" in skipped["theirs"]
    with pytest.raises(AssertionError, match="off by"):
        gpu._gated({}, {peers_gpu.FUSED: wrong}, inputs)
    absent = peers.Peer(lambda i: None, missing="it is not installed")
    assert gpu._gated({}, {"absent": absent}, inputs) == ({}, {"absent": "it is not installed"})


def test_the_picture_is_drawn_from_the_record(tmp_path):
    def peer(ratio, mib):
        return {
            "median_ms": ratio,
            "ratio": ratio,
            "ratio_low": ratio,
            "ratio_high": ratio,
            "extra_mib": mib,
            "tflops": 1 / ratio,
        }

    cases = [
        {"subject": "linear", "shape": name, "rows": rows, "ceiling": "torch.mm",
         "peers": {"torch.mm": peer(1.0, 2.0 * rows), peers_gpu.FUSED: peer(1.1, 5.0)}}
        for name in ("qwen3-0.6b", "qwen3-8b") for rows in (64, 512, 8192)
    ]  # fmt: skip
    about = harness.environment() | {"device": "a made-up device", "triton": "0"}
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": about, "cases": cases}))
    assert plot_gpu.draw(tmp_path).stat().st_size > 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no CUDA or ROCm device" in done.stderr
    assert not (tmp_path / "out").exists()
