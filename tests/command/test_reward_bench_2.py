"""RewardBench 2: best of four and the Ties score agree with numbers worked out by hand; the printed chance."""

import json
import math

import pytest

from endoreward_fast.command.evaluate.evaluation import Judged
from endoreward_fast.command.evaluate.report import FileResult, to_json, to_text
from endoreward_fast.command.evaluate.reward_bench_2 import SUBSETS, credit, reward_bench_2, ties_of


def judged(chosen, rejected, subset="Ties", id=1):
    return Judged("f", subset, None, id, tuple(map(float, chosen)), tuple(map(float, rejected)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "share"),
    [(3, (2, 1, 0), 1), (1, (2, 0, 0), 0), (2, (2, 1, 0), 1 / 2), (2, (2, 2, 2), 1 / 4)],
)
def test_k_completions_that_tie_for_the_highest_score_earn_1_over_k(chosen, rejected, share):
    assert credit(judged((chosen,), rejected)) == share


# N = 1: ref gap 5 - 1 = 4; tied right 6, 4, wrong 1: gap 3, spread 2.  3 > 2 and min(4, 3) = 3 > 2: both count; 3/2 - 1
# N = 2: ref gap 0.5;       tied right 9, 8, wrong 5: gap 3, spread 1.  3 > 1; min = 0.5 < 1: only the first;  0.5 - 1
# N = 3: ref gap -1;        tied right 2, 0, wrong 1: gap -1, spread 2. neither;                          -1 / 2 - 1
# N = 4: no ref;            tied right 1, 1, wrong 0: accurate, and in no pair
TIES = [
    judged((5,), (1, 0), id="ref:1"), judged((6, 4), (1, 0), id="tied:1"),
    judged((1,), (0.5,), id="ref:2"), judged((9, 8), (5,), id="tied:2"),
    judged((0,), (1,), id="ref:3"), judged((2, 0), (1,), id="tied:3"),
    judged((1, 1), (0,), id="tied:4"),
]  # fmt: skip


def test_the_ties_score_by_hand():
    found = ties_of(TIES)
    margin = (math.tanh(0.5) + math.tanh(-0.5) + math.tanh(-1.5)) / 3
    wanted = 0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margin
    assert found.score == pytest.approx(wanted) and found.score == pytest.approx(0.621983, abs=1e-6)
    assert (found.tied_accuracy, found.ref_accuracy, found.pairs, found.rows) == (3 / 4, pytest.approx(2 / 3), 3, 7)


@pytest.mark.parametrize(("wrong", "margin"), [(0, 1), (1, 0), (2, -1)])
def test_equal_scores_of_right_answers_do_not_divide_by_zero(wrong, margin):
    rows = [judged((1,), (wrong,), id="ref:1"), judged((1, 1), (wrong,), id="tied:1")]
    assert ties_of(rows).score == pytest.approx((1.0 if margin == 1 else 0.0) + 0.01 * margin)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([judged((1,), (0,), id=7)], 'ids must be "ref:N" or "tied:N", found 7'),
        ([judged((1,), (0,), id="ref:1"), judged((1, 1), (0,), id="tied:2")], "no N has both prompts"),
    ],
)
def test_the_report_says_why_ties_cannot_be_computed(rows, why):
    text = to_text([FileResult("f", len(rows), rows)])
    assert f"not computed: {why}" in text and "nan" not in text
    assert (
        json.loads(json.dumps(to_json([FileResult("f", len(rows), rows)], {})))["reward_bench_2"]["ties"]["score"]
        is None
    )


def test_the_benchmark_is_the_mean_of_its_six_subsets():
    rows = [judged((3,), (2, 1, 0), name) for name in SUBSETS] + [judged((0,), (1, 2, 3), "Math")] + TIES
    found = reward_bench_2(rows)
    assert found.absent == () and found.subsets["Math"].value == 0.5
    assert found.score == pytest.approx((4 + 0.5 + ties_of(TIES).score) / 6)
    assert reward_bench_2(rows[1:]).score is None and reward_bench_2(rows[1:]).absent == ("Factuality",)
    assert reward_bench_2([judged((1,), (0,), "hep-go"), judged((1,), (0,), "Math")]) is None


def test_the_printed_chance_is_that_of_the_data():
    fours = FileResult("fours.jsonl", 1, [judged((3,), (2, 1, 0), "Factuality")])
    pairs = FileResult("pairs.jsonl", 1, [judged((3,), (2,), "hep-go")])
    assert to_text([pairs]).endswith("Chance is 50%.\n")
    text = to_text([fours])
    assert "Chance is 50%" not in text
    lines = [line for line in text.splitlines() if "chance" in line]
    assert "accuracy of comparisons" in lines[0] and lines[0].endswith("chance 50.0%")
    assert all(line.endswith("chance 25.0%") for line in lines[1:]) and len(lines) == 4
    assert to_json([fours], {})["files"][0]["every_chosen_on_top"]["chance"] == 0.25
    assert judged((1, 2), (3, 4)).chance_on_top == 1 / 6
