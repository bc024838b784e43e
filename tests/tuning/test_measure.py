"""The check against float64, and the timing, of one candidate."""

from dataclasses import asdict, replace

import pytest
import torch

from endoreward_fast.kernels.config import INTERPRETER_CONFIG
from endoreward_fast.tuning import measure
from endoreward_fast.vocab import chunked, fused
from endoreward_fast.vocab.tuned import Choice, Head

ROWS = [3, 40]
CHUNKED = Choice("chunked")


def request(dtype="float32", choice=CHUNKED, seconds=0.0, vocab=333, **more):
    head = asdict(Head(dtype, 20, vocab))
    return {"head": head, "device": "cpu", "rows": ROWS, "choice": asdict(choice), "seconds": seconds, **more}


def of_kernel(dtype="float32", config=INTERPRETER_CONFIG):
    """A request that takes the interpreter a tenth of a second."""
    return request(dtype, Choice("fused", asdict(config)), vocab=70, rows=[3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_numbers_pass(dtype):
    found = measure.answer(request(dtype))
    assert "problem" not in found and set(found["errors"]) == {"lse", "target_logit", "entropy"}
    assert max(found["errors"].values()) < (0.1 if dtype == "bfloat16" else 1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_configs_of_the_kernel_are_checked_by_the_same_code():
    for config in (INTERPRETER_CONFIG, replace(INTERPRETER_CONFIG, persistent=2)):
        found = measure.answer(of_kernel(config=config))
        assert "problem" not in found and 0 < max(found["errors"].values()) < 1e-4


@pytest.mark.parametrize("row", [0, 2, 39])
@pytest.mark.parametrize("field", ["lse", "target_logit", "entropy"])
def test_one_wrong_number_excludes_a_candidate(monkeypatch, field, row):
    right = chunked.linear_forward

    def wrong(hidden, *args, **kwargs):
        stats, rewards = right(hidden, *args, **kwargs)
        if len(hidden) > row and getattr(stats, field) is not None:
            getattr(stats, field)[row] += 1e-3
        return stats, rewards

    monkeypatch.setattr(chunked, "linear_forward", wrong)
    problem = measure.answer(request(seconds=1.0))["problem"]
    assert problem.startswith(f"wrong numbers: {field} is off by 1.0e-03 (allowed ")


def changed(monkeypatch, module, change):
    """Let `change(stats, how often it was called)` change what the forward of a module returns."""
    right, calls = module.linear_forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        stats, rewards = right(*args, **kwargs)
        return change(stats, len(calls)), rewards

    monkeypatch.setattr(module, "linear_forward", forward)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_a_kernel_that_leaves_out_a_thousandth_is_wrong_in_bfloat16_too(monkeypatch):
    """Its logits are float32. The rounding of bfloat16 logits is no excuse."""
    assert "problem" not in measure.answer(of_kernel("bfloat16"))
    changed(monkeypatch, fused, lambda stats, i: stats._replace(lse=stats.lse - 1e-3))
    assert "lse is off by 1.0e-03 (allowed " in measure.answer(of_kernel("bfloat16"))["problem"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_a_kernel_that_gives_other_bits_in_a_second_run_is_wrong(monkeypatch):
    changed(monkeypatch, fused, lambda stats, i: stats._replace(lse=stats.lse + 1e-6 * (i % 2)))
    assert measure.answer(of_kernel())["problem"] == "wrong numbers: two runs of 3 rows differ"


def test_a_wrong_number_without_entropy_alone_is_found(monkeypatch):
    """The two forms of a kernel are two binaries."""
    changed(monkeypatch, chunked, lambda s, i: s if s.entropy is not None else s._replace(lse=s.lse + 1))
    assert "lse is off by 1.0e+00" in measure.answer(request())["problem"]


def test_nan_counts_as_wrong(monkeypatch):
    right = chunked.linear_forward

    def lost(*args, **kwargs):
        stats, rewards = right(*args, **kwargs)
        return stats._replace(lse=stats.lse * torch.nan), rewards

    monkeypatch.setattr(chunked, "linear_forward", lost)
    assert "lse is off by inf" in measure.answer(request())["problem"]


def test_an_exception_is_a_problem_of_one_line(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of shared memory\nin 400 lines")

    monkeypatch.setattr(chunked, "linear_forward", fails)
    assert measure.answer(request())["problem"] == "RuntimeError: out of shared memory"
    assert measure.answer(request(choice=Choice("chunked", {"magic": 1})))["problem"].startswith("TypeError: ")


def test_every_process_has_the_same_inputs_so_one_oracle_serves_all():
    first = measure.answer(request())
    again = measure.answer(request(oracle=first["oracle"]))
    assert again == first
    other = first["oracle"] | {"lse": [x + 1 for x in first["oracle"]["lse"]]}
    assert "wrong numbers: lse" in measure.answer(request(oracle=other))["problem"]


def test_checked_rows_hold_both_ends_of_every_batch():
    rows = measure.checked_rows([16, 128, 8192])
    assert {0, 15, 127, 8191} <= set(rows) and len(rows) <= 3 * measure.CHECKED
    assert measure.checked_rows([1]) == [0]


def test_candidate_and_matmul_are_timed_in_turn(monkeypatch):
    seen = []

    def stub(device):
        def once(call):
            call()
            seen.append(call)
            return float(len(seen))

        return once

    monkeypatch.setattr(measure, "clock", stub)
    times = measure.answer(request(seconds=1e-9))["times"]
    assert times == {
        "3": {"matmul": [1.0, 8.0, 9.0], "candidate": [2.0, 7.0, 10.0]},
        "40": {"matmul": [3.0, 6.0, 11.0], "candidate": [4.0, 5.0, 12.0]},
    }, "three rounds at least; every other round runs backwards"


def test_a_request_may_set_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert measure.answer(request())["threads"] == 2
        assert measure.answer(request(threads=None))["threads"] == 2
        assert measure.answer(request(threads=1))["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_times_are_of_this_process_on_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(measure.time, "process_time", iter([5.0, 7.5]).__next__)
    assert measure.clock(torch.device("cpu"))(lambda: None) == 2.5
