"""bench/paper's comparison of objectives: its loop, its loss, its statistics, and the numbers in the documentation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.paper import objectives, objectives_report
from bench.paper.objectives import GROUP, Batch, Try
from bench.paper.rl import questions
from endoreward_fast import EndoRewardModel, TokenRewards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


def test_a_batch_holds_what_the_policy_said(pocket):
    asked = questions(0, 2, 1)[0]
    torch.manual_seed(0)
    batch = objectives.drawn(pocket.model, pocket.tokenizer, asked)
    assert len(batch.reward) == 2 * GROUP and set(batch.reward.tolist()) == {0.0, 1.0}
    with torch.no_grad():
        out = objectives.rewards(pocket.model, batch)
    answers = [{"prompt": p.prompt(), "completion": p.answer} for p in asked]
    for b in batch.reward.nonzero().flatten().tolist():  # a right answer is scored as the text of one is
        [row] = pocket.score([answers[b // GROUP]])
        assert out.logprob[b].sum().item() == pytest.approx(row.logprob, abs=1e-4)
        assert batch.tokens[b][batch.scored[b]][-1] == pocket.tokenizer.eos_token_id


def test_grpo_matches_its_formula():
    logprob = -torch.rand(2 * GROUP, 5, dtype=torch.float64)
    fixed = TokenRewards(None, -torch.rand_like(logprob), None, None)
    scored = torch.arange(5).expand(2 * GROUP, -1) >= torch.randint(0, 4, (2 * GROUP, 1))
    reward = torch.randint(0, 2, (2 * GROUP,)).double()
    leaf = logprob.clone().requires_grad_()
    loss = objectives.grpo(TokenRewards(None, leaf, None, None), fixed, Batch(None, None, scored, reward), 0.3)
    total, slope = 0.0, torch.zeros_like(logprob)
    for b in range(2 * GROUP):
        group = reward[b // GROUP * GROUP : b // GROUP * GROUP + GROUP]
        advantage = (reward[b] - group.mean()) / (group.std() + 1e-4)
        for t in scored[b].nonzero().flatten():
            share = 1 / (2 * GROUP * scored[b].sum())
            q = torch.exp(fixed.logprob[b, t] - logprob[b, t])
            total += share * (0.3 * (q - torch.log(q) - 1) - advantage)
            slope[b, t] = share * (0.3 * (1 - q) - advantage)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], slope)


def test_a_run_trains_on_its_questions_in_their_order(monkeypatch):
    asked = []
    draw = objectives.drawn
    monkeypatch.setattr(objectives, "PROMPTS", 1)
    monkeypatch.setattr(objectives, "drawn", lambda m, t, rows: asked.append([p.key for p in rows]) or draw(m, t, rows))
    found = objectives.run(Try("reval", 1e-4, 0.1), 0, steps=2, quiz=2, others=1)
    torch.manual_seed(0)
    order, quiz = torch.randperm(2).tolist(), questions(0, 2, 1)[0]
    assert asked == [[quiz[order[0]].key], [quiz[order[1]].key]]
    assert {len(curve) for curve in found["curves"].values()} == {2} and found["curves"]["kl"][0] == 0
    accuracy = found["accuracy"]["quiz"]
    assert accuracy["step"] == [0, 2] and accuracy["sampled"][0] != accuracy["sampled"][1]


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [objectives.scale(step, 20) for step in range(21)]
    warmup = objectives.WARMUP
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert factors[warmup] == 1.0 and factors[-1] == pytest.approx(0.0)
    assert all(np.diff(factors[warmup:]) < 0)


def test_intervals_are_students():
    mean, low, high = objectives_report.interval([1.0, 2.0, 4.0])
    half = 4.303 * np.std([1.0, 2.0, 4.0], ddof=1) / 3**0.5
    assert (mean, high - mean, mean - low) == (pytest.approx(7 / 3), pytest.approx(half), pytest.approx(half))


def fake(objective, seed, gain):
    cells = {"step": [0, 2], "sampled": [0.5, 0.5 + gain + 0.01 * seed], "greedy": [0.6, 0.6 + gain]}
    return {
        "objective": objective,
        "seed": seed,
        "curves": {name: [1.0, 2.0] for name in objectives_report.CURVES},
        "accuracy": {"quiz": cells, "others": cells},
    }


def test_the_command_tunes_each_objective_as_often_and_compares_by_seed(tmp_path, capsys, monkeypatch):
    gains = {"reval": 0.2, "tbrm": 0.05, "grpo": 0.1}
    tried = []

    def run(one, seed, **sizes):
        tried.append((one.objective, seed))
        better = 0.1 * (one.rate == 1e-4) + one.penalty if seed == objectives.TUNING else 0.0
        return fake(one.objective, seed % 7, gains[one.objective] + better) | {
            "rate": one.rate, "penalty": one.penalty, "seconds": 6.0
        }  # fmt: skip

    monkeypatch.setattr(objectives, "run", run)
    monkeypatch.setattr(objectives, "draw", lambda *_: None)
    command = ["--seeds", "3", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    for _ in range(2):  # the second time, every run is there
        objectives.main(command)
    with pytest.raises(ValueError, match="give another folder to --runs"):
        objectives.main([*command, "--steps", "7"])
    assert [tried.count((name, objectives.TUNING)) for name in gains] == [12, 12, 12] and len(tried) == 36 + 9
    record = json.loads((tmp_path / "paper-objectives.json").read_text())
    chosen = record["settings"]["chosen"]
    assert chosen == {
        name: {"objective": name, "rate": 1e-4, "penalty": max(objectives.PENALTIES[name])} for name in gains
    }
    ahead = {name: cells["quiz"]["sampled"]["ahead"] for name, cells in record["results"]["table"].items()}
    assert ahead["reval"] == pytest.approx([0.1] * 3) and ahead["tbrm"] == pytest.approx([-0.05] * 3)
    said = capsys.readouterr().out
    assert record["results"]["sentence"] in said and said.count("(ahead)") == said.count("(behind)") == 4
    assert record["settings"]["processor_minutes"] == pytest.approx(4.5)


def test_the_numbers_in_the_documentation_are_those_of_the_record():
    record = json.loads((ROOT / "bench" / "results" / "paper-objectives.json").read_text())
    table, settings = record["results"]["table"], record["settings"]
    page = " ".join((ROOT / "docs" / "evidence.md").read_text().partition("\n## Objectives\n")[2].split())
    wanted = [f"{settings['seeds']} seeds", f"{settings['processor_minutes']:.0f} minutes of one core"]
    for objective, cells in table.items():
        wanted += [objectives_report.percent(cells["quiz"]["sampled"][when]) for when in ("before", "after")]
        wanted += [objectives_report.percent(cells["others"][m]["gain"], "+") for m in ("sampled", "greedy")]
        one = settings["chosen"][objective]
        wanted += [f"{one['rate']:.0e}".replace("e-0", "e-"), f"{one['penalty']:g}"]
        if objective != "grpo":
            wanted += [objectives_report.percent(cells[name]["sampled"]["ahead"], "+") for name in ("quiz", "others")]
    assert not [w for w in wanted if w not in page]
    tries = [(r["objective"], r["rate"], r["penalty"]) for r in record["results"]["tuning"]]
    assert len(set(tries)) == len(tries) and {sum(t[0] == name for t in tries) for name in table} == {12}
