"""The benchmark harness on a small shape: gate, interleaving, memory, record, figure."""

import importlib.util
import json
from dataclasses import asdict

import pytest
import torch

from bench.harness import memory, one, peers, shapes, timing
from bench.harness.timing import Case

SMALL = shapes.Shape("small", 32, 3000)
CAPPED = shapes.Shape("small-capped", 32, 3000, softcap=30.0)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch, tmp_path):
    monkeypatch.setitem(shapes.SHAPES, SMALL.name, SMALL)
    monkeypatch.setitem(shapes.SHAPES, CAPPED.name, CAPPED)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("subject", ["linear", "logits"])
def test_a_case_passes_the_gate_and_gives_ratios(subject, dtype):
    case = Case(subject, "small", 20, dtype, rounds=3, without=("torch.compile",))
    result = timing.run_case(case)
    assert result["skipped"]["torch.compile"] == "left out to save time"
    assert result["peers"][result["baseline"]]["ratio"] == 1.0
    assert result["peers"][peers.OURS]["median_s"] > 0
    if subject == "linear":
        assert result["flops"] == 2 * 20 * 32 * 3000
        assert result["bytes"] == {"fp32": 4, "bf16": 2}[dtype] * 32 * 3020
    path = timing.write("small", timing.environment(), [result])
    record = json.loads(path.read_text())
    assert record["cases"][0]["peers"].keys() == result["peers"].keys()
    assert {"cpu", "cores", "threads", "torch", "date"} <= record["environment"].keys()
    text = timing.table(result)
    assert peers.OURS in text and "skipped: left out to save time" in text


def test_a_peer_without_softcap_is_skipped_with_the_reason():
    result = timing.run_case(Case("linear", "small-capped", 20, rounds=1, without=("torch.compile",)))
    assert result["skipped"]["F.linear_cross_entropy"] == "has no softcap"
    assert peers.OURS in result["peers"]


def test_the_gate_rejects_wrong_numbers():
    inputs = peers.make_inputs("linear", SMALL, 20, torch.float32)
    gate = timing.Gate(inputs)
    lse, target = peers.peers("linear")[peers.OURS].run(inputs)
    gate.check("ours", "stats", (lse, target))
    for wrong in ((lse + 1e-3, target), (lse, target.roll(1)), (lse * torch.nan, target)):
        with pytest.raises(AssertionError, match="broken is off by"):
            gate.check("broken", "stats", wrong)
    with pytest.raises(AssertionError):
        gate.check("broken", "nll", target - lse)


def test_every_round_times_every_peer_in_rotating_order():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    times = timing.interleave(calls, 3)
    assert [len(t) for t in times.values()] == [3, 3, 3]
    assert turns == list("abcbcacab")


def test_ratios_are_taken_within_rounds():
    """A machine that is slow in one round is slow for all peers, so the ratio does not change."""
    case = Case("linear", "small", 1)
    result = timing.summarise(case, {"base": [1.0, 10.0, 1.0], "ours": [0.5, 5.0, 0.5]}, {}, {})
    assert result["peers"]["ours"]["ratio"] == 0.5
    assert result["peers"]["ours"]["ratio_low"] == result["peers"]["ours"]["ratio_high"] == 0.5


def test_one_case_runs_in_a_separate_process(capsys):
    """Memory cases and cases with a limited ISA run in this way."""
    case = Case("logits", "llama3-8b", 4, rounds=1, without=("torch.compile", "log_softmax + gather"))
    weighed = memory.weigh(case, [peers.LOGSUMEXP, peers.OURS])
    assert all(0 <= mib < 64 for mib in weighed.values())
    one.main([json.dumps(asdict(case))])
    assert json.loads(capsys.readouterr().out)["name"] == case.name


def test_the_shapes_are_consistent():
    assert all(name == shape.name for name, shape in shapes.SHAPES.items())
    assert (shapes.HEADLINE.hidden, shapes.HEADLINE.vocab) == (1024, 151936)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is in the bench extra")
def test_the_figure_comes_from_the_record(monkeypatch, tmp_path):
    from bench import plot

    for name, subject, case_name in (("cpu-linear", "linear", plot.LINEAR), ("cpu-logits", "logits", plot.LOGITS)):
        result = timing.run_case(Case(subject, "small", 8, rounds=1, without=("torch.compile",)))
        for peer in result["peers"].values():
            peer["extra_mib"] = 1.0
        timing.write(name, timing.environment(), [result | {"name": case_name}])
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    plot.draw()
    drawn = (tmp_path / "cpu.svg").read_text()
    assert drawn.count(f"<!-- {peers.OURS} -->") >= 2 and "<!-- 1.00x -->" in drawn
