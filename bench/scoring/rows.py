"""The rows that every arm scores, as token ids, and how they form batches."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """Token ids. Its score is the sum of log p(token | tokens before it) over the tokens of the completion."""

    prompt: list[int]
    completion: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


def rm_bench(file: Path, prompts: int, tokenizer: Any) -> list[Row]:
    """Return the six answers to each of the first `prompts` questions of an RM-Bench file, in the chat template."""
    rows = []
    for asked in json.loads(file.read_text())[:prompts]:
        question = [{"role": "user", "content": asked["prompt"]}]
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        for answer in asked["chosen"] + asked["rejected"]:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            rows.append(Row(prompt, [*ids, tokenizer.eos_token_id]))
    return rows


def longest(batch: Sequence[Row]) -> int:
    return max(row.tokens for row in batch)


def batches(
    rows: Sequence[Row], tokens: int, key: Callable[[Row], int] = lambda row: row.tokens,
    width: Callable[[Sequence[Row]], int] = longest,
) -> Iterator[list[int]]:  # fmt: skip
    """Yield positions of rows, largest key first. A batch has at most `tokens` tokens with its padding, or one row."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: key(rows[i]), reverse=True):
        if batch and (len(batch) + 1) * width([rows[n] for n in [*batch, i]]) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
