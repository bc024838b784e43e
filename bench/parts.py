"""`python -m bench.parts`: which part of scoring takes how long, and how near each is to what the machine can do.

Rows of RM-Bench (six answers to each of a few prompts) are scored by the embedded model, by smollm2, and by random
weights of Qwen3-0.6B's shape, on one thread. The parts:

    tokenize     from text to token ids, chat template included
    matmul       the body's matrix products. Their bound: torch.mm of a whole pass through the layer's largest matrix
    attention    scaled_dot_product_attention. Its bound: the same rate, for the pairs of tokens that see each other
    elementwise  the rest of the body: norms, activations, rotary embedding, residuals, copies of keys and values.
                 Their bound: each layer's result is read and written once at the rate of a copy
    head         the statistics over the vocabulary. Their bound: torch.mm of the states through the head's weight
    rest         planning, padding, gathering of prefixes, reduction to scores

`share` is a part's share of the processor's time, `of bound` is its bound divided by its time. Shares of matmul,
attention and elementwise within the body come from torch's profiler. Seconds are those of the processor: other work may
run on the machine. Writes bench/results/parts.json.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import timing
from bench.one_forward import LAYERS, build
from bench.prefixes import RM_BENCH
from endoreward_fast import EndoRewardModel

PARTS = ("tokenize", "matmul", "attention", "elementwise", "head", "rest")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")


class Timed(EndoRewardModel):
    """A scorer that adds up the processor's seconds of its body and of its head."""

    def __init__(self, model: nn.Module, tokenizer) -> None:
        super().__init__(model, tokenizer)
        self.spent, self.states, self.pairs = Counter(), 0, 0
        model.base_model.register_forward_pre_hook(lambda _, args, given: self._start(**given), with_kwargs=True)
        model.base_model.register_forward_hook(lambda *_: self._stop())

    def _start(self, input_ids, past_key_values=None, **_) -> None:
        rows, width = input_ids.shape
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        self.pairs += rows * width * held + rows * width * (width + 1) // 2
        self._since = time.process_time()

    def _stop(self) -> None:
        self.spent["body"] += time.process_time() - self._since

    def rewards_of_padded(self, input_ids, scored, terminal, **options):
        start, before = time.process_time(), self.spent["body"]
        try:
            return super().rewards_of_padded(input_ids, scored, terminal, **options)
        finally:
            inside = self.spent["body"] - before
            self.spent["head"] += time.process_time() - start - inside
            # The state before each scored token, and the last one's unless the episode ends there.
            self.states += int(scored.sum()) + len(scored) - int((terminal & scored).any(1).sum())


def split_of_body(scorer: Timed, rows: list) -> dict[str, float]:
    """Return the shares of matmul, attention and elementwise in the body's time."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        scorer.score(rows)
    spent: Counter = Counter()
    for event in record.events():
        inside, parent = True, event
        while parent is not None and inside:
            inside = not parent.name.startswith("endoreward_fast::")
            parent = parent.cpu_parent
        if inside:
            kind = "attention" if "attention" in event.name else "matmul" if event.name in PRODUCTS else "elementwise"
            spent[kind] += event.self_cpu_time_total
    return {kind: spent[kind] / spent.total() for kind in ("matmul", "attention", "elementwise")}


def fastest(call, rounds: int = 5) -> float:
    """Return the median of the processor's seconds of a call."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[rounds // 2]


def rates(scorer: Timed, states: int) -> dict[str, float]:
    """Measure flops a second of a pass through the largest matrix, bytes a second of a copy, seconds of the head."""
    weights = [m.weight for m in scorer.model.base_model.modules() if isinstance(m, nn.Linear)]
    largest, head = max(weights, key=torch.Tensor.numel).detach(), scorer.head.weight.detach()
    hidden = torch.randn(2048, largest.shape[1], dtype=largest.dtype)
    few = torch.randn(min(512, states), head.shape[1], dtype=head.dtype)
    block, copy = (torch.zeros(64 * 2**20, dtype=torch.uint8) for _ in range(2))
    return {
        "flops": 2 * hidden.shape[0] * largest.numel() / fastest(lambda: hidden @ largest.T),
        "bytes": 2 * block.numel() / fastest(lambda: copy.copy_(block)),
        "head": states / len(few) * fastest(lambda: few @ head.T),
    }


def work_of(scorer: Timed, rows: list) -> tuple[int, int, int]:
    """Return the body's flops in matmuls and in attention, and the bytes that its elementwise parts must move."""
    moved = 0

    def count(module, args, found) -> None:
        nonlocal moved
        for x in (*args, found):
            moved += x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0

    leaves = [m for m in scorer.model.base_model.modules() if not list(m.children()) and not isinstance(m, nn.Linear)]
    handles = [module.register_forward_hook(count) for module in leaves]
    scorer.pairs = 0
    with FlopCounterMode(display=False) as counter:
        scorer.score(rows)
    for handle in handles:
        handle.remove()
    config = scorer.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * scorer.pairs * config.num_attention_heads * size * config.num_hidden_layers
    return counter.get_total_flops(), attention, moved


def case(name: str, dtype: str, scorer: Timed, rows: list[dict], rounds: int) -> dict:
    ready = scorer.encode(rows)
    scorer.score(ready)  # warms up, and asks the model whether it goes on behind a cache
    products, attention, moved = work_of(scorer, ready)
    split = split_of_body(scorer, ready)
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(rounds):
        scorer.spent.clear()
        scorer.states = 0
        start = time.process_time()
        ready = scorer.encode(rows)
        middle = time.process_time()
        scorer.score(ready)
        total = time.process_time() - middle
        found["tokenize"].append(middle - start)
        for kind, share in split.items():
            found[kind].append(share * scorer.spent["body"])
        found["head"].append(scorer.spent["head"])
        found["rest"].append(total - scorer.spent["body"] - scorer.spent["head"])
    rate = rates(scorer, scorer.states)
    bound = {
        "matmul": products / rate["flops"], "attention": attention / rate["flops"],
        "elementwise": moved / rate["bytes"], "head": rate["head"],
    }  # fmt: skip
    seconds = {part: sorted(times)[rounds // 2] for part, times in found.items()}
    tokens, everything = sum(len(row.input_ids) for row in ready), sum(seconds.values())
    return {
        "model": name, "dtype": dtype, "rows": len(rows), "tokens": tokens, "rounds": rounds,
        "tokens_per_cpu_second": tokens / everything, "gflops": rate["flops"] / 1e9, "gbytes": rate["bytes"] / 1e9,
        "parts": {
            part: {
                "seconds": s, "low": min(found[part]), "high": max(found[part]), "share": s / everything,
                "of_bound": bound[part] / s if part in bound else None,
            }
            for part, s in seconds.items()
        },
    }  # fmt: skip


def models() -> list[tuple[str, str]]:
    return [("pocket", "float32"), ("smollm2", "float32"), ("smollm2", "bfloat16"), ("qwen3-0.6b shape", "bfloat16")]


def load(name: str, dtype: str) -> Timed:
    if name.startswith("qwen3"):
        tokenizer = EndoRewardModel.from_pretrained("smollm2").tokenizer  # any: the weights are random
        return Timed(build(LAYERS).to(getattr(torch, dtype)), tokenizer)
    found = EndoRewardModel.from_pretrained(name, dtype=dtype)
    return Timed(found.model, found.tokenizer)


def run(file: Path, prompts: int, rounds: int, folder: Path | None, only: str) -> None:
    torch.set_num_threads(1)
    asked = json.loads(file.read_text())[3 : 3 + prompts]
    rows = [{"prompt": r["prompt"], "completion": a} for r in asked for a in r["chosen"] + r["rejected"]]
    cases = []
    for name, dtype in models():
        if only in f"{name} {dtype}":
            cases.append(case(name, dtype, load(name, dtype), rows, rounds))
            timing.write("parts", timing.environment(), cases, folder)
            print(table(cases[-1]), flush=True)


def table(found: dict) -> str:
    lines = [f"{found['model']}, {found['dtype']}: {found['tokens_per_cpu_second']:.0f} tokens a CPU second"]
    for part, cell in found["parts"].items():
        bound = "" if cell["of_bound"] is None else f"{cell['of_bound']:9.2f}"
        lines.append(f"  {part:12}{100 * cell['share']:6.1f}%{bound}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--data", type=Path, default=RM_BENCH)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a model's name and dtype")
    args = parser.parse_args()
    run(args.data, args.prompts, args.rounds, args.out, args.only)
