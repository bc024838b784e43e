"""The tokenizer and the training rows of the embedded model, for train_pocket.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from endoreward_fast.pocket import quiz, sentences

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# With the space after a role, a word at the start of a turn is the same token as inside a sentence.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STYLES = ("chat", "chat", "plain", "bare")
PROMPT_WEIGHT = 0.1  # low, because the operands of a question are unpredictable; not 0, because its wording is useful
ANSWER_WEIGHT = 4.0  # high, because answers are few of the tokens


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE without normalisation. Every text has a lossless encoding, and each digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
    ])  # fmt: skip
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def training_texts() -> list[str]:
    """Return the documentation of the training split, without texts that share a long line with a held-out text."""
    held = {line.strip() for _, text in sentences.documents("heldout") for line in text.splitlines()}
    held = {line for line in held if len(line) >= 30}
    return [text for _, text in sentences.documents("train") if held.isdisjoint(map(str.strip, text.splitlines()))]


def rendered(problem: quiz.Problem, style: str) -> tuple[str, str]:
    """Return (prompt, completion) as text with special tokens: in the chat template, as plain text, or bare."""
    if style == "chat":
        system = f"<|system|> {problem.system}{EOS}" if problem.system else ""
        return f"{BOS}{system}<|user|> {problem.question}{EOS}<|assistant|>", f" {problem.answer}{EOS}"
    if style == "plain":
        return f"{BOS}{problem.prompt('plain')}", f" {problem.answer}{EOS}"
    return f"{BOS}{problem.system or ''} {problem.question}".replace(f"{BOS} ", BOS), f" {problem.answer}{EOS}"


def _packed(pieces: Iterator[tuple[list[int], list[float]]], length: int) -> Iterator[list[list[float]]]:
    """Fill rows of `length` with (ids, weights) pieces, cut at row ends. Yield [ids, weights, segments]."""
    row: list[list[float]] = [[], [], []]
    for segment, (ids, weights) in enumerate(pieces):
        start = 0
        while start < len(ids):
            take = min(length - len(row[0]), len(ids) - start)
            row[0] += ids[start : start + take]
            row[1] += weights[start : start + take]
            row[2] += [segment] * take
            start += take
            if len(row[0]) == length:
                yield row
                row = [[], [], []]


def text_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, seed: int) -> Iterator[list]:
    """Yield rows of texts, each between BOS and EOS, in a new order every epoch. All tokens have equal weight."""
    rng = random.Random(f"text {seed}")

    def pieces() -> Iterator[tuple[list[int], list[float]]]:
        while True:
            for text in rng.sample(texts, len(texts)):
                ids = tokenizer(text + EOS, verbose=False)["input_ids"]  # starts with BOS
                yield ids, [1.0] * len(ids)

    return _packed(pieces(), length)


def problem_rows(tokenizer: PreTrainedTokenizerFast, tasks: list[str], length: int, seed: int) -> Iterator[list]:
    """Yield rows of training problems: half in the chat template, the rest as text. No problem is cut in two."""
    rng, source = random.Random(f"styles {seed}"), quiz.stream(seed, "train", tasks)

    def pieces() -> Iterator[tuple[list[int], list[float]]]:
        room = length
        while True:
            batch = [rendered(problem, rng.choice(STYLES)) for problem in islice(source, 512)]
            encoded = [tokenizer([p[i] for p in batch], add_special_tokens=False)["input_ids"] for i in (0, 1)]
            for prompt, completion in zip(*encoded, strict=True):
                size = len(prompt) + len(completion)
                if size > room:
                    yield [tokenizer.pad_token_id] * room, [0.0] * room
                    room = length
                yield prompt + completion, [PROMPT_WEIGHT] * len(prompt) + [ANSWER_WEIGHT] * len(completion)
                room = room - size or length

    return _packed(pieces(), length)


def batches(rows: Iterator[list], count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield batches (ids, weights, segments), each of shape (count, length)."""
    while True:
        ids, weights, segments = zip(*islice(rows, count), strict=True)
        yield torch.tensor(ids), torch.tensor(weights), torch.tensor(segments)
