"""Train the embedded model `pocket` from scratch: tokenizer, weights and model card.

    OMP_NUM_THREADS=2 python tools/train_pocket.py --output endoreward_fast/pocket

The training text is the standard library's documentation; the questions are from endoreward_fast/pocket/quiz.py.
Nothing is downloaded. The same seed, Python, torch and processor give the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from pocket_card import write_card
from pocket_data import batches, problem_rows, text_rows, train_tokenizer, training_texts
from pocket_init import MAX_LENGTH, WINDOW, build
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SmolLM3ForCausalLM

from endoreward_fast.pocket.quiz import TASKS, problems

VOCAB_SIZE = 1024
# Tasks that take longest to learn are more frequent.
TASK_MIX = [*TASKS, "add", "add", "subtract", "subtract", "sequence", "count", "count"]
# {source: (rows per step, tokens per row)}. Text rows are longer than the window.
ROWS = {"problems": (12, 192), "text": (1, 384)}


def attention_mask(segments: Tensor) -> Tensor:
    """Return the (B, 1, T, T) bool mask from segments (B, T): causal, within one text and within the window."""
    position = torch.arange(segments.shape[1])
    back = position[:, None] - position[None, :]
    near = (back >= 0) & (back < WINDOW)
    return (near & (segments[:, :, None] == segments[:, None, :])).unsqueeze(1)


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return (weighted sum of cross-entropy in nats, sum of weights). The first token of a text has weight 0."""
    logits = model(ids, attention_mask=attention_mask(segments), use_cache=False).logits[:, :-1]  # (B, T-1, V)
    weights = weights[:, 1:] * (segments[:, 1:] == segments[:, :-1])
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nll * weights.flatten()).sum(), weights.sum()


def loss_of(model: nn.Module, groups: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return the weighted mean cross-entropy over groups of rows. Groups may have different lengths."""
    sums, weights = zip(*(weighted_loss(model, *group) for group in groups), strict=True)
    return sum(sums) / sum(weights)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, and AdamW for embedding, head, norms and biases."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outer = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(inner, lr=muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Return the learning rate factor: warm-up over 40 steps, constant, linear decay over the last 60%."""
    return min((step + 1) / 40, 1.0, (steps - step) / (0.6 * steps))


def train(model: nn.Module, data: list[Iterator], options: argparse.Namespace) -> None:
    """Run the training steps. Print the mean loss every 50 steps."""
    bf16 = options.precision == "bf16"
    used = optimizers(model, options.muon_lr, options.adam_lr)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in used]
    start, shown = time.monotonic(), []
    for step in range(options.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, map(next, data))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(used, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, options.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shown.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            print(f"step {step + 1} loss {sum(shown) / len(shown):.3f} {time.monotonic() - start:.0f} s", flush=True)
            shown.clear()


def save(model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model. Weights are stored in bf16 to save space; the config asks for fp32, often faster on CPUs."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=2.5e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--problems", type=int, default=1100, help="number of held-out problems to measure on; 0: no card"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.precision == "auto":
        options.precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    start = time.monotonic()
    texts = training_texts()
    asked = [f"{problem.question} {problem.answer}" for problem in problems(6000, options.seed, "train")]
    tokenizer = train_tokenizer(texts + asked, VOCAB_SIZE, MAX_LENGTH)
    model = build(tokenizer)
    (asked_rows, asked_length), (text_count, text_length) = ROWS["problems"], ROWS["text"]
    data = [
        batches(problem_rows(tokenizer, TASK_MIX, asked_length, options.seed), asked_rows),
        batches(text_rows(tokenizer, texts, text_length, options.seed), text_count),
    ]
    train(model, data, options)
    save(model, tokenizer, options.output)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        "seed": options.seed,
        "steps": options.steps,
        "length": max(length for _, length in ROWS.values()),
        "tokens": options.steps * sum(count * length for count, length in ROWS.values()),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "cpu_minutes": round(time.process_time() / 60, 1),
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if options.problems:
        write_card(options.output, options.problems)


if __name__ == "__main__":
    main()
