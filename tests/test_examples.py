"""examples/: every script runs as a reader would run it, on the embedded model, from any folder."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """`python examples/<name> <arguments>` in an empty folder: what it prints."""

    def script(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_a_file_is_scored_and_right_answers_score_higher(run):
    rows = [json.loads(line) for line in run("score_a_file.py").splitlines()]
    given = [json.loads(line) for line in (FOLDER / "answers.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in asked} for row, asked in zip(rows, given, strict=True)] == given
    score = {row["id"]: row["score"] for row in rows}
    assert score["capital, right"] > score["capital, wrong"] and score["sort, right"] > score["sort, wrong"]
    assert score["no completion"] is None and "completion" in rows[-1]["error"]


def test_a_file_of_scores_is_written_once(run, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "Reverse: a b c", "completion": "c b \u00e9"}\n\n', encoding="utf-8")
    run("score_a_file.py", source, "--output", "scored.jsonl", "--reduction", "mean")
    [row] = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["completion"] == "c b \u00e9" and row["score"] < 0
    with pytest.raises(FileExistsError):
        run("score_a_file.py", source, "--output", "scored.jsonl")


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_the_best_of_n_comes_first(run, reduction):
    *ranked, best = run("best_of_n.py", "--n", 6, "--max-new-tokens", 4, "--reduction", reduction).splitlines()
    scores = [float(line.split()[0]) for line in ranked]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert ranked[0].split(maxsplit=1)[1] == repr(best.removeprefix("best: "))


def test_reinforce_raises_the_reward(run):
    printed = run("reinforce.py", "--steps", 4)
    reward = [float(found) for found in re.findall(r"mean reward of an answer (\S+),", printed)]
    assert len(reward) == 4 and sum(reward[2:]) > sum(reward[:2]) + 0.2  # seen: 0.42


def test_grpo_trains(run, tmp_path):
    pytest.importorskip("trl", reason="TRL asks for Python 3.11")
    printed = run("grpo_trl.py", "--steps", 1, "--max-completion-length", 4, "--output", tmp_path / "out")
    assert re.search(r"^step 1: mean reward -?\d", printed, re.M)


def test_a_loop_over_tensors_gives_what_the_scorer_gives(run):
    """The first batch is seen before any step."""
    from endoreward_fast import EndoRewardModel
    from endoreward_fast.pocket.quiz import problems

    printed = run("tensors.py", "--steps", 2, "--batch", 3)
    rows = [
        {"prompt": f"Question: {p.question}\nAnswer:", "completion": f" {p.answer}", "chat": False}
        for p in problems(3, split="train")
    ]
    scores = [row.score for row in EndoRewardModel.from_pretrained("pocket").score(rows)]
    rewards = re.findall(r"reward of an answer (\S+),", printed)
    assert len(rewards) == 2 and float(rewards[0]) == pytest.approx(sum(scores) / 3, abs=0.01)


def test_the_readme_has_a_line_for_each_and_each_is_short():
    readme = (FOLDER / "README.md").read_text()
    assert re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| .+ \|$", readme, re.M) == SCRIPTS
    assert all(len((FOLDER / name).read_text().splitlines()) < 60 for name in SCRIPTS)
