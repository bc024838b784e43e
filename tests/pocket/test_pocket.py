"""The embedded model: its files, tokenizer, training data and accuracy, and the script that trains it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from endoreward_fast.pocket import quiz

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "endoreward_fast" / "pocket"
TRAINER = ROOT / "tools" / "train_pocket.py"
TOKENIZER = AutoTokenizer.from_pretrained(POCKET)


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def judge():
    return _tool("pocket_card").Judge(POCKET)


# --- files


def test_the_files_are_small_enough_for_the_repository():
    size = sum(path.stat().st_size for path in POCKET.iterdir())
    assert size < 8 * 2**20, f"{size / 2**20:.1f} MiB"


def test_loads_with_transformers_in_fp32():
    model = AutoModelForCausalLM.from_pretrained(POCKET)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.get_output_embeddings().weight.shape[0] == len(TOKENIZER) == model.config.vocab_size
    assert model.config.eos_token_id == TOKENIZER.eos_token_id
    assert model.config.pad_token_id == TOKENIZER.pad_token_id


# --- tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_every_text_round_trips(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\x00\x7f", "a  b\r\n\t c ", "e\u0301 é ﬁ", "👩\u200d👧 \U0001d518 ☃\u200f", "١٢٣ ½ 12,5", " ."]
)
def test_odd_texts_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


def test_each_digit_is_one_token():
    assert TOKENIZER.tokenize("1984+7") == ["1", "9", "8", "4", "+", "7"]


def test_every_byte_has_a_token():
    alphabet = {token for token in TOKENIZER.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256
    assert TOKENIZER.unk_token_id is None


def test_text_starts_with_bos_once():
    assert TOKENIZER("hello")["input_ids"].count(TOKENIZER.bos_token_id) == 1
    chat = TOKENIZER.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    assert chat.count(TOKENIZER.bos_token_id) == 1


def test_the_chat_template_writes_turns():
    messages = [{"role": role, "content": role[0].upper()} for role in ("system", "user", "assistant")]
    prompt = TOKENIZER.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert prompt == "<|begin|><|system|> S<|end|><|user|> U<|end|><|assistant|>"
    assert whole == prompt + " A<|end|>"


# --- problems and passages


def test_splits_do_not_overlap():
    train = list(islice(quiz.stream(7, "train"), 5000))
    heldout = list(islice(quiz.stream(7, "heldout"), 1000))
    assert not {p.key for p in train} & {p.key for p in heldout}
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert len({p.key for p in heldout if p.task != "fact"}) > 500


def test_swapped_summands_are_in_the_same_split():
    keys = {p.key for p in islice(quiz.stream(3, "heldout", ["add"]), 300)}
    assert all(quiz.is_heldout(key) for key in keys)
    assert all(int(a) <= int(b) for a, b in (key.split()[1:] for key in keys))


@pytest.mark.parametrize("task", quiz.TASKS)
def test_problems_are_well_formed(task):
    for problem in quiz.problems(200, seed=5, tasks=[task]):
        assert len({problem.answer, *problem.wrong}) == 4
        assert problem.task == task
        messages = problem.prompt("chat")
        assert messages[-1] == {"role": "user", "content": problem.question}
        assert [m["content"] for m in messages[:-1]] == [problem.system] * bool(problem.system)
        assert problem.prompt("plain").endswith(f"Question: {problem.question}\nAnswer:")
        assert problem.completions("plain") == [f" {text}" for text in problem.completions("chat")]


def _check(problem: quiz.Problem) -> str:
    """Work out the right answer from the text of the question. A number is in digits unless words are asked for."""
    question, numbers = problem.question, [int(n) for n in re.findall(r"\d+", problem.question)]
    if problem.task == "add":
        return str(sum(numbers))
    if problem.task == "subtract":
        return str(max(numbers) - min(numbers))
    if problem.task == "sequence":
        return str(2 * numbers[3] - numbers[2])
    if problem.task == "largest":
        return str(max(numbers) if "largest" in question else min(numbers))
    if problem.task == "sort":
        return " ".join(map(str, sorted(numbers)))
    if problem.task == "spell" and numbers:
        return quiz.in_words(numbers[0])
    if problem.task == "spell":
        return next(str(n) for n in range(1000) if f"Write {quiz.in_words(n)} in digits." == question)
    letters = " ".join(re.findall(r"\b[a-z]\b", question.replace("a the", "the")))
    if problem.task == "reverse":
        return letters[::-1]
    counted, *rest = letters.split()
    return str(rest.count(counted))


@pytest.mark.parametrize("task", ["add", "subtract", "sequence", "largest", "sort", "reverse", "count", "spell"])
def test_answers_are_right(task):
    for problem in quiz.problems(200, seed=6, tasks=[task]):
        right = _check(problem)
        if problem.system == quiz.IN_WORDS and right.isdigit():
            right = quiz.in_words(int(right))
        assert problem.answer.lower() == right, problem


def test_wrong_answers_have_nearly_the_same_length():
    problems = quiz.problems(1100, seed=8)
    right = sum(len(p.answer) for p in problems) / len(problems)
    wrong = sum(len(w) for p in problems for w in p.wrong) / (3 * len(problems))
    assert abs(right - wrong) < 0.02 * right
    assert sum(len(p.answer) == len(w) for p in problems for w in p.wrong) > 0.75 * 3 * len(problems)


def test_same_seed_same_problems():
    assert quiz.problems(50, seed=1) == quiz.problems(50, seed=1) != quiz.problems(50, seed=2)


def test_numbers_in_words():
    words = [quiz.in_words(n) for n in (0, 13, 40, 68, 100, 121)]
    assert words == ["zero", "thirteen", "forty", "sixty-eight", "one hundred", "one hundred and twenty-one"]
    with pytest.raises(ValueError, match="from 0 to 999"):
        quiz.in_words(1000)


@pytest.mark.parametrize("kind", quiz.CORRUPTIONS)
def test_corruption_keeps_length_and_layout(kind):
    for i, passage in enumerate(quiz.passages(20)):
        spoiled = quiz.corrupted(passage.completion, i, kind)
        assert spoiled != passage.completion and len(spoiled) == len(passage.completion)
        assert spoiled == quiz.corrupted(passage.completion, i, kind)
        if kind != "replace_characters":
            assert sorted(spoiled) == sorted(passage.completion)


def test_held_out_passages_are_not_in_the_training_text():
    heldout = {line.strip() for p in quiz.passages(1000) for line in (p.prompt + p.completion).splitlines()}
    heldout = {line for line in heldout if len(line) >= 30}
    train = {line.strip() for text in _tool("pocket_data").training_texts() for line in text.splitlines()}
    assert len(heldout) > 300 and len(train) > 10_000
    assert not heldout & train


def test_wrong_names_raise():
    with pytest.raises(ValueError, match="kind must be one of"):
        quiz.corrupted("some text", kind="rot13")
    with pytest.raises(ValueError, match="split must be one of"):
        quiz.problems(1, split="test")
    with pytest.raises(ValueError, match="task must be one of"):
        quiz.problems(1, tasks=["poetry"])
    with pytest.raises(ValueError, match="form must be one of"):
        quiz.problems(1)[0].prompt("xml")


# --- what the model knows (chance: 1/4 for answers, 1/2 for the others)


@pytest.mark.parametrize("form", quiz.FORMS)
def test_ranks_the_right_answer_first(judge, form):
    problems = quiz.problems(110, seed=11)
    hits = [judge.picks_first(p.prompt(form), p.completions(form)) for p in problems]
    assert sum(hits) / len(hits) > 0.88  # 0.96 measured on 1100 problems


@pytest.mark.parametrize("kind", quiz.CORRUPTIONS)
def test_prefers_real_text_to_corrupted_text(judge, kind):
    passages = quiz.passages(30, seed=12)
    hits = [judge.picks_first(p.prompt, [p.completion, quiz.corrupted(p.completion, 0, kind)]) for p in passages]
    assert sum(hits) / len(hits) > 0.9


def test_a_system_prompt_reverses_the_order(judge):
    for digits, words in quiz.steered(20, seed=13):
        assert judge.picks_first(digits.prompt(), [digits.answer, words.answer])
        assert judge.picks_first(words.prompt(), [words.answer, digits.answer])


def test_the_loss_stays_level_far_beyond_the_training_length(judge):
    """Nats per token of held-out text stay level up to eight times the training length."""
    text = "\n\n".join(p.prompt + p.completion for p in quiz.passages(60, seed=14))
    ids = torch.tensor([TOKENIZER(text)["input_ids"][:4097]])
    assert ids.shape[1] == 4097
    with torch.inference_mode():
        logprob = judge.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    assert -logprob[2048:].mean() < -logprob[:512].mean() + 0.4


# --- the trainer


def test_trainer_is_deterministic(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TRAINER), "--steps", "3", "--problems", "0", "--output"]
    runs = [subprocess.Popen([*command, tmp_path / name], env=environment) for name in ("a", "b")]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    for file in ("model.safetensors", "tokenizer.json"):
        hashes = {hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for name in ("a", "b")}
        assert len(hashes) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").num_parameters() > 2_000_000
