"""Accuracies agree with numbers worked out by hand."""

import json
import math

import pytest

from endoreward_fast.command.evaluate.evaluation import (
    Accuracy,
    Judged,
    block,
    matrix,
    mean_of,
    reward_bench,
    rm_bench,
    rm_bench_part,
    wilson,
)
from endoreward_fast.command.evaluate.report import FileResult, to_json, to_text


def judged(chosen, rejected, domain=None, subset=None, file="f"):
    return Judged(file, subset, domain, 1, tuple(map(float, chosen)), tuple(map(float, rejected)))


# Row 1: concise 3, detailed 2, markdown 1 against 2, 2, 0.     Row 2: 0, 5, 5 against 1, 1, 9.
#   wins  1 1 1      tie at (detailed, concise), (detailed, detailed)        0 0 0
#         0 0 1                                                              1 1 0
#         0 0 1                                                              1 1 0
ROWS = [judged((3, 2, 1), (2, 2, 0)), judged((0, 5, 5), (1, 1, 9))]


def test_the_matrix_by_hand():
    assert matrix(ROWS) == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    assert matrix(ROWS[:1]) == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert [row.ties for row in ROWS] == [2, 0]


def test_above_the_diagonal_is_hard_and_below_is_easy():
    b = block(ROWS[:1])
    assert (b.hard.value, b.normal.value, b.easy.value) == (1.0, pytest.approx(2 / 3), 0.0)
    assert b.average.value == pytest.approx((1 + 2 / 3 + 0) / 3)
    b = block(ROWS[1:])
    assert (b.hard.value, b.normal.value, b.easy.value) == (0.0, pytest.approx(1 / 3), 1.0)


def test_a_tie_is_lost():
    b = block([judged((1, 1, 1), (1, 1, 1))])
    assert b.average.value == 0.0
    assert reward_bench([judged((1,), (1,), subset="hep-go")])["overall"].value == 0.0


def test_overall_is_the_mean_of_domains_and_safety_pools_its_rows():
    best, worst = judged((1, 1, 1), (0, 0, 0)), judged((0, 0, 0), (1, 1, 1))

    def of(row, domain):
        return Judged(row.file, row.subset, domain, row.id, row.chosen, row.rejected)

    rows = [of(best, "chat")] * 5 + [of(worst, "code")] + [of(best, "safety-refuse")] * 3
    rows += [of(worst, "safety-response")]
    bench = rm_bench(rows)
    averages = {name: b.average.value for name, b in bench.domains.items()}
    assert averages == {"chat": 1.0, "code": 0.0, "safety": 0.75}
    assert {name: b.average.value for name, b in bench.parts.items()} == {"safety-refuse": 1, "safety-response": 0}
    assert bench.overall["average"].value == pytest.approx((1 + 0 + 0.75) / 3)
    assert bench.overall["hard"].value == pytest.approx((1 + 0 + 0.75) / 3)
    assert bench.absent == ["math"]


def test_rows_of_other_shapes_or_domains_are_not_rm_bench():
    assert rm_bench([judged((1, 1), (0, 0), "chat"), judged((1, 1, 1), (0, 0, 0))]) is None


@pytest.mark.parametrize(
    ("row", "file", "part"),
    [
        ({}, "/x/chat_filtered.json", "chat"),
        ({}, "safety-refuse_filtered.json", "safety-refuse"),
        ({}, "safety-response.jsonl.gz", "safety-response"),
        ({"domain": "math"}, "total_dataset.json", "math"),
        ({"id": "code/12"}, "total_dataset.json", "code"),
        ({"id": 12, "domain": "safety-refuse"}, "chat.json", "safety-refuse"),
        ({"id": 12}, "mine.json", None),
    ],
)
def test_the_domain_comes_from_the_row_then_its_id_then_the_files_name(row, file, part):
    assert rm_bench_part(row, file) == part


def test_reward_bench_sections_weigh_prompts_and_raise_math():
    win, lose = ((1,), (0,)), ((0,), (1,))
    rows = [judged(*win, subset="alpacaeval-easy")] * 3 + [judged(*lose, subset="mt-bench-easy")]
    rows += [judged(*win, subset="math-prm")] * 447 + [judged(*lose, subset="hep-go")] * 984
    found = reward_bench([*rows, judged(*win, subset="elsewhere")])
    assert set(found) == {"Chat", "Reasoning", "overall"}
    assert found["Chat"].value == 0.75
    assert found["Reasoning"].value == pytest.approx(0.5)
    assert found["overall"].value == pytest.approx(0.625)
    assert found["Chat"].rows == 4
    assert reward_bench([judged(*win, subset="elsewhere")]) is None


def test_wilson_against_published_values():
    # Wilson 95% for 8 of 10 and 0 of 10 (Brown, Cai and DasGupta 2001 give the formula; values from it by hand).
    assert wilson(0.8, 10).low == pytest.approx(0.4902, abs=1e-4)
    assert wilson(0.8, 10).high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0.0, 10).low == 0.0
    assert wilson(0.0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert math.isnan(wilson(math.nan, 0).value)


def test_the_mean_of_one_is_itself_and_of_two_is_narrower():
    one = wilson(0.6, 50)
    assert mean_of([one]).low == pytest.approx(one.low)
    two = mean_of([one, one])
    assert two.value == pytest.approx(one.value)
    assert one.low < two.low < one.value < two.high < one.high
    assert mean_of([Accuracy(1, 1, 1, 1), Accuracy(0, 0, 0, 1)], [3, 1]).value == 0.75


def test_report_counts_what_was_skipped_and_tied():
    file = FileResult("chat.json", rows=3, judged=[*ROWS], errors=["row 3: too long"])
    found = json.loads(json.dumps(to_json([file], {"version": "0"})))
    assert {k: found["files"][0][k] for k in ("rows", "scored", "skipped", "comparisons", "ties")} == {
        "rows": 3,
        "scored": 2,
        "skipped": 1,
        "comparisons": 18,
        "ties": 2,
    }
    assert found["files"][0]["rm_bench"]["matrix"] == matrix(ROWS)
    assert found["files"][0]["errors"] == ["row 3: too long"]
    assert found["scores"][0]["chosen"] == [3, 2, 1]
    text = to_text([file])
    assert "2 rows scored, 1 skipped, 18 comparisons, 2 ties" in text
    assert text.count("50.0") >= 9


def test_report_on_pairs_lists_and_nothing():
    pairs = FileResult("pairs.jsonl", 2, [judged((1,), (0,), subset="a"), judged((0,), (0,), subset="b")])
    lists = FileResult("lists.jsonl", 1, [judged((1,), (0, 2, 0))])
    nothing = FileResult("nothing.jsonl", 1, [], ["row 1: too long"])
    text = to_text([pairs, lists, nothing])
    assert "chosen / rejected" not in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("    ")}
    assert "100.0%" in lines["a"] and "  0.0%" in lines["b"]
    assert "66.7%" in text
    assert "every chosen on top" in text
    found = to_json([pairs, lists, nothing], {})
    assert found["files"][0]["subsets"]["b"]["accuracy"] == 0
    assert "accuracy" not in found["files"][2]
    assert found["rm_bench"] is None
