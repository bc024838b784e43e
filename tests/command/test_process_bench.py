"""ProcessBench: tokens are assigned to steps, thresholds are the best ones, and the command prints chance levels."""

import json
import random
from dataclasses import replace

import pytest

from cli_harness import LengthScorer, Score, put, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.evaluate.process_bench import (
    METHODS,
    Solution,
    best_threshold,
    chance_of_f1,
    predicted,
    process_bench,
    subset_of,
)
from endoreward_fast.command.evaluate.steps import step_scores, steps_of_tokens
from endoreward_fast.command.run import pipeline
from endoreward_fast.errors import EndoRewardError
from endoreward_fast.scoring.results import TokenTable

REWARD = "reward, mean"

# ------------------------------------------------------------------------------------------------- tokens to steps


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a", " b", "\n\n", "c", " d", "<end>"], [0, 0, 0, 1, 1, None]),
        (["a b", "\n", "\n", "c", " d"], [0, 0, 0, 1, 1]),
        (["a", " b\n\n", "c d", "\n", "<end>", "\n"], [0, 0, 1, 1, None, None]),  # white space after the end
        (["a b", "\n\nc", " d"], [0, 1, 1]),  # the tokenizer joins the break with the next step
        (["a b\n\nc", " d"], [0, 1]),  # and here with both steps: the first letter decides
        (["<think>", "\n\n", "</think>", "\n\n", "a", " b", "\n\n", "c d", "<end>"], [None] * 4 + [0, 0, 0, 1, None]),
        ([" ", "a b", "", "\n\nc", " d", ""], [0, 0, 1, 1, 1, None]),  # "": a part of the next character
    ],
)
def test_a_token_belongs_to_the_step_of_its_first_letter(texts, wanted):
    assert steps_of_tokens(texts, ["a b", "c d"]) == wanted


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a b", "\n\n", "c"], "do not spell the steps: the completion was cut"),
        (["A b", "\n\n", "c d"], "do not spell the steps"),
        (["a b\n\nc d"], r"no token begins in steps\[1\]"),
    ],
)
def test_steps_that_the_tokens_do_not_spell_have_no_score(texts, said):
    with pytest.raises(EndoRewardError, match=said):
        steps_of_tokens(texts, ["a b", "c d"])


def test_rewards_of_a_step_are_reduced_by_mean_sum_and_min():
    texts, zeros = ("a", " b", "\n\n", "c d", "<end>"), (0.0,) * 5
    table = TokenTable((1,) * 5, texts, (1.0, 2.0, 6.0, -4.0, 100.0), (-1.0, -2.0, -3.0, -7.0, -50.0), zeros)
    scores, tokens = step_scores(table, ["a b", "c d"])
    assert tokens == (3, 1) and tuple(scores) == METHODS
    assert [scores[f"reward, {name}"] for name in ("mean", "sum", "min")] == [(3, -4), (9, -4), (1, -4)]
    assert [scores[f"logprob, {name}"] for name in ("mean", "sum", "min")] == [(-2, -7), (-6, -7), (-3, -7)]


def test_steps_of_a_real_model_and_tokenizer_have_all_tokens_but_the_end():
    steps = ["First, 3 + 4 = 7.", "Then 7 x 2 = 14, naïve but right.", "So the answer is 14."]
    row = {"prompt": "What is (3 + 4) x 2?", "completion": "\n\n".join(steps)}
    [score] = EndoRewardModel.from_pretrained("pocket").score([row], per_token=True)
    owner = steps_of_tokens(score.tokens.texts, steps)
    for n, step in enumerate(steps):
        texts = (text for text, of in zip(score.tokens.texts, owner, strict=True) if of == n)
        assert "".join(texts).strip() == step
    assert [text for text, of in zip(score.tokens.texts, owner, strict=True) if of is None] == [score.tokens.texts[-1]]
    scores, tokens = step_scores(score.tokens, steps)
    assert sum(tokens) == score.num_tokens - 1
    assert sum(scores["reward, sum"]) == pytest.approx(score.score - score.tokens.rewards[-1], abs=1e-4)
    assert sum(scores["logprob, sum"]) == pytest.approx(score.logprob - score.tokens.logprobs[-1], abs=1e-4)


# -------------------------------------------------------------------------------------------------------------- rule


def solution(label, scores, subset="math", tokens=None, id=1):
    scores = tuple(map(float, scores))
    return Solution("f", subset, id, label, dict.fromkeys(METHODS, scores), tokens or (1,) * len(scores))


def figures(solutions, subset="math"):
    return process_bench(solutions).subsets[subset].methods[REWARD]


def f1_by_hand(solutions, threshold):
    """The benchmark's formula, on predictions step by step."""
    hits = {True: [], False: []}
    for one in solutions:
        first = -1
        for n, score in reversed(list(enumerate(one.scores[REWARD]))):
            first = n if score < threshold else first
        hits[one.label == -1].append(first == one.label)
    right, wrong = (100 * sum(hits[kind]) / len(hits[kind]) for kind in (True, False))
    return 2 * wrong * right / (wrong + right) / 100 if wrong + right else 0.0


def drawn(rng, count, subset="gsm8k", lowest=0):
    for n in range(count):
        steps = rng.randint(1, 5)
        label = rng.choice([-1, rng.randrange(steps)]) if n > 3 else (-1, 0)[n % 2]
        yield solution(label, [rng.choice([lowest, 1, 2, 3, 4, 5]) for _ in range(steps)], subset)


@pytest.mark.parametrize("lowest", [0, float("-inf")])
@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all(seed, lowest):
    rng = random.Random(seed)
    solutions = list(drawn(rng, rng.randint(4, 12), lowest=lowest))
    everywhere = [f1_by_hand(solutions, n - 0.5) for n in range(8)]
    assert f1_by_hand(solutions, best_threshold(solutions, REWARD)) == pytest.approx(max(everywhere))
    assert figures(solutions, "gsm8k").f1_gsm8k == pytest.approx(max(everywhere))


def test_the_first_step_below_the_threshold_is_predicted():
    assert [predicted((3.0, 1.0, 0.0), t) for t in (0.0, 0.5, 1.5, 9.0)] == [-1, 2, 1, 0]


def test_f1_is_cross_fitted_and_the_paper_s_threshold_comes_from_gsm8k():
    # Halves are 0 with 1 and 2 with 3 of each kind, in turns. Best on the one half: below 1 is wrong. On the other: 5.
    low = [solution(1, (2, 0)), solution(-1, (2, 2))]
    high = [solution(1, (8, 4)), solution(-1, (8, 6))]
    mixed = [low[0], high[0], low[1], high[1]]
    found = figures(mixed)
    # The threshold of `low` (1) finds no wrong step in `high`. That of `high` (5) calls the first step of `low` wrong.
    assert (found.wrong.value, found.right.value, found.f1) == (0.0, 0.5, 0.0)
    assert found.f1_gsm8k is None
    alike = figures(low + low)
    assert (alike.wrong.value, alike.right.value, alike.f1) == (1.0, 1.0, 1.0)
    gsm8k = [replace(one, subset="gsm8k") for one in low]
    both = process_bench([*gsm8k, *low, *high])
    assert both.subsets["gsm8k"].methods[REWARD].f1_gsm8k == 1.0
    assert both.subsets["math"].methods[REWARD].f1_gsm8k == pytest.approx(f1_by_hand(low + high, 1)) == 2 / 3
    assert both.mean[REWARD] == {"f1": None, "f1_gsm8k": pytest.approx(5 / 6)}  # gsm8k has too few for two halves
    assert both.absent == ["olympiadbench", "omnimath"]


def test_figures_without_a_threshold_by_hand():
    solutions = [
        solution(1, (3, 1, 2), tokens=(10, 11, 99)),  # lowest; below the earlier step, which is of similar length
        solution(2, (1, 5, 1), tokens=(10, 99, 11)),  # one of two lowest; ties with one, below the other
        solution(0, (4, 3), tokens=(10, 10)),  # not the lowest; no earlier step
        solution(-1, (0, 0)),
    ]
    found = figures(solutions)
    assert found.lowest.value == pytest.approx((1 + 0.5 + 0) / 3) and found.lowest.rows == 3
    assert found.earlier.value == pytest.approx((1 + 0.5) / 2) and found.earlier.rows == 2
    assert found.earlier.similar.accuracy.value == 0.5 and found.earlier.similar.pairs == 2  # the tie is lost
    chance = process_bench(solutions).subsets["math"].chance
    assert chance["lowest"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3) and chance["earlier"] == 0.5


def test_the_chance_of_f1_is_that_of_scores_without_information():
    rng = random.Random(0)
    shapes = [(rng.choice([-1, rng.randrange(4)]), 4) for _ in range(4000)]
    random_scores = [solution(label, [rng.random() for _ in range(steps)]) for label, steps in shapes]
    chance = chance_of_f1(random_scores)
    assert figures(random_scores).f1 == pytest.approx(chance, abs=0.03)
    # By hand: one wrong first step and one right solution of one step: p and 1 - p, best at 1/2.
    assert chance_of_f1([solution(0, (1,)), solution(-1, (1,))]) == pytest.approx(0.5)
    assert chance_of_f1([solution(0, (1,))]) is None


@pytest.mark.parametrize(
    "solutions",
    [[solution(-1, (1, 2))], [solution(0, (1, 2))], [solution(1, (1, 2)), solution(-1, (1, 2))], []],
    ids=["only right", "only wrong", "one of each", "none"],
)
def test_too_few_solutions_have_no_figure_and_no_error(solutions):
    found = process_bench(solutions)
    assert found is None or found.subsets["math"].methods[REWARD].f1 is None
    assert json.dumps(found.to_json() if found else None, allow_nan=False)


@pytest.mark.parametrize(
    ("id", "file", "subset"),
    [("gsm8k-0", "f", "gsm8k"), (None, "/x/omnimath.jsonl", "omnimath"), (7, "f", "all"), ("math-1", "f", "math")],
)
def test_the_subset_comes_from_the_id_then_from_the_file(id, file, subset):
    assert subset_of(id, file) == subset


# ------------------------------------------------------------------------------------------------------- the command


class StepScorer(LengthScorer):
    """Every character is a token. "!" has the reward -5, others -1; "§" is left out of the tokens, as if rewritten."""

    def iter_scores(self, rows, *, on_tokens=None, per_token=False, **options):
        for i, row in enumerate(rows):
            texts = (*row["completion"].replace("§", ""), "<end>")
            rewards = tuple(-5.0 if text == "!" else -1.0 for text in texts)
            table = TokenTable((1,) * len(texts), texts, rewards, rewards, rewards) if per_token else None
            yield i, Score(sum(rewards), tokens=table, num_tokens=len(texts))


@pytest.fixture
def steps_scorer(monkeypatch):
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: StepScorer())


def row(n, label, subset="gsm8k", **change):
    steps = [f"step {i}{'!' if i == label else '.'}" for i in range(3)]
    return {"id": f"{subset}-{n}", "problem": "p", "steps": steps, "label": label, **change}


ROWS = [row(n, (-1, 1, -1, 2)[n % 4]) for n in range(8)]


def test_the_command_finds_the_first_wrong_step(steps_scorer, tmp_path):
    path = put(tmp_path, *ROWS, row(9, 1, steps=["one", "tw§o"]), row(9, 7), {"steps": []})
    result = run("eval", path, "--json", code=2)
    found = json.loads(result.stdout)
    [file] = found["files"]
    assert (file["rows"], file["scored"], file["skipped"], file["comparisons"]) == (11, 8, 3, 0)
    assert [error.split(": ", 1)[0] for error in file["errors"]] == ["line 9", "line 10", "line 11"]
    assert "line 9: the scored tokens do not spell the steps" in result.stderr and "accuracy" not in file
    subset = found["process_bench"]["subsets"]["gsm8k"]
    assert (subset["solutions_with_a_wrong_step"], subset["solutions_without"]) == (4, 4)
    figures = subset["methods"][REWARD]
    assert (figures["f1"], figures["f1_gsm8k"], figures["lowest"]["accuracy"]) == (1.0, 1.0, 1.0)
    assert figures["earlier"]["similar_length"]["accuracy"] == 1.0 and subset["chance"]["lowest"] == 1 / 3
    assert len(found["step_scores"]) == 8 and found["step_scores"][1]["scores"]["reward, min"] == [-1, -5, -1]
    assert found["step_scores"][1]["label"] == 1 and found["scores"] == []


def test_tables_of_processbench_print_chance_and_stand_beside_others(steps_scorer, tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "bb"}
    alone = put(tmp_path, *ROWS, *(row(n, (-1, 0)[n % 2], "math") for n in range(4)))
    mixed = put(tmp_path, *ROWS[:2], pair, name="mixed.jsonl")
    text = run("eval", alone, "--signals", "entropy", "-q").stdout
    of_gsm8k, of_math = ([line.split()[2:] for line in text.splitlines() if "reward, min" in line])[:2]
    assert of_gsm8k == ["100.0"] * 7 + ["2"] and of_math == ["100.0"] * 5 + ["-", "-", "0"]
    assert text.count("    chance  ") == 2 and "Chance is 50%" not in text
    assert "no other methods: ProcessBench needs a score for each step" in text
    assert "not in these files: olympiadbench, omnimath" in text
    text = run("eval", alone, mixed, "-q").stdout
    assert "3 rows scored, 0 skipped, 1 comparisons" in text and "mean of subsets" in text
    assert max(map(len, text.splitlines())) <= 120 and "nan" not in text


def test_strict_stops_at_tokens_that_do_not_spell_the_steps(steps_scorer, tmp_path):
    bad = row(9, 1, steps=["one", "tw§o"])
    path = put(tmp_path, ROWS[0], bad, bad, ROWS[1], bad)
    result = run("eval", path, "--json", "--strict", code=2)
    assert "line 2: the scored tokens do not spell the steps" in result.stderr.splitlines()[-1]
    assert "(--strict: stopped here)" in result.stderr.splitlines()[-1]


def test_rivals_do_not_read_solutions(steps_scorer, tmp_path, monkeypatch):
    read = []

    class Judge(LengthScorer):
        def iter_scores(self, rows, **options):
            read.extend(rows)
            return super().iter_scores(rows, **options)

    monkeypatch.setattr(pipeline, "load_judges", lambda names, scorer: {"verifier": Judge()})
    pair = {"prompt": "p", "chosen": "a", "rejected": "bb"}
    found = json.loads(run("eval", put(tmp_path, *ROWS, pair), "--judge", "verifier", "--json", "-q").stdout)
    assert [one["completion"] for one in read] == ["a", "bb"]
    judge = found["methods"]["judge, verifier"]
    assert judge["process_bench"] is None and judge["files"][0]["scored"] == 1
