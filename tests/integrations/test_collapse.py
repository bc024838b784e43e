"""Statistics of a batch against numbers worked out by hand, and when a run counts as collapsed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from endoreward_fast import EndoRewardError
from endoreward_fast.integrations.collapse import Course, Limits, Sampled, digest, last_text, measure


def rows(*of):
    """Rows (prompt, answer, text, length, reward)."""
    return [Sampled(*row) for row in of]


def test_statistics_of_two_groups_are_those_worked_out_by_hand():
    found = measure(rows(
        (1, 10, 100, 2, 1.0), (1, 10, 101, 4, 3.0), (1, 10, 101, 6, 2.0), (1, 11, 102, 8, 6.0),
        (2, 10, 103, 5, 0.0), (2, 12, 104, 5, 4.0),
    ))  # fmt: skip
    assert found["majority"] == (3 / 4 + 1 / 2) / 2
    assert found["distinct"] == (3 / 4 + 2 / 2) / 2
    assert found["one_answer"] == 4 / 6  # answer 10, whatever the prompt
    assert found["no_answer"] == 0 and found["reward"] == 16 / 6
    # rewards less 3 and 2, lengths less 5 and 5: (-2, -3), (0, -1), (-1, 1), (3, 3), (-2, 0), (2, 0)
    assert found["length_correlation"] == pytest.approx((6 + 0 - 1 + 9) / math.sqrt(22 * 20))


def test_completions_without_an_answer_agree_with_no_other():
    found = measure(rows((1, None, 1, 1, 0.0), (1, None, 1, 1, 0.0), (1, None, 1, 1, 0.0)))
    assert found["majority"] == 0 and found["distinct"] == 1 / 3 and found["no_answer"] == 1
    some = measure(rows((1, None, 1, 1, 0.0), (1, None, 1, 1, 0.0), (1, 5, 2, 1, 0.0)))
    assert some["majority"] == 1 / 3


@pytest.mark.parametrize("reward", [None, math.nan, -math.inf])
def test_completions_without_a_reward_are_left_out_of_its_statistics(reward):
    scored = [(1, 1, 1, 2, 1.0), (1, 2, 2, 4, 3.0)]
    assert measure(rows(*scored, (1, 3, 3, 9, reward)))["reward"] == 2
    assert measure(rows(*scored, (1, 3, 3, 9, reward)))["length_correlation"] == pytest.approx(1)
    unscored = measure(rows(*[(1, n, n, n, reward) for n in range(3)]))
    assert "reward" not in unscored and "length_correlation" not in unscored and unscored["distinct"] == 1


def test_statistics_without_a_value_are_left_out():
    assert measure([]) == {}
    alone = measure(rows((1, 1, 1, 2, 1.0)))  # neither a group nor a second prompt
    assert set(alone) == {"no_answer", "reward"}
    alike = measure(rows((1, 1, 1, 2, 1.0), (1, 1, 1, 4, 1.0)))  # rewards do not vary
    assert "length_correlation" not in alike and alike["majority"] == 1
    rounded = measure(rows(*[(1, n, n, n, 0.1) for n in range(3)]))  # the mean of three 0.1 is 0.10000000000000002
    assert "length_correlation" not in rounded


def test_digests_tell_prompts_apart_and_are_alike_for_the_same_messages():
    chat = [{"role": "user", "content": "hi"}]
    assert digest(chat) == digest([{"content": "hi", "role": "user"}]) != digest("hi")
    assert digest("\ud800") != digest("a")  # half a surrogate pair, which models can spell
    assert last_text([*chat, {"role": "assistant", "content": "so"}]) == "so" == last_text("so")
    assert last_text([{"role": "assistant", "content": [{"type": "text", "text": "so"}]}]) == "so"
    assert last_text([{"role": "assistant", "tool_calls": []}]) == last_text([]) == ""
    assert last_text([{"role": "assistant", "content": "so"}, {"role": "tool", "content": "3"}]) == "so"
    assert last_text([{"role": "assistant", "content": ["so", {"type": "image", "text": None}]}]) == "so"


def test_equal_images_are_one_prompt():
    def prompt(value):
        return [{"role": "user", "content": [{"type": "image", "image": np.full((2, 2), value)}]}]

    class Image:
        """As PIL's: its repr contains its address."""

        def __init__(self, data):
            self.tobytes = data.encode

    assert digest(prompt(1)) == digest(prompt(1)) != digest(prompt(2))
    assert digest([Image("a")]) == digest([Image("a")]) != digest([Image("b")])


START = {"reward": 1.0, "entropy": 0.5, "majority": 0.5, "one_answer": 0.2, "accuracy": 0.6, "length": 100.0, "kl": 0.0}


def verdict(limits=None, **now):
    """Judge one log that differs from the start in `now`."""
    return Course(limits or Limits(), 1, START).update(START | now)


@pytest.mark.parametrize(
    "now, words",
    [
        ({"entropy": 0.049}, "entropy fell from 0.5 to 0.049"),
        ({"majority": 1.0}, "100% of a prompt's completions have the same answer, 50% at the start"),
        ({"one_answer": 0.9}, "90% of all completions, whatever the prompt,"),
        ({"accuracy": 0.29}, "accuracy fell from 0.6 to 0.29"),
    ],
    ids=["entropy", "majority", "one answer", "accuracy"],
)
def test_a_sign_counts_only_while_the_reward_is_held(now, words):
    found = verdict(**now)
    assert found.collapsed and len(found.reasons) == 1 and words in found.reasons[0]
    assert not verdict(**now, reward=0.99).reasons
    assert not verdict(Limits(entropy=None, majority=None, one_answer=None, accuracy=None), **now).reasons


def test_a_run_that_began_with_one_answer_has_not_collapsed_to_it():
    began = Course(Limits(), 1, START | {"majority": 1.0, "one_answer": 0.95})
    assert not began.update(START | {"majority": 1.0, "one_answer": 0.95}).collapsed


@pytest.mark.parametrize(
    "limits, inside, beyond, words",
    [
        ({"shorter": 0.5}, {"length": 50.0}, {"length": 49.0}, "shrank from 100.0 to 49.0"),
        ({"longer": 2.0}, {"length": 200.0}, {"length": 201.0}, "grew from 100.0 to 201.0"),
        ({"truncated": 0.5}, {"truncated": 0.49}, {"truncated": 0.5}, "50% of completions are cut"),
        ({"kl": 0.2}, {"kl": 0.2}, {"kl": 0.21}, "0.21 nats a token, above 0.2"),
    ],
    ids=["shorter", "longer", "truncated", "kl"],
)
def test_limits_are_off_unless_set_and_count_whatever_the_reward_does(limits, inside, beyond, words):
    limits, start = Limits(**limits), START | {"truncated": 0.0}
    found = [Course(limits, 1, start).update(start | now | {"reward": -9.0}) for now in (inside, beyond)]
    assert found[0].reasons == () and words in found[1].reasons[0] and not found[1].collapsed
    assert not Course(Limits(), 1, start).update(start | beyond).reasons


def test_start_and_course_are_running_means():
    course = Course(Limits(), window=2)
    assert not course.update({"reward": 0.0, "entropy": 2.0}).reasons and course.start == {}
    course.update({"reward": 2.0, "entropy": 4.0})
    assert course.start == {"reward": 1.0, "entropy": 3.0}
    assert not course.update({"reward": 3.0, "entropy": 0.1}).collapsed  # the mean of 4 and 0.1 is no collapse
    assert course.update({"reward": 3.0, "entropy": 0.1}).collapsed


def test_a_resumed_run_takes_the_first_ones_start():
    course = Course(Limits(), window=2, start=START)
    assert not course.update(START | {"entropy": 0.0}).collapsed  # one log is no mean of two
    assert course.update(START | {"entropy": 0.0}).collapsed and course.start == START


def test_logs_without_a_value_neither_count_nor_end_a_run():
    course = Course(Limits(), window=2)
    for reward, entropy in ((1.0, 1.0), (None, math.nan), (1.0, 1.0)):
        course.update({"reward": reward, "entropy": entropy})
    assert course.start == {"reward": 1.0, "entropy": 1.0}


@pytest.mark.parametrize(
    "name, value",
    [("entropy", 0), ("majority", 1.5), ("longer", 1), ("kl", math.inf), ("accuracy", "0.5"), ("kl", True)],
)
def test_a_limit_outside_of_its_range_is_refused(name, value):
    with pytest.raises(EndoRewardError, match=rf"Limits\({name}=.*expected a number"):
        Limits(**{name: value})


RESULTS = Path(__file__).parents[2] / "bench" / "results"


def seen(file, arm):
    """The step at which each recorded run first counts as collapsed, by seed. None: never."""
    found = []
    for run in json.loads((RESULTS / file).read_text())["results"]["runs"]:
        if run["arm"] == arm:
            curves = run["curves"] | ({"reward": run["curves"]["accuracy"]} if arm == "verifiable" else {})
            course, names = Course(Limits()), ("reward", "entropy", "accuracy")
            logs = (
                course.update(dict(zip(names, log, strict=True))) for log in zip(*map(curves.get, names), strict=True)
            )
            found.append(next((step for step, verdict in enumerate(logs, 1) if verdict.collapsed), None))
    return found


def test_recorded_runs_collapse_where_the_evidence_says():
    """docs/evidence.md has these steps."""
    assert seen("paper-rl-smollm2.json", "endogenous") == [15, 20, 17]
    assert seen("paper-rl-smollm2.json", "verifiable") == [13, 17, None]
    for file in ("paper-rl.json", "paper-rl-fresh-seeds.json", "paper-rl-320-questions.json"):
        assert seen(file, "endogenous") == seen(file, "verifiable") == [None] * 3
