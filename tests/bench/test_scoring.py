"""bench.scoring on a tiny model: every arm gives the same numbers, and one that gives others is not timed."""

import argparse
import copy
import json
import math
import random

import gguf
import numpy as np
import pytest
import torch

from bench.scoring import __main__ as command
from bench.scoring import llama, measure, shown, weigh
from bench.scoring.arms import LLAMA_CPP, OURS, OURS_WHOLE, Arm, Loaded, arms, padded
from bench.scoring.rows import Row, batches, rm_bench
from tiny_gguf import written
from tiny_models import EOS, MODELS, TOKENIZER

SIZES = {"tokens": (64, 4096), "rows": (1, 4)}


@pytest.fixture(scope="module")
def rows():
    """Three prompts with four completions each."""
    drawn = random.Random(0)

    def ids(least, most):
        return [drawn.randrange(3, 250) for _ in range(drawn.randrange(least, most))]

    return [Row(prompt, [*ids(1, 40), EOS]) for prompt in (ids(2, 30) for _ in range(3)) for _ in range(4)]


@pytest.fixture(scope="module")
def loaded():
    return Loaded(MODELS["llama"](), TOKENIZER)


@pytest.fixture(scope="module")
def ours():
    return {name: arm for name, arm in arms("float32", gguf=False).items() if name in (OURS, OURS_WHOLE)}


@pytest.fixture(scope="module")
def expected(loaded, rows):
    """Each row alone through the model, in float64."""
    model = copy.deepcopy(loaded.model).double()
    with torch.no_grad():
        logprobs = [model(torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in rows]
    return [
        sum(logprob[len(row.prompt) + i - 1, token].item() for i, token in enumerate(row.completion))
        for row, logprob in zip(rows, logprobs, strict=True)
    ]


def measured(loaded, arms, rows, expected, rounds=1):
    def weighed(name, size):
        return weigh.weigh(loaded, arms[name], rows, size)

    return measure.run_case("float32", loaded, arms, rows, expected, rounds, weighed)


@pytest.fixture(scope="module")
def case(loaded, rows, expected):
    return measured(loaded, arms("float32", gguf=False), rows, expected, rounds=2)


def test_every_arm_that_is_installed_agrees_and_is_timed(case):
    assert not case["refused"]
    assert {"transformers + log_softmax", OURS, OURS_WHOLE} <= case["arms"].keys()
    assert case["arms"].keys() | case["absent"].keys() == arms("float32", gguf=False).keys()
    for arm in case["arms"].values():
        assert arm["gap"] < 1e-3
        assert arm["size"] in arm["tried"] and len(arm["tried"]) == 3
        assert arm["tokens_per_s_low"] <= arm["tokens_per_s"] <= arm["tokens_per_s_high"]
        assert arm["wall"]["median_s"] > 0
    assert case["arms"][OURS_WHOLE]["ratio"] == 1.0
    assert case["rounds"] == 2 and case["distinct"] < case["tokens"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", arms("float32", gguf=False))
def test_an_arm_gives_the_same_numbers_with_every_batch_size(name, dtype, loaded, rows, expected):
    arm = arms(dtype, gguf=False)[name]
    if arm.missing:
        pytest.skip(arm.missing)
    model = copy.deepcopy(loaded.model).to(getattr(torch, dtype))
    score = arm.load(Loaded(model, copy.deepcopy(TOKENIZER)))
    for size in SIZES[arm.unit]:
        assert measure.gap(score(rows, size), expected, dtype) >= 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scores: [score + 0.01 for score in scores], r"row 0: .* apart is allowed"),
        (lambda scores: [*scores[:11], *(score - 0.1 for score in scores[11:])], r"row 11: "),
        (lambda scores: [math.nan, *scores[1:]], r"row 0: nan"),
        (lambda scores: scores[1:], "5 scores for 6 rows"),
    ],
)
def test_an_arm_that_gives_wrong_numbers_is_refused_and_not_timed(change, said, loaded, rows, expected, ours):
    def load(loaded):
        right = ours[OURS_WHOLE].load(loaded)
        return lambda rows, size: change(right(rows, size))

    case = measured(loaded, ours | {"wrong": Arm(load)}, rows, expected)
    assert case["arms"].keys() == ours.keys()
    with pytest.raises(measure.WrongNumbers, match=said):
        raise measure.WrongNumbers(case["refused"]["wrong"])


def test_an_arm_that_is_wrong_with_one_batch_size_only_is_refused(loaded, rows, expected, ours):
    def load(loaded):
        right = ours[OURS_WHOLE].load(loaded)
        return lambda rows, size: [score + (size == 4096) for score in right(rows, size)]

    case = measured(loaded, ours | {"wrong": Arm(load)}, rows, expected)
    assert case["refused"].keys() == {"wrong"}


def test_a_rival_that_is_not_installed_is_absent_by_name(loaded, rows, expected, ours):
    rival = Arm(None, "no-such-rival", "no_such_rival")
    case = measured(loaded, ours | {"rival": rival}, rows, expected)
    assert case["absent"] == {
        "rival": "no-such-rival cannot be imported: ModuleNotFoundError: No module named 'no_such_rival'"
    }
    assert "rival" not in case["arms"]


def test_arms_leave_the_model_and_tokenizer_as_they_were(loaded, rows, expected):
    tokenizer = copy.deepcopy(TOKENIZER)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    attributes, side = set(vars(loaded.model)), tokenizer.padding_side
    for arm in arms("float32", gguf=False).values():
        if arm.missing is None:
            arm.load(Loaded(loaded.model, tokenizer))(rows[:2], arm.sizes[0])
    assert set(vars(loaded.model)) == attributes and tokenizer.padding_side == side
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_batches_hold_every_row_once_within_their_tokens(rows):
    for tokens in (1, 64, 150, 10_000):
        found = list(batches(rows, tokens))
        assert sorted(i for batch in found for i in batch) == list(range(len(rows)))
        for batch in found:
            assert len(batch) == 1 or len(batch) * max(rows[i].tokens for i in batch) <= tokens
    assert [*padded([[1, 2], [3]], "left")[0].tolist()] == [[1, 2], [0, 3]]


def test_rows_of_rm_bench_are_prompts_in_the_template_with_six_answers(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    file = tmp_path / "rm.json"
    file.write_text(json.dumps([{"prompt": q, "chosen": ["a", "b", "c"], "rejected": ["d"] * 3} for q in "xyz"]))
    found = rm_bench(file, 2, tokenizer)
    assert len(found) == 12
    assert tokenizer.decode(found[1].ids) == "[user]x[bot]b</s>" and found[1].completion[-1] == EOS
    assert [row.prompt for row in found[:6]] == [found[0].prompt] * 6


def test_the_whole_run_writes_record_table_and_picture(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rm.json"
    file.write_text(json.dumps([{"prompt": "2 + 3?", "chosen": ["5"] * 3, "rejected": ["6", "23", ""]}]))

    def here(job, name, size):
        """A process takes seconds to start."""
        loaded, rows = job.load()
        return weigh.weigh(loaded, job.arms()[name], rows, size)

    monkeypatch.setattr(command, "in_a_process", here)
    threads = torch.get_num_threads()
    args = argparse.Namespace(
        model="pocket", data=file, prompts=1, rounds=1, threads=threads, dtypes=["float32"], out=tmp_path
    )
    command.run(args, tmp_path)
    record = json.loads((tmp_path / "scoring.json").read_text())
    assert {"cpu", "threads", "torch", "date"} <= record["environment"].keys()
    assert record["cases"][0]["arms"][OURS]["extra_mib"] >= 0
    said = capsys.readouterr().out
    assert OURS in said and "float32: 6 rows" in said
    svg, png = shown.draw(tmp_path)
    assert f"<!-- {OURS} -->" in svg.read_text() and png.stat().st_size > 10_000


def test_data_that_is_not_there_is_one_line():
    with pytest.raises(SystemExit, match=r"there is no file no\.json: name one of RM-Bench's with --data"):
        command.main(["--data", "no.json"])


def test_a_gguf_file_is_copied_with_float32_weights(tmp_path):
    source, target = tmp_path / "tiny.gguf", tmp_path / "copy.gguf"
    written(source, MODELS["llama"]())
    llama.in_float32(source, target)
    one, other = gguf.GGUFReader(source), gguf.GGUFReader(target)
    assert {name: field.contents() for name, field in one.fields.items() if "GGUF." not in name} == {
        name: field.contents() for name, field in other.fields.items() if "GGUF." not in name
    }
    assert [t.name for t in one.tensors] == [t.name for t in other.tensors]
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert b.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(gguf.quants.dequantize(a.data, a.tensor_type), b.data)


def test_llama_cpp_gives_the_same_numbers(tmp_path, loaded, rows, expected):
    arm = arms("float32", gguf=True)[LLAMA_CPP]
    if arm.missing:
        pytest.skip(arm.missing)
    written(tmp_path / "tiny.gguf", loaded.model)
    score = arm.load(Loaded(loaded.model, TOKENIZER, tmp_path / "tiny.gguf"))
    for size in (1, 3, 12):
        assert measure.gap(score(rows, size), expected, "float32") < 1e-3
