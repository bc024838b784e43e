"""The embedded model as a policy: sampled and greedy answers to problems, and which of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from endoreward_fast.pocket.quiz import Problem

LONGEST = 12  # tokens; the longest right answer of the arithmetic tasks has 7, including its end token


@dataclass(frozen=True)
class Answer:
    """One answer of the policy. `tokens` counts the end token."""

    text: str
    tokens: int
    ended: bool


def answers(
    model: nn.Module, tokenizer, problems: Sequence[Problem], *, samples: int = 1, seed: int = 0, greedy: bool = False,
    longest: int = LONGEST, batch: int = 512,
) -> list[list[Answer]]:  # fmt: skip
    """Sample `samples` answers to each problem at temperature 1 without top-k or top-p, or take the greedy answer."""
    rows = [p for p in problems for _ in range(1 if greedy else samples)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [
            answer
            for start in range(0, len(rows), batch)
            for answer in _generate(model, tokenizer, rows[start : start + batch], greedy, longest)
        ]
    each = len(found) // len(problems)
    return [found[i : i + each] for i in range(0, len(found), each)]


def generated(
    model: nn.Module, tokenizer, problems: Sequence[Problem], greedy: bool = False, longest: int = LONGEST
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the prompts as the model reads them, padded on the left, and (N, longest) ids of the answers."""
    prompts = tokenizer.apply_chat_template(
        [p.prompt() for p in problems], add_generation_prompt=True, return_tensors="pt", return_dict=True,
        padding=True, tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    training = model.training
    model.eval()
    with torch.inference_mode():
        ids = model.generate(**prompts, **sampling, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id)
    model.train(training)
    return prompts, ids[:, prompts["input_ids"].shape[1] :].clone()


def read(tokenizer, row: list[int]) -> Answer:
    """Return the answer in a row of ids, which ends with its first end token."""
    ended = tokenizer.eos_token_id in row
    length = row.index(tokenizer.eos_token_id) + 1 if ended else len(row)
    return Answer(tokenizer.decode(row[:length], skip_special_tokens=True).strip(), length, ended)


def _generate(model: nn.Module, tokenizer, problems: Sequence[Problem], greedy: bool, longest: int) -> list[Answer]:
    _, ids = generated(model, tokenizer, problems, greedy, longest)
    return [read(tokenizer, row) for row in ids.tolist()]


def right(problems: Sequence[Problem], found: Sequence[Sequence[Answer]]) -> torch.Tensor:
    """Return (problems, samples) float64: 1 where the answer equals the right one exactly and has ended, else 0."""
    return torch.tensor(
        [[float(a.ended and a.text == p.answer) for a in row] for p, row in zip(problems, found, strict=True)],
        dtype=torch.float64,
    )


def last_word_right(problems: Sequence[Problem], found: Sequence[Sequence[Answer]]) -> torch.Tensor:
    """Return (problems, samples) float64: 1 where the last word equals the right answer's, without a full stop."""
    rows = zip(problems, found, strict=True)
    return torch.tensor([[float(_last(a.text) == _last(p.answer)) for a in row] for p, row in rows]).double()


def _last(text: str) -> str:
    return text.rstrip(" .").split(" ")[-1]
