"""bench/paper's claims on the embedded model: their statistics on known inputs, and small runs of the commands."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from bench.paper import policies, ranking, rl, steering
from bench.paper.output import RESULTS
from endoreward_fast import EndoRewardModel
from endoreward_fast.pocket.quiz import IN_DIGITS, IN_WORDS, in_words, problems


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


def record_of(folder, name, printed):
    """Return the record that a command wrote, after checking that it printed the record's sentence."""
    record = json.loads((folder / f"paper-{name}.json").read_text())
    assert record["command"] == f"python -m bench.paper.{name}"
    assert record["results"]["sentence"] in printed
    assert (folder / f"paper-{name}.png").stat().st_size > 10_000
    return record


# --- ranking


def test_accuracy_counts_wrong_answers_by_their_length():
    scores = torch.tensor([[3.0, 1, 2, 4], [0.0, 0, -1, 5]])  # a tie counts as lost
    lengths = torch.tensor([[2, 1, 2, 3], [2, 2, 2, 2]])
    found = ranking.accuracies(scores, lengths)
    assert {name: (share.value, share.rows) for name, share in found.items()} == {
        "all": (pytest.approx((2 / 3 + 1 / 3) / 2), 2), "shorter": (1.0, 1),
        "equal": (pytest.approx((1 + 1 / 3) / 2), 2),
        "longer": (0.0, 1),
    }  # fmt: skip


def test_length_bias_compares_only_wrong_answers_of_different_length():
    lengths = torch.tensor([[9, 1, 2, 3], [9, 2, 2, 2], [9, 1, 1, 2]])
    falling = torch.tensor([[0.0, -1, -2, -3]] * 3)
    found = ranking.shorter_wins(falling, lengths)
    assert (found.value, found.rows) == (1.0, 2)
    rising = torch.tensor([[9.0, 1, 2, 3], [9, 1, 2, 3], [9, 0, 3, 2]])
    assert ranking.shorter_wins(rising, lengths).value == pytest.approx((0 + 1 / 2) / 2)


def test_ranking_gives_every_method_the_same_answers(tmp_path, capsys, monkeypatch):
    tasks = ("add", "fact", "spell")
    monkeypatch.setattr(ranking, "TASKS", tasks)
    monkeypatch.setattr(ranking, "problems", lambda n, seed, *split: problems(n, seed, *split, tasks=tasks))
    ranking.main(["--per-task", "1", "--steps", "2", "--out", str(tmp_path)])
    record = record_of(tmp_path, "ranking", capsys.readouterr().out)
    methods = record["results"]["methods"]
    assert len(methods) == 15 and ranking.TRAINED in methods
    assert all(row["all"]["rows"] == len(tasks) for row in methods.values())
    assert methods["endogenous"]["all"] == methods["logprob"]["all"] == methods["centred"]["all"]


def test_a_trained_reward_model_learns():
    """The accuracy is 0 at first, because the head is zero and every comparison a tie, and rises within six steps."""
    school = problems(32, 0, "train", ["copy"])
    asked = ranking.samples(school[:8])

    def accuracy(steps):
        scores = torch.tensor([row.score for row in ranking.trained(school, 0, steps).score(asked)]).view(8, 4)
        return ranking.accuracies(scores, torch.ones(8, 4))["all"].value

    assert accuracy(0) == 0.0 and accuracy(6) > 0.6


# --- steering


def test_pairs_ask_the_same_sum_with_two_instructions():
    pairs = steering.sums(12, seed=0)
    assert len({digits.key for digits, _ in pairs}) == 12
    for digits, words in pairs:
        assert (digits.system, words.system) == (IN_DIGITS, IN_WORDS)
        assert digits.question == words.question and in_words(int(digits.answer)) == words.answer
    forms = [steering.form_of(text) for text in ("17", "seventeen", "a hundred", "")]
    assert forms == ["digits", "words", "neither", "neither"]


def test_steering_counts_preferences_right_answers_and_forms(monkeypatch):
    in_digits = torch.tensor(
        [[5.0, 1, 2, 3], [4.0, 5, 1, 1]]
    )  # right answer first: it is best of four in one row of two
    in_words = torch.tensor([[3.0, 4, 2, 1], [9.0, 1, 8, 2]])
    asked = []

    def scores(_, rows):
        asked.append({row.system for row in rows})
        return in_digits if rows[0].answer.isdecimal() else in_words

    monkeypatch.setattr(steering, "scores", scores)
    monkeypatch.setattr(steering, "policy", lambda *_: {})
    found = steering.measure(None, steering.sums(2, seed=0), 0)
    assert asked == [{system} for system in steering.SYSTEMS.values() for _ in ("digits", "words")]
    for row in found.values():
        assert row["margin"].tolist() == [-2, 5]
        assert {form: share.value for form, share in row["reward"].items()} == {"words": 0.5, "digits": 0.5}
    assert found["digits"]["right"].value == found["words"]["right"].value == 0.5
    assert found["digits"]["form_first"].value == 0.0  # 1 against 3, 5 against 9
    assert found["words"]["form_first"].value == 0.0  # 4 against 5, 1 against 4


def test_steering(tmp_path, capsys):
    steering.main(["--n", "8", "--out", str(tmp_path)])
    found = record_of(tmp_path, "steering", capsys.readouterr().out)["results"]
    for form in steering.FORMS:
        row = found[form]
        other = next(f for f in steering.FORMS if f != form)
        assert row["reward"][form]["value"] > 0.8 > 0.2 > row["reward"][other]["value"]
        assert sum(share["value"] for share in row["policy"].values()) == pytest.approx(1)
    assert all(w > d for w, d in zip(found["words"]["margin"], found["digits"]["margin"], strict=True))


# --- RL


def test_right_answers_match_exactly_and_have_ended():
    asked = problems(2, 0, tasks=["add"])
    said = [
        [policies.Answer(asked[0].answer, 3, True), policies.Answer(asked[0].answer, 12, False)],
        [policies.Answer(asked[1].wrong[0], 3, True), policies.Answer(asked[1].answer + "0", 4, True)],
    ]
    assert policies.right(asked, said).tolist() == [[1, 0], [0, 0]]


def test_answers_repeat_by_seed_and_the_model_keeps_its_mode(pocket):
    asked = problems(4, 0, tasks=["add"])
    pocket.model.train()
    first, again, other = (
        policies.answers(pocket.model, pocket.tokenizer, asked, samples=3, seed=seed) for seed in (0, 0, 1)
    )
    assert pocket.model.training and first == again != other
    pocket.model.eval()
    assert [len(row) for row in first] == [3] * 4
    [greedy] = policies.answers(pocket.model, pocket.tokenizer, asked[:1], greedy=True)
    assert len(greedy) == 1 and greedy[0].ended


@pytest.mark.parametrize("arm", ["token level", "verifiable"])
def test_every_arm_trains_and_records_all_curves(arm):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    quiz, others = rl.questions(0, 8, 4)
    assert len({p.key for p in (*quiz, *others)}) == 12
    model, curves = rl.train(arm, 0, quiz, replace(rl.TOY, steps=3))
    before = EndoRewardModel.from_pretrained("pocket").model
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(rl.CURVES, 3)
    answers = rl.PROMPTS * rl.GROUP
    assert all(0 <= share <= 1 and (share * answers).is_integer() for share in curves["accuracy"])
    assert curves["length"][0] > 1 and curves["kl"][-1] > 0


@pytest.mark.parametrize("arm", rl.ARMS)
def test_an_arm_trains_on_its_own_reward_alone(arm, monkeypatch):
    trl = pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    from endoreward_fast.integrations.grpo import EndoGRPOMixin

    asked = []
    monkeypatch.setattr(trl.GRPOTrainer, "train", lambda trainer: asked.append(trainer))
    rl.train(arm, 0, rl.questions(0, 8, 4)[0], replace(rl.TOY, steps=1))
    [trainer] = asked
    weights = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    own = {"endogenous": "endo_reward", "token level": "endo_reward"}.get(arm, arm)
    assert weights == {name: float(name == own) for name in ("endo_reward", "verifiable", "random")}
    assert isinstance(trainer, EndoGRPOMixin) == (arm == "token level")
    assert trainer.beta == 0.01 and trainer.ref_model is not None


def test_floor_and_ceiling():
    """The verifiable reward depends on the answer; the random one does not, and repeats for the same seed."""
    said = [[{"role": "assistant", "content": text}] for text in (" 12\n", "12", "120", "")]
    assert rl.Verifiable()(said, answer=["12"] * 4) == [1.0, 1.0, 0.0, 0.0]
    draws = rl.Coin(0)(said * 250)
    assert len(set(draws)) == 1000 and draws == rl.Coin(0)(said * 250) != rl.Coin(1)(said * 250)
    by_answer = torch.tensor(draws).view(250, 4)
    assert by_answer.mean(0).abs().max() < 4 / 250**0.5 and abs(by_answer.std() - 1) < 0.1


def test_accuracy_of_a_sampled_answer_is_its_probability(pocket):
    """Compare with 64 samples each, within four standard errors."""
    rows = rl.questions(0, 6, 1)[0]
    found = rl.measure(pocket, rows)
    sampled = policies.right(rows, policies.answers(pocket.model, pocket.tokenizer, rows, samples=64))
    spread = (sampled.mean(1) * (1 - sampled.mean(1)) / 64).sum().sqrt().item() / len(rows)
    assert abs(found["sampled"] - sampled.mean().item()) < 4 * spread


def fake_run(arm, seed, setup):
    gain = {"endogenous": 0.1, "verifiable": 0.2}.get(arm, 0.0) + 0.01 * seed
    before = {"sampled": 0.5, "greedy": 0.7}
    of = {"before": before, "after": {"sampled": 0.5 + gain, "greedy": 0.71}}
    return {
        "arm": arm,
        "seed": seed,
        "quiz": of,
        "others": of,
        "curves": dict.fromkeys(rl.CURVES, [float(seed)] * setup.steps),
    }


def test_rl_summarises_over_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rl, "run", fake_run)
    monkeypatch.setattr(rl, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    rl.main(["--seeds", "3", "--steps", "8", "--out", str(tmp_path)])
    record = record_of(tmp_path, "rl", capsys.readouterr().out)
    cells = record["results"]["table"]["endogenous"]["quiz"]
    assert cells["gain"]["sampled"] == pytest.approx([0.11, 0.10, 0.12])
    assert cells["after"]["greedy"] == pytest.approx([0.71] * 3)
    assert list(record["results"]["table"]) == list(rl.ARMS) and len(record["results"]["runs"]) == 3 * len(rl.ARMS)


def test_smoothing_is_the_mean_of_the_last_steps():
    assert rl.smooth([1, 2, 3, 4], 2).tolist() == [1, 1.5, 2.5, 3.5]


@pytest.mark.parametrize("name", ["ranking", "rl", "steering"])
def test_the_stored_record_is_complete(name):
    record = json.loads((RESULTS / f"paper-{name}.json").read_text())
    assert record["results"]["sentence"] and record["settings"]["model"] == "pocket"
    if name == "rl":
        assert record["settings"]["seeds"] == 3 and set(record["results"]["table"]) == set(rl.ARMS)


@pytest.mark.parametrize("name", ["ranking", "rl", "steering"])
def test_the_stored_record_of_a_real_model_is_complete(name):
    record = json.loads((RESULTS / f"paper-{name}-smollm2.json").read_text())
    assert record["results"]["sentence"] and record["settings"]["model"] == "smollm2"
    assert record["command"] == f"python -m bench.paper.{name} --model smollm2"
    if name == "rl":
        assert record["settings"]["seeds"] == 3 and set(record["results"]["table"]) == set(rl.REAL.arms)
