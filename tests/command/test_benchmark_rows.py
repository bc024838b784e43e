"""Rows of benchmarks are recognised by their columns, and bad ones are refused in one line."""

import copy
import json

import pytest

from endoreward_fast.data.benchmarks import plan_eval, plan_plot
from endoreward_fast.data.columns import MissingColumns
from endoreward_fast.errors import EndoRewardError

JUDGE = {
    "pair_id": "x1", "original_id": "7", "source": "mmlu-pro-law", "question": "q", "response_model": "m",
    "response_A": "first", "response_B": "second", "label": "B>A",
}  # fmt: skip
GAP = {
    "id": "chat-1", "domain": "Chat", "source": "s", "style_assignments": {},
    "responses": [{"key": f"response{n}", "text": f"text {n}"} for n in (2, 1, 4, 3)],
    "prompt_groups": [
        {"group": g, "winner": f"response{g}", "prompts": [{"role": "base", "text": f"{g}.{p}"} for p in (1, 2, 3)]}
        for g in (1, 2, 3, 4)
    ],
}  # fmt: skip
STEPS = {
    "id": "gsm8k-3", "generator": "g", "problem": "p", "steps": ["one", "two", "three"],
    "final_answer_correct": False, "label": 1,
}  # fmt: skip
FOUR = {
    "id": "9", "prompt": "p", "chosen": ["right"], "rejected": ["a", "b", "c"], "num_correct": 1, "num_incorrect": 3,
    "total_completions": 4, "models": ["m"], "subset": "Math",
}  # fmt: skip
STYLES = {"id": 1, "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
PAIR = {"prompt": "p", "chosen": "a", "chosen_model": "m", "rejected": "b", "rejected_model": "n", "subset": "hep-go"}


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def test_a_row_of_judgebench_is_a_pair_whose_order_the_label_gives():
    task = plan_eval(JUDGE)
    assert [sample["completion"] for sample in task.samples] == ["second", "first"]
    assert {sample["prompt"] for sample in task.samples} == {"q"} and task.layout == {"chosen": 0, "rejected": 1}
    assert task.benchmark == "JudgeBench"
    assert task.facts == {"subset": "mmlu-pro-law", "id": "x1", "place": 1}
    other = plan_eval(JUDGE | {"label": "A>B"})
    assert other.samples[0]["completion"] == "first" and other.facts["place"] == 0


def test_a_row_of_rmgap_is_twelve_prompts_with_four_responses():
    task = plan_eval(GAP)
    assert task.benchmark == "RMGAP" and len(task.samples) == 48 and len(task.layout) == 12
    for n, (prompt, layout) in enumerate(zip(task.facts["prompts"], task.layout, strict=True)):
        group, variant = n // 3 + 1, n % 3 + 1
        assert (prompt["group"], prompt["prompt"]) == (group, variant)
        four = task.samples[4 * n : 4 * n + 4]
        assert [sample["completion"] for sample in four] == ["text 1", "text 2", "text 3", "text 4"]
        assert {sample["prompt"] for sample in four} == {f"{group}.{variant}"}
        assert layout["chosen"] == 4 * n + group - 1 and prompt["place"] == group - 1
        assert sorted([layout["chosen"], *layout["rejected"]]) == list(range(4 * n, 4 * n + 4))
    assert len({sample["group"] for sample in task.samples}) == 12, "a judge compares the responses to one prompt"


def test_a_row_of_processbench_is_one_completion_of_all_steps():
    task = plan_eval(STEPS)
    assert task.samples == ({"prompt": "p", "completion": "one\n\ntwo\n\nthree"},) and task.layout == 0
    assert task.benchmark == "ProcessBench"
    assert task.facts == {"label": 1, "steps": ["one", "two", "three"], "id": "gsm8k-3"}
    assert [plan_eval(STEPS | {"label": label}).facts["label"] for label in (-1, 2, "2", 1.0, "1.0")] == [
        -1,
        2,
        2,
        1,
        1,
    ]


@pytest.mark.parametrize("write", [json.dumps, str])
@pytest.mark.parametrize("row", [FOUR, GAP, STEPS, STYLES | {"id": "chat/1"}, STYLES | {"domain": "math"}])
def test_lists_that_a_csv_file_holds_as_text_are_read(row, write):
    lists = {name: write(row[name]) for name in ("chosen", "rejected", "steps", "prompt_groups") if name in row}
    assert plan_eval(row | lists) == plan_eval(row) and plan_plot(row | lists).samples == plan_plot(row).samples
    assert plan_eval(PAIR | {"chosen": "[1]", "rejected": "[2]"}).samples[0]["completion"] == "[1]"
    for other in ({}, {"domain": "math", "chosen": "['a', 'b']"}, {"domain": "math", "chosen": "['a', 'b', 3]"}):
        assert plan_eval({"prompt": "p", "chosen": "['a', 'b', 'c']", "rejected": "[x]"} | other).layout["chosen"] == 0
    assert plan_eval(PAIR | {"chosen": "[1]", "num_correct": 1}).samples[0]["completion"] == "[1]"


@pytest.mark.parametrize("row", [JUDGE, GAP, STEPS])
def test_columns_of_the_template_and_of_signals_count_in_rows_of_benchmarks(row):
    task = plan_eval(row | {"chat_template_kwargs": {"thinking": True}, "reference_answer": 4})
    assert all(sample["chat_template_kwargs"] == {"thinking": True} for sample in task.samples)
    answers = {sample.get("reference_answer") for sample in task.samples}
    assert answers == ({None} if row is STEPS else {"4"}), "the signals of a solution are not computed"


def test_rewardbench_2_is_recognised_by_num_correct_and_preferences_stay_what_they_are():
    assert plan_eval(FOUR).benchmark == "RewardBench 2"
    assert plan_eval(FOUR | {"num_correct": "1", "num_incorrect": 3.0, "total_completions": None}).benchmark
    for row in (STYLES, PAIR, without(FOUR, "num_correct"), PAIR | {"steps": ["a"]}, PAIR | {"num_correct": 7}):
        assert plan_eval(row).benchmark is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (without(JUDGE, "response_B"), "taken for JudgeBench because of its column response_A, but it has no column "
         "response_B: JudgeBench needs question, response_A, response_B, label"),
        (without(JUDGE, "question", "label"), "JudgeBench .* it has no columns question, label:"),
        (without(GAP, "domain"), "taken for RMGAP because of its column prompt_groups, but it has no column domain:"),
        (without(STEPS, "label"), "taken for ProcessBench because of its column steps, but it has no column label:"),
        (without(FOUR, "rejected"), "taken for RewardBench 2 because of its column num_correct, .* no column rejected"),
        (without(FOUR, "prompt"), "taken for RewardBench 2 .* no column prompt:"),
        (without(STYLES, "rejected"), "RM-Bench because of its column chosen with 3 compl.* no column rejected"),
        (without(STYLES, "prompt"), "taken for RM-Bench .* no column prompt"),
        (without(PAIR, "chosen"), "taken for RewardBench because of its column chosen_model, .* no column chosen:"),
        ({"steps": ["a"], "label": 0, "response_A": "a", "response_B": "b"},
         "taken for JudgeBench .* no column question: .*; or taken for ProcessBench .* no column problem"),
        ({"text": "t"}, "columns wanted: prompt, chosen and rejected; found: text"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_the_benchmark(row, said):
    with pytest.raises(MissingColumns, match=said) as caught:
        plan_eval(row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (JUDGE | STEPS, "the columns fit JudgeBench and ProcessBench: remove those of one of them"),
        (JUDGE | {"chosen": "a", "rejected": "b"}, "the columns fit JudgeBench and a preference"),
        (JUDGE | {"label": "A=B"}, "taken for JudgeBench: label: wanted \"A>B\" or \"B>A\", found 'A=B'"),
        (JUDGE | {"label": "A" * 999}, "JudgeBench: label: .* found 'A{39}\\.\\.\\.$"),
        (GAP | {"domain": ["A" * 999]}, "RMGAP: domain: .* found \\['A{38}\\.\\.\\.$"),
        (STEPS | {"label": 10**99}, "ProcessBench: label: .* found 10{39}\\.\\.\\.$"),
        (JUDGE | {"label": None}, "JudgeBench: label: .* found null"),
        (JUDGE | {"response_A": None}, "JudgeBench: response_A: wanted text, found null"),
        (JUDGE | {"question": [{"role": "user", "content": "q"}]}, "question: wanted text, found an array"),
        (FOUR | {"num_correct": 2}, "taken for RewardBench 2: num_correct is 2, but chosen has 1"),
        (FOUR | {"num_incorrect": 4}, "RewardBench 2: num_incorrect is 4, but rejected has 3"),
        (FOUR | {"total_completions": 5}, "RewardBench 2: total_completions is 5, but chosen and rejected have 4"),
        (FOUR | {"num_correct": "one"}, "RewardBench 2: num_correct is a string, but chosen has 1"),
        (FOUR | {"chosen": "['a' 'b']", "rejected": "['c']"}, "RewardBench 2: chosen looks like a list, but is"),
        (FOUR | {"num_correct": None}, "RewardBench 2: num_correct is null, but chosen has 1"),
        (STEPS | {"label": 3}, r"ProcessBench: label: wanted -1 \(no wrong step\) or 0 to 2 \(steps\), found 3"),
        (STEPS | {"label": -2}, "ProcessBench: label: .* found -2"),
        (STEPS | {"label": "A>B"}, "ProcessBench: label: .* found a string"),
        (STEPS | {"label": float("nan")}, "ProcessBench: label: .* found nan"),
        (STEPS | {"steps": []}, "ProcessBench: steps: wanted an array of texts, found an empty array"),
        (STEPS | {"steps": "one two"}, "ProcessBench: steps: wanted an array of texts, found a string"),
        (STEPS | {"steps": ["one", " \n", "three"]}, r"steps\[1\] is empty: a step without a token has no reward"),
        (STEPS | {"steps": ["one", None]}, r"steps\[1\]: wanted text, found null"),
        (GAP | {"domain": "Chatting"}, "RMGAP: domain: wanted one of Chat, Writing, Reasoning, Safety, found 'Chat"),
        (GAP | {"responses": GAP["responses"][:3]}, "RMGAP: responses: wanted 4 entries, found 3"),
        (GAP | {"responses": "four"}, "RMGAP: responses: wanted an array of 4 objects, found a string"),
        (GAP | {"responses": [*GAP["responses"][:3], GAP["responses"][0]]}, r"responses\[3\].key: 'response2' occurs"),
        (GAP | {"responses": [*GAP["responses"][:3], {"key": "response3"}]}, r"responses\[3\] has no text"),
        (GAP | {"prompt_groups": [*GAP["prompt_groups"][:3], 4]}, r"prompt_groups\[3\]: wanted an object, found a num"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_the_benchmark(row, said):
    with pytest.raises(EndoRewardError, match=said) as caught:
        plan_eval(row)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, MissingColumns)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda group: group.update(winner="response9"),
            r"prompt_groups\[1\].winner: 'response9' is no key of respons",
        ),
        (lambda group: group.update(prompts=[]), r"prompt_groups\[1\].prompts: wanted 3 entries, found 0"),
        (lambda group: group.update(group=1), r"prompt_groups\[1\].group: 1 occurs twice"),
        (lambda group: group["prompts"][2].update(text=5.5j), r"prompt_groups\[1\].prompts\[2\].text: wanted text"),
    ],
)
def test_a_wrong_prompt_group_is_named_by_its_place(change, said):
    row = copy.deepcopy(GAP)
    change(row["prompt_groups"][1])
    with pytest.raises(EndoRewardError, match=said):
        plan_eval(row)


def test_plot_reads_rows_of_benchmarks_and_what_score_reads():
    assert plan_plot(JUDGE) == plan_eval(JUDGE) and plan_plot(GAP).benchmark == "RMGAP"
    assert plan_plot({"prompt": "p", "completion": "c", "steps": ["c"]}).benchmark is None
    with pytest.raises(MissingColumns, match="columns wanted: prompt and completion"):
        plan_plot({"text": "t"})
    with pytest.raises(MissingColumns, match="taken for JudgeBench"):
        plan_plot(without(JUDGE, "label"))
