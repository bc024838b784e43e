"""bench/paper's preference tables: their statistics on known inputs, what is kept of a run, and small runs."""

import json
import math

import numpy as np
import pytest

from bench.paper import gsm8k, preferences, rm_bench
from bench.paper.preferences import DRAWS, NO_END, SHORTER, Pairs, best_of, expit, interval
from bench.paper.record import Recorded, record, record_judge
from endoreward_fast import EndoRewardModel
from endoreward_fast.rivals.judges import JUDGES

RIGHT = np.array([[True, True, False], [True, False, False], [True, True, True]])
LENGTHS = np.array([[10, 20, 11], [30, 33, 34], [5, 6, 7]])


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


# --- pairs and lengths


def test_pairs_hold_every_right_answer_with_every_wrong_one_of_its_prompt():
    pairs = Pairs.of(RIGHT, LENGTHS)
    assert list(zip(*pairs[:3], strict=True)) == [(0, 0, 2), (0, 1, 2), (1, 0, 1), (1, 0, 2)]
    assert pairs.tokens.tolist() == [[10, 11], [20, 11], [30, 33], [30, 34]]
    assert pairs.near.tolist() == [True, False, True, False]


def test_accuracy_averages_prompts_and_a_tie_is_half_a_win():
    pairs, scores = Pairs.of(RIGHT, LENGTHS), np.array([[3.0, 1, 2], [0, 0, -1], [1, 2, 3]])
    found = pairs.accuracy(scores)
    assert (found.value, found.rows) == ((1 / 2 + 1.5 / 2) / 2, 2)
    near = pairs.taken(pairs.near).accuracy(scores)
    assert (near.value, near.rows) == ((1 + 0.5) / 2, 2)


def test_an_accuracy_without_pairs_is_not_a_number():
    pairs = Pairs.of(RIGHT, LENGTHS)
    found = pairs.taken(np.zeros(4, dtype=bool)).accuracy(np.zeros((3, 3)))
    assert math.isnan(found.value) and found.rows == 0


def drawn(b0, b1, prompts=4000, seed=0):
    """Return pairs, one for each prompt, and scores that follow the model that length_fit fits."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 400, (prompts, 2))
    right = np.tile([True, False], (prompts, 1))
    pairs = Pairs.of(right, lengths)
    x = np.log(lengths[:, 0] / lengths[:, 1])
    won = rng.random(prompts) < expit(b0 + b1 * x / math.sqrt(np.mean(x**2)))
    return pairs, np.stack([won, ~won], 1).astype(float)


@pytest.mark.parametrize(("b0", "b1"), [(0.0, 0.0), (0.5, -2.0), (-1.0, 1.0)])
def test_the_logistic_fit_recovers_its_coefficients(b0, b1):
    pairs, scores = drawn(b0, b1)
    fit = pairs.length_fit(scores, draws=100)
    assert fit.shape == (101, 2) and fit[0] == pytest.approx([b0, b1], abs=0.12)
    for column, true in zip(fit.T, (b0, b1), strict=True):
        found = interval(column, 4000)
        assert found.low < found.value < found.high and found.low - 0.05 < true < found.high + 0.05


def test_accuracy_at_equal_length_sees_through_a_bias_of_length():
    """Length alone decides here, and right answers are mostly shorter: what is left is chance."""
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(20, 120, 3000), rng.integers(20, 400, 3000)], 1)
    pairs = Pairs.of(np.tile([True, False], (3000, 1)), lengths)
    assert pairs.accuracy(-lengths.astype(float)).value > 0.75
    fit = pairs.length_fit(-lengths.astype(float), draws=0)
    assert expit(fit[0, 0]) == pytest.approx(0.5, abs=0.05) and fit[0, 1] < -5


def test_a_prompt_is_drawn_with_all_of_its_pairs():
    """Nine equal pairs of a prompt are one trial: the interval must not shrink."""
    pairs, scores = drawn(0.5, 0.0, prompts=100)
    nine = Pairs(*(np.repeat(field, 9, axis=0) for field in pairs))
    one, many = (np.std(some.length_fit(scores, draws=DRAWS)[1:, 0]) for some in (pairs, nine))
    assert many == pytest.approx(one, rel=0.2)


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    noise = rng.random(50)
    found = preferences.difference([noise + 0.1 - noise, np.full(10, 0.3)])
    assert [found[k] for k in ("value", "low", "high")] == pytest.approx([0.2] * 3)
    spread = preferences.difference([np.array([0.0, 1.0] * 50)])
    assert spread["high"] - spread["value"] == pytest.approx(1.96 * math.sqrt(0.25 / 99), rel=1e-3)


def test_best_of_shares_a_tie():
    scores = np.array([[1.0, 3, 2], [2, 2, 1], [0, 0, 0]])
    right = np.array([[False, True, False], [True, False, True], [True, False, False]])
    assert best_of(scores, right).tolist() == [1.0, 0.5, 1 / 3]


# --- scores of recorded tokens


def recorded(rewards, logprobs):
    arrays = [np.asarray(a, dtype=np.float32) for a in (rewards, logprobs)]
    return Recorded(*arrays, arrays[0], arrays[0], {"endogenous": float(sum(rewards))}, 0.5)


def test_reductions_of_recorded_tokens_by_hand():
    groups = [[recorded([1, 2, 24], [-1, -2, -3]), recorded([4, 24], [-5, -1])]]
    found = preferences.scores_of(groups)
    assert {name: table.shape for name, table in found.items()} == dict.fromkeys(found, (1, 2))
    by_hand = {
        "endogenous": [27, 28], "reward, mean": [9, 14], f"reward, sum{NO_END}": [3, 4],
        f"reward, mean{NO_END}": [1.5, 4], "reward, gamma 0.9": [1 + 0.9 * 2 + 0.81 * 24, 4 + 0.9 * 24],
        f"reward, gamma 0.9{NO_END}": [2.8, 4], f"logprob, sum{NO_END}": [-3, -5],
        "logprob, gamma 0.93": [-1 - 0.93 * 2 - 0.93**2 * 3, -5 - 0.93], SHORTER: [-3, -2],
    }  # fmt: skip
    for name, expected in by_hand.items():
        assert found[name][0] == pytest.approx(expected), name
    assert "reward, sum" not in found and "logprob, sum" not in found  # the signals have these


def test_a_floor_keeps_late_tokens():
    late = [[recorded([0] * 200 + [10], [0] * 201)]]
    found = preferences.scores_of(late)
    assert found["reward, gamma 0.93"][0, 0] == pytest.approx(10 * 0.93**200, abs=1e-6)
    assert found["reward, gamma 0.93, floor 0.05"][0, 0] == pytest.approx(0.5)


# --- what is kept of a run


ROWS = [[{"prompt": f"add {n} 1", "completion": answer} for answer in ("2", "3 4")] for n in range(5)]


class Counts:
    """Count the rows that a scorer scores."""

    def __init__(self, scorer):
        self.scorer, self.rows = scorer, 0

    def __getattr__(self, name):
        return getattr(self.scorer, name)

    def score(self, rows, **options):
        self.rows += len(rows)
        return self.scorer.score(rows, **options)


def test_a_stopped_run_goes_on_behind_its_last_part(pocket, tmp_path):
    counts = Counts(pocket)
    started = record(counts, ROWS, tmp_path, size=2)
    first = next(started)
    started.close()
    assert counts.rows == 4
    found = list(record(counts, ROWS, tmp_path, size=2))
    assert counts.rows == 4 + 6 and len(found) == 5
    again = list(record(counts, ROWS, tmp_path, size=2))
    assert counts.rows == 10
    whole = pocket.score(ROWS[0], per_token=True, entropy=True, signals="all")
    for one, other, third, score in zip(first, found[0], again[0], whole, strict=True):
        assert one.signals == other.signals == third.signals == pytest.approx(dict(score.signals), abs=1e-4)
        for field in ("rewards", "logprobs", "values", "entropies"):
            assert np.array_equal(getattr(one, field), getattr(third, field))
            assert getattr(one, field) == pytest.approx(np.array(getattr(score.tokens, field)), abs=1e-4)
        assert one.seconds == pytest.approx(third.seconds) and one.seconds > 0


@pytest.mark.parametrize("change", ["rows", "options", "model"])
def test_a_part_of_another_run_is_read_again(pocket, tmp_path, change):
    list(record(pocket, ROWS, tmp_path, size=5))
    counts = Counts(pocket)
    if change == "model":
        counts.dtype = "torch.float64"
    rows = [*ROWS[:4], [{"prompt": "add 9 1", "completion": "10"}] * 2] if change == "rows" else ROWS
    list(record(counts, rows, tmp_path, size=5, **({"alpha": 2.0} if change == "options" else {})))
    assert counts.rows == 10


def test_a_part_that_was_being_written_is_no_part(pocket, tmp_path):
    (tmp_path / "00000.part.npz").write_bytes(b"half")
    assert len(list(record(pocket, ROWS, tmp_path, size=5))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["00000.npz"]


def test_a_part_without_its_time_is_used(pocket, tmp_path):
    list(record(pocket, ROWS, tmp_path, size=5))
    with np.load(tmp_path / "00000.npz") as file:
        np.savez(tmp_path / "old.npz", **{name: file[name] for name in file.files if name != "seconds"})
    (tmp_path / "old.npz").replace(tmp_path / "00000.npz")
    counts = Counts(pocket)
    found = list(record(counts, ROWS, tmp_path, size=5))
    assert counts.rows == 0 and preferences.costs(found)["processor_seconds"] is None


def test_a_judges_verdicts_are_kept_and_only_a_groups_rows_are_rivals(pocket, tmp_path):
    judge = JUDGES["pairwise"](pocket)
    same = [ROWS[0], ROWS[0][::-1]]  # one prompt in two groups
    found = list(record_judge(judge, same, tmp_path))
    assert [score for score, _ in found[0]] == pytest.approx([score for score, _ in found[1]][::-1], abs=1e-4)
    alone = [row.score for row in judge.score(ROWS[0])]
    assert [score for score, _ in found[0]] == pytest.approx(alone, abs=1e-4)
    kept = (tmp_path / "00000.json").stat().st_mtime_ns
    assert list(record_judge(judge, same, tmp_path)) == found
    assert (tmp_path / "00000.json").stat().st_mtime_ns == kept
    list(record_judge(JUDGES["verifier"](pocket), same, tmp_path))
    assert (tmp_path / "00000.json").stat().st_mtime_ns != kept


# --- the commands


def arguments(tmp_path, *more):
    folders = ["--data", str(tmp_path), "--parts", str(tmp_path / "parts"), "--out", str(tmp_path / "out")]
    return ["--model", "pocket", "--dtype", "float32", *folders, *more]


def record_of(tmp_path, name, printed):
    text = (tmp_path / "out" / f"paper-{name}.json").read_text()
    assert json.loads(text)["results"]["sentence"] in printed
    assert (tmp_path / "out" / f"paper-{name}.png").stat().st_size > 10_000
    return json.loads(text)


def test_rm_bench_as_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preferences, "DRAWS", 20)
    (tmp_path / "rm-bench").mkdir()
    for name in ("chat", "safety-refuse", "safety-response"):
        rows = [
            {"id": n, "prompt": f"add {n} 1", "chosen": [f"{n + 1}"] * 2 + [f"{n + 1} !"], "rejected": ["9 9"] * 3}
            for n in range(3)
        ]
        (tmp_path / "rm-bench" / f"{name}_filtered.json").write_text(json.dumps(rows))
    rm_bench.main(arguments(tmp_path, "--judges", "5"))
    found = record_of(tmp_path, "rm-bench", capsys.readouterr().out)
    assert found["command"] == "python -m bench.paper.rm_bench"
    methods, settings = found["results"]["methods"], found["settings"]
    assert settings["files"] == {"chat": 3, "safety-refuse": 3, "safety-response": 3} and settings["answers"] == 54
    assert len(methods) == 7 + (6 + 6) * 2 - 3 + 1
    bench = methods["endogenous"]["rm_bench"]
    assert bench["domains_absent"] == ["code", "math"] and set(bench["parts"]) == {"safety-refuse", "safety-response"}
    overall = {name: row["rm_bench"]["overall"]["average"]["accuracy"] for name, row in methods.items()}
    assert overall["endogenous"] == overall["logprob"] == overall["centred"]
    assert methods["endogenous"]["minus_sum"]["value"] == 0.0
    assert set(found["results"]["judges"]) == {"judge, verifier", "judge, pointwise"}
    assert settings["judges"]["judge, verifier"]["prompts"] == 5


def test_gsm8k_as_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preferences, "DRAWS", 20)
    (tmp_path / "gsm8k").mkdir()

    def solved(n, *right):
        solutions = {
            f"author {k}": {"is_correct": ok, "solution": f"{n} + 1 = <<{n}+1={n + 1}>>{n + k}"}
            for k, ok in enumerate(right)
        }
        return json.dumps({"question": f"add {n} 1", "ground_truth": f"A: {n + 1}", **solutions})

    lines = [solved(1, True, False), solved(2, True, True), solved(3, False, True), solved(4, False, False)]
    (tmp_path / "gsm8k" / "example_model_solutions.jsonl").write_text("\n".join(lines))
    gsm8k.main(arguments(tmp_path, "--pairwise", "2"))
    found = record_of(tmp_path, "gsm8k", capsys.readouterr().out)
    results, settings = found["results"], found["settings"]
    assert (settings["prompts"], settings["problems"], settings["pairs"]) == (2, 4, 2)
    assert settings["authors"] == {"author 0": 0.5, "author 1": 0.5}
    assert results["picks"]["random pick"]["best_of_4"]["value"] == 0.5
    assert results["picks"]["random pick"]["best_of_4_of_all"]["value"] == 0.5
    assert results["picks"]["oracle"]["best_of_4_of_all"]["value"] == 0.75
    assert results["methods"][gsm8k.AUTHOR]["accuracy"]["value"] == 0.5
    with np.load(tmp_path / "parts" / "gsm8k-plain" / "00000.npz") as file:
        told = json.loads(str(file["told"]))
    assert [row["completion"] for row in told["rows"]] == ["1 + 1 = 1", "1 + 1 = 2", "3 + 1 = 3", "3 + 1 = 4"]


@pytest.mark.parametrize("command", [rm_bench, gsm8k])
def test_a_folder_without_the_data_is_named(command, tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        command.main(arguments(tmp_path))
