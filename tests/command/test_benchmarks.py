"""JudgeBench, RMGAP and RewardBench 2 give the figures that their own code gave; accuracies at similar length.

`OWN` are outputs of the benchmarks' code on the scores below, recorded once: utils/metrics.py of ScalerLab/JudgeBench,
src/rmgap/task_runner.py of nanzhi84/RMGAP and rewardbench/utils.py of allenai/reward-bench.
"""

import datetime
import json
import math
import random

import pytest

from cli_harness import put, run
from endoreward_fast.command.evaluate.evaluation import block
from endoreward_fast.command.evaluate.judge_bench import judge_bench
from endoreward_fast.command.evaluate.judged import Judged, mean_of, over_rows, similar_length
from endoreward_fast.command.evaluate.process_bench import METHODS, Solution
from endoreward_fast.command.evaluate.report import FileResult, to_json, to_text
from endoreward_fast.command.evaluate.reward_bench_2 import reward_bench_2, ties_of
from endoreward_fast.command.evaluate.rmgap import ranking, rmgap
from endoreward_fast.data.benchmarks import plan_eval

SOURCES = ("mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench")
OWN_JUDGE = {"Knowledge": 1 / 3, "Reasoning": 1 / 3, "Math": 1 / 6, "Coding": 1 / 3}
OWN_GAP = {
    "Chat": (1 / 3, 1 / 24, 0.625), "Reasoning": (7 / 12, 5 / 12, 0.5), "Safety": (7 / 9, 7 / 12, 0.75),
    "Writing": (17 / 36, 0.25, 0.75), "mean": (0.5416666666666667, 0.3229166666666667, 0.65625),
}  # fmt: skip
OWN_TIES = 0.8032649858967086


def judge_rows():
    """30 pairs with scores 0 to 3 of A and 0 to 2 of B, ties among them."""
    for n in range(30):
        a, b = n * 7 % 4, n * 5 % 3
        better, worse, place = (a, b, 0) if n % 3 else (b, a, 1)
        yield Judged("f", SOURCES[n % 5], None, n, (better,), (worse,), benchmark="JudgeBench", place=place)


def gap_rows():
    """Five rows with four groups; every third group has prompts with different scores."""
    for n in range(5 * 12):
        row, group = divmod(n // 3, 4)
        of = n if (n // 3) % 3 == 0 else n // 3
        scores = [(3 * of + 5 * k * k + of * k) % 7 for k in range(4)]
        domain = ("Chat", "Chat", "Writing", "Reasoning", "Safety")[row]
        winner = scores.pop(group)
        yield Judged(
            "f", domain, None, row, (winner,), tuple(scores), benchmark="RMGAP", place=group, row=row, group=group
        )  # fmt: skip


def ties_rows():
    for n in range(6):
        for kind, k, scores in (
            ("ref", 1, (7 * n % 5 + 1.5, 3 * n % 4, 5 * n % 3)),
            ("tied", 3, (4 + n % 3 / 4, 4.5, 4 + n % 2 / 2, 3 * n % 5, n / 2)),
        ):
            yield Judged("f", "Ties", None, f"{kind}:{n}", scores[:k], scores[k:], benchmark="RewardBench 2")


def test_judgebench_gives_its_own_figures():
    found = judge_bench([*judge_rows(), Judged("f", "mmlu-pro-law", None, 1, (1,), (0,))])
    assert {name: a.value for name, a in found.categories.items()} == pytest.approx(OWN_JUDGE)
    assert found.overall.value == pytest.approx(0.30) and found.overall.rows == 30
    assert found.single_game == pytest.approx(0.40) and found.ties == 7
    assert judge_bench([Judged("f", "mmlu-pro-law", None, 1, (1,), (0,))]) is None


def test_rmgap_gives_its_own_figures():
    found = rmgap(gap_rows())
    figures = {**found.domains, "mean": found.mean}
    assert {n: tuple(a.value for a in f.values()) for n, f in figures.items()} == {
        name: pytest.approx(own) for name, own in OWN_GAP.items()
    }
    assert list(found.mean) == ["Pair", "BoN", "Consistency"] and found.absent == []
    assert [found.domains["Chat"][name].rows for name in found.mean] == [2, 2, 2], "a trial is a row, not a prompt"


def test_rmgap_ranks_ties_by_key_and_a_group_without_all_prompts_is_not_consistent():
    tied = Judged("f", "Chat", None, 1, (2.0,), (2.0, 1.0, 3.0), benchmark="RMGAP", place=1)
    assert ranking(tied) == (3, 0, 1, 2)
    rows = list(gap_rows())
    alike = [row for row in rows if row.row == 3]
    assert rmgap(alike).mean["Consistency"].value == 0.5
    kept = [row for n, row in enumerate(alike) if n != 4]  # of a group that was consistent
    assert rmgap(kept).mean["Consistency"].value == 0.25 and rmgap(kept).absent == ["Chat", "Writing", "Safety"]


def test_rewardbench_2_gives_its_own_ties_score_and_leaves_other_benchmarks_alone():
    assert ties_of(list(ties_rows())).score == pytest.approx(OWN_TIES, abs=1e-12)
    lower = [Judged(r.file, "ties", None, r.id, r.chosen, r.rejected) for r in ties_rows()]
    assert reward_bench_2(lower).ties.score == pytest.approx(OWN_TIES, abs=1e-12)
    assert reward_bench_2(gap_rows()) is None, "Safety is a domain of RMGAP too"


# ---------------------------------------------------------------------------------------------------- similar length


def judged(chosen, rejected, *lengths, subset=None):
    return Judged("f", subset, None, 1, chosen, rejected, lengths or None)


def test_similar_length_is_at_most_ten_percent_more_tokens():
    row = judged((1.0, 1.0), (0.0, 2.0), (10, 20), (11, 12))
    assert set(row.similar) == {(0, 0)}  # 11 is 10% more than 10, 12 is 20% more
    assert set(judged((1.0,), (0.0,), (110,), (100,)).similar) == {(0, 0)}
    assert not judged((1.0,), (0.0,), (111,), (100,)).similar and not judged((1.0,), (0.0,), (0,), (0,)).similar


def test_accuracy_at_similar_length_is_a_mean_over_rows_that_have_such_pairs():
    rows = [
        judged((1.0,), (0.0, 2.0), (10,), (10, 10)),  # wins one of two
        judged((1.0,), (0.0, 2.0), (10,), (10, 99)),  # wins its only one
        judged((1.0,), (2.0,), (10,), (99,)),  # has none
        judged((1.0,), (1.0,), (10,), (10,)),  # a tie is lost
    ]
    found = similar_length(rows)
    assert (found.accuracy.value, found.accuracy.rows, found.pairs) == (0.5, 3, 4)
    assert similar_length([judged((1.0,), (0.0,))]) is None
    none = similar_length(rows[2:3])
    assert none.accuracy is None and none.pairs == 0 and none.to_json()["accuracy"] is None
    a, b = (over_rows(part, lambda r: r.accuracy) for part in (rows[:2], rows[2:3]))
    assert mean_of([a, b]).similar.accuracy.value == 0.75 and mean_of([a, b]).similar.pairs == 3


def test_levels_of_rm_bench_count_their_own_comparisons():
    row = judged((1.0, 1.0, 0.0), (0.0, 2.0, 2.0), (10, 20, 40), (10, 20, 20))
    # similar: (0, 0) won; (1, 1), (1, 2) lost
    found = block([row])
    assert found.normal.similar.accuracy.value == 0.5 and found.normal.similar.pairs == 2
    assert found.hard.similar.accuracy.value == 0.0 and found.hard.similar.pairs == 1
    assert found.easy.similar.accuracy is None and found.average.similar.pairs == 3


def test_the_report_has_a_dash_where_no_pair_is_similar():
    file = FileResult("f", 1, [judged((1.0,), (0.0,), (10,), (99,))])
    text = to_text([file])
    assert "100.0%  [ 20.7, 100.0]       1 rows | similar length      - of     0 pairs" in text
    found = json.loads(json.dumps(to_json([file], {}), allow_nan=False))
    assert found["files"][0]["similar_length"] == {"accuracy": None, "low": None, "high": None, "rows": 0, "pairs": 0}
    assert found["scores"][0]["lengths"] == {"chosen": [10], "rejected": [99]}
    assert "similar length" not in to_text([FileResult("f", 1, [judged((1.0,), (0.0,))])])


# ------------------------------------------------------------------------------------------------------- the command

JUDGE = [
    {"pair_id": str(n), "source": source, "question": "q", "response_A": "aaaaaaaaaa", "response_B": b, "label": label}
    for n, (source, b, label) in enumerate(
        [("mmlu-pro-law", "b" * 11, "A>B"), ("livecodebench", "b" * 11, "B>A"), ("livebench-math", "b" * 30, "A>B")]
    )
]
GAP = {
    "id": "g", "domain": "Writing", "responses": [{"key": f"r{n}", "text": "x" * n} for n in (1, 2, 3, 4)],
    "prompt_groups": [{"winner": f"r{n}", "prompts": [{"text": f"{n}{p}"} for p in "abc"]} for n in (1, 2, 3, 4)],
}  # fmt: skip
FOUR = {
    "id": "1", "prompt": "p", "chosen": ["xx"], "rejected": ["xxx", "xxx", "xxxx"], "num_correct": 1, "subset": "Math",
}  # fmt: skip


def test_the_command_scores_each_benchmark_by_its_rule(scorer, tmp_path):
    """The made-up scorer prefers short completions."""
    files = [put(tmp_path, *rows, name=name) for name, rows in (("j", JUDGE), ("g", [GAP]), ("r", [FOUR]))]
    flags = ["--signals", "entropy", "-q"]
    found = json.loads(run("eval", *files, *flags, "--json").stdout)
    judge = found["judge_bench"]
    assert judge["overall"]["accuracy"] == pytest.approx(2 / 3) and judge["chance"] == 0.5
    assert judge["overall"]["similar_length"] | {"low": 0, "high": 0} == {
        "accuracy": 0.5, "low": 0, "high": 0, "rows": 2, "pairs": 2,
    }  # fmt: skip
    assert {name: a["accuracy"] for name, a in judge["categories"].items()} == {"Knowledge": 1, "Coding": 0, "Math": 1}
    gap = found["rmgap"]["domains"]["Writing"]
    figures = [gap[name]["accuracy"] for name in ("Pair", "BoN", "Consistency")]
    assert figures == pytest.approx([0.5, 0.25, 1.0])
    assert found["rmgap"]["chance"] == {"Pair": 0.5, "BoN": 0.25, "Consistency": pytest.approx(1 / 576)}
    assert found["reward_bench_2"]["subsets"]["Math"]["accuracy"] == 1 and found["reward_bench_2"]["chance"] == 0.25
    assert found["process_bench"] is None and found["rm_bench"] is None
    counts = [(f["rows"], f["scored"], f["skipped"], f["comparisons"]) for f in found["files"]]
    assert counts == [(3, 3, 0, 3), (1, 1, 0, 36), (1, 1, 0, 3)]
    constant = found["methods"]["entropy"]  # the made-up signal is 1 for every completion
    assert constant["judge_bench"]["overall"]["accuracy"] == 0 and constant["judge_bench"]["ties"] == 3
    assert constant["judge_bench"]["single_game"] == pytest.approx(1 / 3)
    assert constant["rmgap"]["mean"]["Consistency"]["accuracy"] == 1
    text = run("eval", *files, *flags).stdout
    for line in (
        "  overall 66.7% [ 20.8, 93.9] 3 rows | similar length 50.0% of 2 pairs chance 50.0%",
        "  Math 100.0% [ 20.7, 100.0] 1 rows | similar length - of 0 pairs chance 25.0%",
        "  BoN chance 25.0%", "  Consistency chance 0.17%", "  not in these files: Chat, Reasoning, Safety",
    ):  # fmt: skip
        assert line.strip() in " ".join(text.split()), text
    assert max(map(len, text.splitlines())) <= 120 and "nan" not in text


def test_pairs_beside_lists_have_their_chance_printed(scorer, tmp_path):
    pairs = put(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "bb", "subset": "hep-go"}, name="pairs")
    assert run("eval", pairs, "-q").stdout.endswith("Chance is 50%.\n")
    text = run("eval", pairs, put(tmp_path, FOUR), "-q").stdout
    assert text.endswith("Chance for pairs and for RM-Bench: 50%.\n") and "RewardBench sections" in text


def test_only_the_bad_row_of_a_benchmark_is_lost(scorer, tmp_path):
    bad = [JUDGE[0] | {"label": "A=B"}, FOUR | {"num_correct": 3}, {"response_A": "a"}]
    path = put(tmp_path, JUDGE[0], *bad, FOUR)
    result = run("eval", path, "--json", code=2)
    found = json.loads(result.stdout)
    assert [(f["rows"], f["scored"], f["skipped"]) for f in found["files"]] == [(5, 2, 3)]
    errors = found["files"][0]["errors"]
    assert [error.split(":")[0] for error in errors] == ["line 2", "line 3", "line 4"]
    assert all(error in result.stderr for error in errors)


def test_a_file_without_a_column_is_refused_before_a_model_is_loaded(scorer, tmp_path):
    path = put(tmp_path, *({k: v for k, v in row.items() if k != "label"} for row in JUDGE))
    result = run("eval", path, code=2)
    assert "line 1: taken for JudgeBench because of its column response_A, but it has no column label" in result.stderr
    assert result.stderr.count("\n") == 1 and scorer.loaded == []


def test_an_rmgap_prompt_without_a_score_costs_its_group_the_consistency(scorer, tmp_path):
    long = [{"winner": f"r{n}", "prompts": [{"text": f"{n}{p}"} for p in "abc"]} for n in (1, 2, 3, 4)]
    row = GAP | {"prompt_groups": long}
    row["responses"] = [*GAP["responses"][:3], {"key": "r4", "text": "NAN"}]
    result = run("eval", put(tmp_path, GAP | {"id": 2}, row), "--json", code=2)
    found = json.loads(result.stdout)
    assert len(found["files"][0]["errors"]) == 12 and found["files"][0]["rows"] == 2
    assert found["files"][0]["errors"][0] == "line 2: group 0, prompt 1: the score is not finite (nan)"
    assert found["rmgap"]["domains"]["Writing"]["Consistency"] | {"low": 0, "high": 0} == {
        "accuracy": 1.0, "low": 0, "high": 0, "rows": 1,
    }  # fmt: skip


def test_lengths_are_those_of_the_model_for_every_method(scorer, tmp_path, monkeypatch):
    """A judge counts the tokens of its question. The pairs at similar length have to stay the same."""
    from cli_harness import LengthScorer
    from endoreward_fast.command.run import pipeline

    class Judge(LengthScorer):
        def iter_scores(self, rows, **options):
            for i, score in super().iter_scores(rows, **options):
                yield i, type(score)(score.score, num_tokens=7)

    monkeypatch.setattr(pipeline, "load_judges", lambda names, scorer: {"verifier": Judge()})
    found = json.loads(run("eval", put(tmp_path, *JUDGE), "--judge", "verifier", "--json").stdout)
    pairs = [m["judge_bench"]["overall"]["similar_length"]["pairs"] for m in (found, *found["methods"].values())]
    assert pairs == [2, 2, 2]


def test_the_plan_and_the_rule_agree_on_the_order_of_keys():
    task = plan_eval(GAP)
    assert [prompt["place"] for prompt in task.facts["prompts"]] == [n // 3 for n in range(12)]
    assert math.isclose(sum(layout["chosen"] for layout in task.layout), sum(4 * n + n // 3 for n in range(12)))


# ---------------------------------------------------------------------------------------------- any shape of a file


def any_row(rng, file):
    scores = [-math.inf, 0.0, 1.0, 2.0]
    benchmark = rng.choice([None, "RewardBench 2", "JudgeBench", "RMGAP"])
    counts = {"JudgeBench": (1, 1), "RMGAP": (1, 3)}.get(benchmark, (rng.randint(1, 3), rng.randint(1, 4)))
    chosen, rejected = (tuple(rng.choice(scores) for _ in range(count)) for count in counts)
    lengths = tuple(tuple(rng.choice([0, 10, 11, 99]) for _ in range(count)) for count in counts)
    subset = rng.choice([None, "Ties", "Math", "hep-go", "Chat", "mmlu-pro-law", "Writing"])
    subset = rng.choice(["Chat", "Safety"]) if benchmark == "RMGAP" else subset
    where = rng.randint(0, 3) if benchmark == "RMGAP" else None
    return Judged(
        file, subset, rng.choice([None, "chat", "safety-refuse"]), rng.choice(["ref:1", "tied:1", 7, None]), chosen,
        rejected, rng.choice([None, lengths]), benchmark, row=where, group=where and rng.randint(0, 3),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_no_shape_of_a_file_breaks_the_report(seed):
    rng = random.Random(seed)
    methods = [(), ("logprob",), ("logprob", "judge, verifier")][seed % 3]
    files = [FileResult.by_methods(f"f{n}", methods) for n in range(rng.randint(1, 3))]
    for file in files:
        for each in (file, *file.beside.values()):
            each.judged += [any_row(rng, file.name) for _ in range(rng.choice([0, 1, 2, 9]))]
            each.rows = each.scored + rng.randint(0, 2)
        for n in range(rng.choice([0, 0, 1, 5])):
            scores = tuple(rng.choice([-math.inf, 0.0, 1.0]) for _ in range(rng.randint(1, 3)))
            label = rng.randrange(-1, len(scores))
            file.solutions.append(
                Solution(file.name, rng.choice(["gsm8k", "all"]), n, label, dict.fromkeys(METHODS, scores), (9,) * 3)
            )
    text = to_text(files, "a note")
    assert "nan" not in text and "inf" not in text.replace("information", "")
    assert "a note." in text and text.count("rows scored") == len(files)
    assert json.dumps(to_json(files, {}), allow_nan=False)


def test_a_group_of_rmgap_without_any_score_is_not_consistent():
    """The benchmark's own code counts all four groups of a row."""
    rows = [
        Judged("f", "Writing", None, 1, (1.0,), (0.0,) * 3, benchmark="RMGAP", row=1, group=g) for g in (0, 0, 0, 1)
    ]
    assert rmgap(rows).mean["Consistency"].value == 1 / 4


def test_ids_that_json_lacks_end_no_evaluation(scorer, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    groups = [group | {"group": None} for group in GAP["prompt_groups"]]
    rows = put(tmp_path, GAP | {"prompt_groups": groups, "id": math.nan}, JUDGE[0] | {"pair_id": math.inf})
    text = run("eval", rows, "--json", "-q").stdout
    found = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert found["rmgap"]["domains"]["Writing"]["Consistency"]["accuracy"] == 1
    assert [row["group"] for row in found["scores"][:12:3]] == [0, 1, 2, 3] and found["scores"][-1]["id"] is None
    table = pyarrow.Table.from_pylist([JUDGE[0] | {"pair_id": datetime.date(2026, 1, 2)}])
    parquet.write_table(table, tmp_path / "day.parquet")
    found = json.loads(run("eval", tmp_path / "day.parquet", "--json", "-q").stdout)
    assert found["scores"][0]["id"] == "2026-01-02"
