"""bench/paper/math.py, the paper's RL experiment, run with the embedded model."""

import json

import pytest
import torch

from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import problems

pytest.importorskip("trl", reason="TRL asks for Python 3.11")
pytest.importorskip("math_verify", reason="comes with TRL's extra")
from bench.paper import math


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": p.question, "solution": rf"\boxed{{{p.answer}}}"} for p in problems(16, tasks=["add"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_trains_and_measures_before_and_after(data, tmp_path, capsys):
    sizes = "--steps 2 --batch 8 --group 4 --accumulate 1 --length 8 --limit 4".split()
    out = tmp_path / "out"
    math.main(["--model", str(pocket_path()), "--train", data, "--test", data, "--out", str(out), *sizes])
    record = json.loads((out / "result.json").read_text())
    assert set(record["results"]) == {"rows", "before", "after"} and record["results"]["rows"] == 4
    assert len([step for step in record["log"] if "endo_reward/token" in step]) == 2
    assert (out / "model.safetensors").exists() and "before: " in capsys.readouterr().out


class Saying(torch.nn.Module):
    """A model that generates one text for every prompt."""

    device = torch.device("cpu")

    def __init__(self, ids):
        super().__init__()
        self.ids = torch.tensor([ids])

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, self.ids.expand(len(input_ids), -1)], 1)


def test_accuracy_compares_the_boxed_answers(data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(pocket_path()))
    rows = math.rows_of(data, "test", 3)
    assert math.INSTRUCTION.format(problem="x") in rows[0]["prompt"][0]["content"].replace(
        problems(1, tasks=["add"])[0].question, "x"
    )
    right = rows[0]["solution"]
    model = Saying(tokenizer(f"so it is {right}", add_special_tokens=False)["input_ids"])
    share = sum(solution == right for solution in rows["solution"]) / 3
    assert math.accuracy(model, tokenizer, rows, 8, 2) == pytest.approx(share) and share > 0
    with pytest.raises(SystemExit, match="can read none"):
        math.accuracy(model, tokenizer, rows.map(lambda row: {"solution": "no number"}), 8, 2)


def test_a_data_set_without_solutions_raises_its_name(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "?"}\n')
    with pytest.raises(SystemExit, match=r"odd\.jsonl has no column problem, solution: it has question"):
        math.rows_of(str(path), "train", None)
