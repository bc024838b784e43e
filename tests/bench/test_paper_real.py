"""bench/paper's commands for a real model, run with the embedded model in its place, and the step of collapse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.paper import output, policies, questions, ranking, rl, rl_report, steering
from bench.paper.curves import Collapse, collapse
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import problems

MODEL = str(pocket_path())  # a folder is a real model to the commands: only the name pocket is the toy


# --- collapse


def curves(accuracy, entropy=None):
    return {"accuracy": accuracy, "entropy": [1.0] * len(accuracy) if entropy is None else entropy}


def test_a_policy_whose_accuracy_rises_and_then_falls_has_collapsed():
    rise_and_fall = [0.5] * 5 + [0.8] * 5 + [0.2] * 10
    # steps 9 to 13: (2 * 0.8 + 3 * 0.2) / 5 is the first mean below 0.5
    assert collapse(curves(rise_and_fall)) == Collapse(accuracy=13, rose=True, entropy=None)
    assert collapse(curves(rise_and_fall), width=1) == Collapse(accuracy=11, rose=True, entropy=None)


def test_a_fall_without_a_rise_is_told_apart():
    assert collapse(curves([0.5] * 5 + [0.2] * 15)) == Collapse(accuracy=6, rose=False, entropy=None)
    assert collapse(curves([0.5] * 5 + [0.2] * 6 + [0.9] * 9)) == Collapse(accuracy=None, rose=True, entropy=None)


@pytest.mark.parametrize(
    "accuracy",
    [
        [0.5] * 5 + [0.8] * 15,  # rises and stays
        [0.5] * 5 + [0.8] * 5 + [0.2] * 6 + [0.9] * 6,  # falls and recovers
        [0.5] * 5 + [0.8] * 8 + [0.1] * 5,  # below its start for two means: could be noise
        [0.5] * 20,
    ],
)
def test_a_policy_whose_accuracy_does_not_stay_down_has_not_collapsed(accuracy):
    assert collapse(curves(accuracy)).accuracy is None


def test_entropy_has_collapsed_where_it_stays_below_a_tenth():
    steady = [0.5] * 12
    assert collapse(curves(steady, [1.0] * 6 + [0.0] * 6)).entropy == 11
    assert collapse(curves(steady, [1.0] * 6 + [0.11] * 6)).entropy is None
    assert collapse(curves(steady, [1.0] * 5 + [0.0] * 5 + [1.0, 0.0])).entropy is None  # it came back
    assert collapse(curves(steady, [0.0] * 12)).entropy is None


@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_short_curves_have_no_collapse(steps):
    assert collapse(curves([0.5] * steps)) == Collapse(None, False, None)


# --- questions


def test_arithmetic_is_right_and_its_mistakes_are_wrong():
    rows = questions.arithmetic(30, seed=1)
    assert len({p.question for p in rows}) == 90 and rows == questions.arithmetic(30, seed=1)
    assert rows != questions.arithmetic(30, seed=2)
    for p in rows:
        asked = p.question.removeprefix("What is ").removesuffix("?")
        a, sign, b = asked.split()
        result = {"+": int(a) + int(b), "-": int(a) - int(b), "times": int(a) * int(b)}[sign]
        assert p.answer == f"{asked} is {result}." and len({p.answer, *p.wrong}) == 4
        assert all(wrong.startswith(f"{asked} is ") for wrong in p.wrong)


def test_sums_differ_and_are_asked_after_an_example():
    rows = questions.sums(100, seed=0)
    assert len({p.key for p in rows}) == 100 and questions.EXAMPLE[0] not in {p.question for p in rows}
    assert [turn["role"] for turn in rows[0].prompt()] == ["system", "user", "assistant", "user"]
    assert rows[0].prompt()[-1]["content"] == rows[0].question and rows[0].answer.startswith(rows[0].question[:-1])
    with pytest.raises(ValueError, match="at most 190"):
        questions.sums(191, seed=0)


def test_a_real_model_is_asked_facts_and_arithmetic():
    rows = ranking.asked_of("any model", 5, seed=0)
    counts = {task: sum(p.task == task for p in rows) for task in dict.fromkeys(p.task for p in rows)}
    assert {counts[task] for task in ("fact", *questions.GENERATED)} == {5} and "count" not in counts
    assert {"geography", "science", "people"} <= set(counts) and all(p.system is None for p in rows)
    assert {p.task for p in ranking.asked_of("pocket", 2, seed=0)} == set(ranking.TASKS)


# --- records


def test_files_and_commands_name_another_model_than_the_toy(tmp_path):
    assert output.named("rl") == output.named("rl", "pocket") == "rl"
    assert output.named("rl", "smollm2") == "rl-smollm2" and output.named("rl", "/a/b c/") == "rl-a-b-c"
    path = output.write("rl", {"model": "some/model"}, {}, tmp_path)
    assert path.name == "paper-rl-some-model.json"
    assert json.loads(path.read_text())["command"] == "python -m bench.paper.rl --model some/model"
    assert json.loads(output.write("reward", {}, {}, tmp_path).read_text())["command"] == "python -m bench.paper.reward"


def record_of(folder, claim, printed):
    name = output.named(claim, MODEL)
    record = json.loads((folder / f"paper-{name}.json").read_text())
    assert record["results"]["sentence"] in printed and record["settings"]["model"] == MODEL
    assert (folder / f"paper-{name}.png").stat().st_size > 10_000
    return record["results"]


# --- ranking and steering


def test_accuracy_by_task_counts_only_its_problems():
    rows = problems(2, 0, tasks=["add"]) + problems(1, 0, tasks=["fact"])
    scores = {"a": torch.tensor([[3.0, 1, 2, 4], [0.0, 0, -1, -5], [5.0, 1, 2, 3]])}
    found = ranking.by_task(rows, scores)
    assert {task: (row["a"].value, row["a"].rows) for task, row in found.items()} == {
        "add": (pytest.approx(2 / 3), 2), "fact": (1.0, 1),
    }  # fmt: skip


def test_ranking_of_a_real_model(tmp_path, capsys, monkeypatch):
    facts = questions.facts()[:2]
    monkeypatch.setattr(questions, "facts", lambda: facts)
    ranking.main(["--model", MODEL, "--per-task", "1", "--out", str(tmp_path)])
    found = record_of(tmp_path, "ranking", capsys.readouterr().out)
    assert ranking.TRAINED not in found["methods"] and len(found["methods"]) == 14
    assert list(found["tasks"]) == ["geography", "fact", *questions.GENERATED]
    assert all(set(row) == set(found["methods"]) for row in found["tasks"].values())


def test_the_form_of_a_sentence_is_that_of_its_numbers():
    said = {"It is 12.": "digits", "Twelve.": "words", "It is forty-two": "words", "Maybe and then": "neither"}
    said |= {"12 (twelve)": "digits", "": "neither", "The stone": "neither"}
    assert {text: steering.form_within(text) for text in said} == said


def test_steering_counts_margins_that_move_as_asked():
    found = {"words": {"margin": torch.tensor([1.0, -1, 3, 2])}, "digits": {"margin": torch.tensor([0.0, -2, 4, 2])}}
    assert steering.followed(found).value == 0.5


def test_steering_of_a_real_model(tmp_path, capsys):
    steering.main(["--model", MODEL, "--n", "4", "--out", str(tmp_path)])
    found = record_of(tmp_path, "steering", capsys.readouterr().out)
    assert found["followed"]["value"] == 1 and found["words"]["n"] == 4


# --- RL


def test_the_last_word_counts_whatever_the_form():
    asked = questions.sums(1, seed=0)
    number = asked[0].answer.split(" ")[-1]
    said = [
        [policies.Answer(text, 9, True) for text in (number, f"It is {number}.", f"{number}0", "", f"{number} apples")]
    ]
    assert policies.last_word_right(asked, said).tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize("arm", rl.REAL.arms)
def test_the_last_layers_of_a_real_model_train(arm):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    setup = replace(rl.setup_of(MODEL), steps=3, prompts=2, group=2, quiz=4, others=2, layers=1)
    quiz, _ = rl.questions(0, setup.quiz, setup.others, MODEL)
    model, curves = rl.train(arm, 0, quiz, setup)
    before = output.load(MODEL).model.state_dict()
    last = f"model.layers.{len(model.model.layers) - 1}."
    for name, weight in model.state_dict().items():
        assert weight.dtype == (torch.float32 if name.startswith(last) else torch.bfloat16)
        if not name.startswith(last):
            assert torch.equal(weight, before[name])
    assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(rl.CURVES, 3)
    if arm != "verifiable":  # with a few answers, all may be wrong
        assert any(not torch.equal(w.bfloat16(), before[n]) for n, w in model.state_dict().items() if last in n)
    read = rl.measure(rl.EndoRewardModel(model.eval(), output.load(MODEL).tokenizer), quiz, mixed=True)
    assert 0 <= read["sampled"] <= 1 and len(read["replies"]) == len(quiz)


def fake_run(arm, seed, setup):
    measured = {"sampled": 0.4, "greedy": 0.6, "number": 0.7, "replies": ["3"]}
    of = {"before": measured, "after": measured | {"sampled": 0.5}}
    steps = np.arange(setup.steps)
    falling = curves(list(np.where(steps < 10, 0.5 + 0.05 * steps, 0.1)), list(0.6**steps))
    return {"arm": arm, "seed": seed, "quiz": of, "others": of, "curves": {name: [1.0] for name in rl.CURVES} | falling}


def test_finished_runs_are_kept_and_those_of_another_setup_refused(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(rl, "run", lambda *job: calls.append(job) or fake_run(*job))
    folder, setup = tmp_path / "runs", rl.setup_of(MODEL)
    first = rl.kept("token level", 3, setup, folder)
    assert rl.kept("token level", 3, replace(setup, arms=("random",), workers=2), folder) == first and len(calls) == 1
    with pytest.raises(ValueError, match="give another folder to --runs"):
        rl.kept("token level", 3, replace(setup, steps=2), folder)
    rl.kept("random", 3, setup, folder)
    rl.kept("random", 3, setup, None)
    assert len(calls) == 3


def test_the_table_names_the_step_of_collapse():
    runs = [fake_run("endogenous", seed, replace(rl.REAL, steps=20)) for seed in range(2)]
    found = rl.table_of(runs)
    assert found["endogenous"]["collapse"] == [Collapse(accuracy=12, rose=True, entropy=10)] * 2
    assert found["endogenous"]["quiz"]["gain"]["number"] == [0, 0, 0]
    assert "12, 12" in rl_report.report_collapse(found) and "below its start: 12, 12." in rl.sentence(found, runs)
    assert "number, before" in rl.report(found, "quiz")
