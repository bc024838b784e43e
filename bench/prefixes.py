"""`python -m bench.prefixes`: time rows that share prefixes, read whole and with each prefix read once.

The workloads are RM-Bench (six answers to each of 4 prompts), a GRPO batch (8 answers of 128 tokens after a prompt of
512), a judge's instruction (5 ratings of each answer), and rows with nothing in common. Four arms run interleaved:

    whole     every row is read whole
    again     the same once more: what two equal arms differ by on this machine
    body      as `whole`, with one scored token a row: the time of the body, which sharing saves from
    shared    each prefix is read once
    named     the judge's rows alone: as `shared`, and the ratings are named in one state of the question

What the saved tokens promise is whole - body * (share of tokens saved): the head reads as many states as before.
Seconds are those of the processor, on one thread, because other work runs on the machine. Writes
bench/results/prefixes.json after each case.
"""

import argparse
import json
import re
import statistics
import time
import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness import timing
from endoreward_fast import EndoRewardModel

VOCAB, PROMPTS, END = 49152, 4, 2
RM_BENCH = Path(__file__).parents[2] / "shared" / "data" / "rm-bench" / "chat_filtered.json"


class Processor:
    """Seconds that the processor works for this process: a busy machine does not count."""

    def seconds(self, call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start


class Whole(EndoRewardModel):
    """Reads every row whole."""

    def obstacle_to_sharing(self) -> str | None:
        return "it is what sharing is compared with"

    def states_last(self) -> bool:
        return False


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def words(text: str, vocab: int) -> list[int]:
    """An id for each word and sign: about as many tokens as a tokenizer of that size makes."""
    return [3 + zlib.crc32(word.encode()) % (vocab - 3) for word in re.findall(r"\s?\w+|[^\w\s]", text)]


def drawn(count: int, seed: int, vocab: int) -> list[int]:
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(prompt: list[int], answer: list[int]) -> dict:
    return {"prompt_ids": prompt, "completion_ids": [*answer, END]}


def workloads(vocab: int, file: Path, size: int) -> dict[str, list[dict]]:
    """Return {name: rows}. `size` is how many prompts RM-Bench has."""
    asked = json.loads(file.read_text())[:size]
    system, prompt = drawn(20, 1, vocab), drawn(512, 2, vocab)
    answers = [(words(r["prompt"], vocab), words(a, vocab)) for r in asked for a in r["chosen"] + r["rejected"]]
    instruction = drawn(40, 3, vocab)
    return {
        "RM-Bench": [row(system + question, answer) for question, answer in answers],
        "GRPO, 8 of 512 + 128": [row(prompt, drawn(127, 10 + n, vocab)) for n in range(8)],
        "judge, 5 ratings": [
            {"prompt_ids": system + question + answer + instruction, "completion_ids": [rating]}
            for question, answer in answers[:4] for rating in range(3, 8)
        ],
        "nothing in common": [row(drawn(100, 300 + n, vocab), drawn(200, 600 + n, vocab)) for n in range(24)],
    }  # fmt: skip


def only_last_scored(rows: list[dict]) -> list[dict]:
    return [r | {"completion_mask": [0] * (len(r["completion_ids"]) - 1) + [1]} for r in rows]


def trie_size(rows: list[dict]) -> int:
    """Return the number of distinct prefixes of rows, without a last token that ends the episode."""
    tokens = [r["prompt_ids"] + r["completion_ids"] for r in rows]
    return len({hash(tuple(t[:i])) for t in tokens for i in range(1, len(t))})


def computed(scorer: EndoRewardModel, rows: list[dict], **options) -> tuple[int, int, list[float]]:
    """Return the tokens that the body computes, the same with padding, and the scores."""
    seen, real = [], []
    handle = scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    read_on = scorer.continuing.read_on
    scorer.continuing.read_on = lambda ids, lengths, past, parents, keep: (
        real.append(int(lengths.sum())) or read_on(ids, lengths, past, parents, keep=keep)
    )
    try:
        scores = [result.score for result in scorer.score(rows, **options)]
    finally:
        handle.remove()
        scorer.continuing.read_on = read_on
    return sum(real), sum(seen), scores


def case(model: str, name: str, scorer: EndoRewardModel, rows: list[dict], rounds: int, budget: int | None) -> dict:
    whole = Whole(scorer.model, scorer.tokenizer)
    options = {"max_tokens_per_batch": budget}
    scorer.score(rows[:2], **options)  # the model is asked here, once
    tokens, padded, scores = computed(scorer, rows, **options)
    _, padded_whole, expected = computed(whole, rows, **options)
    gap = max(abs(one - other) for one, other in zip(scores, expected, strict=True))
    scale = max(1.0, *map(abs, expected))
    if gap > 1e-5 * scale + 1e-4:
        raise SystemExit(f"{model}, {name}: scores differ by {gap}: nothing was timed")
    bare = only_last_scored(rows)
    calls = {
        "whole": lambda: whole.score(rows, **options),
        "again": lambda: whole.score(rows, **options),
        "body": lambda: whole.score(bare, **options),
        "shared": lambda: scorer.score(rows, **options),
    }
    if name.startswith("judge"):
        calls["named"] = lambda: list(scorer.iter_logprobs(rows, **options))
    times = timing.interleave(calls, rounds, Processor())
    total = sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    distinct = trie_size(rows)
    saved = 1 - distinct / total
    promise = [w - saved * b for w, b in zip(times["whole"], times["body"], strict=True)]
    over = timing.spread(times["shared"], promise)
    return {
        "model": model, "workload": name, "rounds": rounds, "budget": budget, "tokens": total, "distinct": distinct,
        "computed": tokens or total, "padded": padded, "padded_whole": padded_whole, "score_gap": gap,
        "promised": statistics.median(p / w for p, w in zip(promise, times["whole"], strict=True)),
        "over_promise": {key: over[key] for key in ("ratio", "ratio_low", "ratio_high")},
        "arms": {arm: timing.spread(t, times["whole"]) for arm, t in times.items()},
    }  # fmt: skip


def run(rounds: int, file: Path, size: int, budgets: list[int | None], folder: Path | None, only: str) -> None:
    torch.set_num_threads(1)
    models = {
        "pocket": EndoRewardModel.from_pretrained("pocket"), "llama, 30M": EndoRewardModel(llama()),
        "smollm2": EndoRewardModel.from_pretrained("smollm2"),
    }  # fmt: skip
    jobs = [
        (model, name, budget)
        for budget in budgets for model in models for name in workloads(VOCAB, file, size)
        if only in f"{model}, {name}"
    ]  # fmt: skip
    cases = []
    print(f"{'':42}{'computed':>9}{'promised':>9}{'took':>7}{'quartiles':>12}{'/ promise':>10}{'again':>7}")
    for model, name, budget in jobs:
        scorer = models[model]
        found = case(model, name, scorer, workloads(scorer.vocab_size, file, size)[name], rounds, budget)
        cases.append(found)
        took = found["arms"]["shared"]
        named = f", named {found['arms']['named']['ratio']:.3f}" if "named" in found["arms"] else ""
        quartiles = f"{took['ratio_low']:.2f}-{took['ratio_high']:.2f}"
        print(
            f"{model + ', ' + name + (f' ({budget})' if budget else ''):42}{found['computed'] / found['distinct']:9.3f}"
            f"{found['promised']:9.3f}{took['ratio']:7.3f}{quartiles:>12}"
            f"{found['over_promise']['ratio']:10.3f}{found['arms']['again']['ratio']:7.3f}{named}",
            flush=True,
        )  # fmt: skip
        timing.write("prefixes", timing.environment(), cases, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", type=Path, default=RM_BENCH)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--budgets", type=int, nargs="+", default=[None], help="max_tokens_per_batch; default: its own")
    parser.add_argument("--only", default="", help="part of a model's and workload's name")
    args = parser.parse_args()
    run(args.rounds, args.data, args.prompts, args.budgets, args.out, args.only)
