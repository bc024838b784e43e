"""Batches: every row once, within the budget, longest first."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from endoreward_fast.scoring.batching import Budget, Room, batches, in_batches


def flat(tokens, fixed=1):
    return Budget(tokens, tokens, fixed)


SOME_LENGTHS = st.lists(st.integers(0, 200), max_size=60)


@given(lengths=SOME_LENGTHS, computed=st.integers(1, 500), fixed=st.integers(1, 100), data=st.data())
def test_every_row_runs_once_within_the_budget(lengths, computed, fixed, data):
    behind = data.draw(st.lists(st.integers(0, 100), min_size=len(lengths), max_size=len(lengths)))
    budget = Budget(2 * computed, computed, fixed)
    found = list(batches(lengths, budget, behind=behind))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(1, *(lengths[i] for i in batch))
        fits = len(batch) * longest <= computed
        assert len(batch) == 1 or (fits and len(batch) * (longest + max(behind[i] for i in batch)) <= budget.held)
    in_order = [lengths[i] for batch in found for i in batch]
    assert in_order == sorted(lengths, reverse=True)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), tokens=st.integers(1, 40), fixed=st.integers(1, 9))
def test_no_other_way_to_cut_rows_into_batches_costs_less(lengths, tokens, fixed):
    def cost(cut):
        return sum(len(batch) * batch[0] + fixed for batch in cut)

    rows = sorted(lengths, reverse=True)
    ways = []
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(rows)]
        way = [rows[a:b] for a, b in itertools.pairwise(places)]
        if all(len(batch) == 1 or len(batch) * batch[0] <= tokens for batch in way):
            ways.append(cost(way))
    found = [[lengths[i] for i in batch] for batch in batches(lengths, flat(tokens, fixed))]
    assert cost(found) == min(ways)


def test_a_pass_costs_as_much_as_some_padding():
    lengths = [100] * 4 + [90] * 4
    assert [len(batch) for batch in batches(lengths, flat(1000, fixed=30))] == [4, 4]
    assert [len(batch) for batch in batches(lengths, flat(1000, fixed=50))] == [8]


def test_batches_are_filled():
    assert list(batches([3, 9, 3, 3, 3], flat(9))) == [[1], [0, 2, 3], [4]]
    assert list(batches([5, 5, 5, 5], flat(10))) == [[0, 1], [2, 3]]
    assert list(batches([], flat(10))) == []


def test_a_row_over_the_budget_runs_alone():
    assert list(batches([100, 7, 8], flat(10))) == [[0], [2], [1]]


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="held=0"):
        list(batches([1], flat(0)))


def test_a_cpu_computes_less_at_a_time_than_it_holds_and_a_number_that_is_asked_for_is_both():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Budget.of(None, cpu)[:2] == (8192, 2048)
    assert Budget.of(None, gpu)[:2] == (8192, 8192)
    for device in (cpu, gpu):
        assert Budget.of(300, device)[:2] == (300, 300)


def test_a_large_window_is_cut_quickly():
    """Ten thousand short rows: one array operation a row, not one for each pair of rows."""
    found = list(batches([8] * 10_000, flat(8192, 32)))
    assert [len(batch) for batch in found[:9]] == [1024] * 9


class Memory:
    """A model with memory for so many tokens, including padding."""

    def __init__(self, room, lengths, error=torch.OutOfMemoryError):
        self.room, self.lengths, self.error = room, lengths, error
        self.failed = 0

    def run(self, places):
        if len(places) * max(self.lengths[i] for i in places) > self.room:
            self.failed += 1
            raise self.error("DefaultCPUAllocator: can't allocate memory")
        return [self.lengths[i] for i in places]


@given(lengths=st.lists(st.integers(1, 200), max_size=40), budget=st.integers(1, 2000), room=st.integers(1, 2000))
def test_batches_are_halved_when_memory_runs_out_and_no_row_is_lost(lengths, budget, room):
    memory = Memory(room, lengths)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = list(in_batches(memory.run, lengths, flat(budget), Room()))
    assert sorted(i for places, _ in found for i in places) == list(range(len(lengths)))
    for places, result in found:
        assert result == (None if lengths[places[0]] > room else [lengths[i] for i in places])
    too_long = sum(n > room for n in lengths)
    halvings = memory.failed - too_long
    assert halvings <= max(0, math.log2(max(1, budget / room))) + 1
    assert len(said) == min(1, halvings)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_memory_runs_out_in_three_ways(error):
    with pytest.warns(UserWarning, match="out of memory with max_tokens_per_batch=9: batches are halved"):
        found = list(in_batches(Memory(4, [3, 3, 3], error).run, [3, 3, 3], flat(9), Room()))
    assert [result for _, result in found] == [[3]] * 3


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_memory_may_run_out_outside_the_allocator(said):
    def run(places):
        if len(places) > 1:
            raise RuntimeError(said)
        return places

    with pytest.warns(UserWarning, match="out of memory"):
        assert [result for _, result in in_batches(run, [1, 1], flat(2), Room())] == [[0], [1]]


def test_the_allocators_cache_is_emptied_before_the_next_try(monkeypatch):
    """A smaller batch has other shapes, so it cannot use the blocks cached for the larger one."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))

    def run(places):
        done.append(len(places))
        if len(places) > 1:
            raise torch.OutOfMemoryError
        return places

    with pytest.warns(UserWarning, match="out of memory"):
        list(in_batches(run, [1, 1], flat(2), Room()))
    assert done == [2, "emptied", 1, 1]


def test_the_smaller_budget_is_kept_and_warned_about_once():
    """The command scores windows of rows, here of ten each. Only the first window runs out of memory."""
    room, memory = Room(), Memory(30, [10] * 10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(5):
            found = list(in_batches(memory.run, memory.lengths, flat(100), room))
            assert sorted(i for places, _ in found for i in places) == list(range(10))
    assert (memory.failed, len(said), room.tokens) == (2, 1, 25)
    assert [len(places) for places, _ in in_batches(memory.run, memory.lengths, flat(10), room)] == [
        1
    ] * 10  # asked for less


def test_any_other_error_is_not_swallowed():
    def fail(places):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches(fail, [1, 1], flat(8), Room()))
