"""Batches: every row once, within the budget, longest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endoreward_fast.batching import batches


@given(lengths=st.lists(st.integers(0, 200), max_size=60), budget=st.integers(1, 500))
def test_every_row_runs_once_within_the_budget(lengths, budget):
    found = list(batches(lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
    in_order = [lengths[i] for batch in found for i in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_batches_are_filled():
    assert list(batches([3, 9, 3, 3, 3], 9)) == [[1], [0, 2, 3], [4]]
    assert list(batches([5, 5, 5, 5], 10)) == [[0, 1], [2, 3]]
    assert list(batches([], 10)) == []


def test_a_row_over_the_budget_runs_alone():
    assert list(batches([100, 7, 8], 10)) == [[0], [2], [1]]


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_tokens=0"):
        list(batches([1], 0))
