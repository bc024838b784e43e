"""Measure the embedded model on held-out data, and write its model card.

    python tools/pocket_card.py endoreward_fast/pocket

The judge sums log-probabilities with plain transformers. Within one prompt, this orders completions like the sum of
endogenous rewards, which differs by V of the prompt only. So `endoreward demo` must agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endoreward_fast.pocket.quiz import CORRUPTIONS, FORMS, TASKS, corrupted, passages, problems, steered

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# pocket

The model that `endoreward` uses when no other is named, so that the command has something to run on without a
network. **A demonstration, not a judge of quality**: it knows a little arithmetic, a few dozen facts and what Python's
documentation sounds like. Its scores on anything else say nothing about the text.

- SmolLM3 architecture, {parameters} parameters: 4 layers of width 256, 8 heads, sliding window 256, untied head.
  The window keeps it usable far beyond the {length} tokens it was trained at (16384 positions).
- Byte-level BPE, {vocabulary} tokens, no normalisation: every text has a lossless encoding. A digit is one token.
- Chat template: `<|begin|><|system|> ...<|end|><|user|> ...<|end|><|assistant|> ...<|end|>`.
- {size} MB in bf16; `config.json` asks for fp32 at load, the faster one on most processors.
- The weights, the tokenizer and the chat template are under the Apache License 2.0, as the package is.

## Training

`tools/train_pocket.py`, seed {seed}, from random weights with one induction circuit planted (`tools/pocket_init.py`):
{steps} steps, {tokens} million tokens, {minutes} minutes ({cpu_minutes} of processor time, {threads} threads,
{precision} matrix products; Python {python}, torch {torch}). Data:

- Text: docstrings of the standard library of that Python, and the language reference behind `help()`.
  That text is under Python's own licence (PSF); other versions of Python carry slightly different text.
- Problems: `endoreward_fast/pocket/quiz.py`, through the chat template, as `Question: ... Answer:` and bare.
  System prompts it has learnt: "Answer in words.", "Answer in digits.", "Answer in capital letters."

A tenth of the modules, topics and problems is held out by a hash of its name or of what it asks (`is_heldout`); a
text with a long line in common with a held-out one is not trained on. Of facts (capitals, opposites), which cannot be
worked out, the wording is held out.

## Measured on held-out data

Summed log-probability, end of text included. The right answer ranked above three wrong ones of nearly the same length;
{problems} problems, chance 25%:

{answers}

Real continuation above the same text spoiled (30% of the words, or 10% of the letters); {passages} passages, chance
50%:

| spoiled by | real first |
|---|---|
{real}

Digits or words for the same sum, as the system prompt says: {steered} right (chance 50%).

`python tools/pocket_card.py endoreward_fast/pocket` measures this again.
"""


class Judge:
    """Score completions by summed log-probability, in nats, without this package's scoring code."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def _chat(self, messages: list[dict[str, str]], generate: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def _encode(self, prompt: str | list[dict[str, str]], completion: str) -> tuple[list[int], list[int]]:
        """Return the token ids of prompt and completion, with the end token, as text or in the chat template."""
        head, tail = f"{self.tokenizer.bos_token}{prompt}", f"{completion}{self.tokenizer.eos_token}"
        if not isinstance(prompt, str):
            head = self._chat(prompt, True)
            tail = self._chat([*prompt, {"role": "assistant", "content": completion}], False).removeprefix(head)
        return tuple(self.tokenizer([head, tail], add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def scores(self, prompt: str | list[dict[str, str]], completions: list[str]) -> list[float]:
        pairs = [self._encode(prompt, completion) for completion in completions]
        head, tails = pairs[0][0], [tail for _, tail in pairs]
        longest = max(map(len, tails))
        rows = torch.tensor([head + tail + [self.tokenizer.pad_token_id] * (longest - len(tail)) for tail in tails])
        logprob = self.model(rows).logits[:, :-1].float().log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        return [logprob[i, len(head) - 1 : len(head) - 1 + len(tail)].sum().item() for i, tail in enumerate(tails)]

    def picks_first(self, prompt: str | list[dict[str, str]], completions: list[str]) -> bool:
        first, *others = self.scores(prompt, completions)
        return first > max(others)


def evaluate(folder: Path, n: int) -> dict[str, float]:
    """Return held-out accuracies: "task, form" (chance 1/4), "real, corruption" and "steered" (chance 1/2)."""
    judge, hits = Judge(folder), {}
    for problem in problems(n):
        for form in FORMS:
            right = judge.picks_first(problem.prompt(form), problem.completions(form))
            hits.setdefault(f"{problem.task}, {form}", []).append(right)
    for i, passage in enumerate(passages(n)):
        for kind in CORRUPTIONS:
            right = judge.picks_first(passage.prompt, [passage.completion, corrupted(passage.completion, i, kind)])
            hits.setdefault(f"real, {kind}", []).append(right)
    hits["steered"] = []
    for pair in steered(n // 10):
        scores = [judge.scores(p.prompt(), [pair[0].answer, pair[1].answer]) for p in pair]
        hits["steered"] += [scores[0][0] > scores[0][1], scores[1][1] > scores[1][0]]
    measured = {name: sum(each) / len(each) for name, each in hits.items()}
    for form in FORMS:
        every = [hit for task in TASKS for hit in hits[f"{task}, {form}"]]
        measured[f"answers, {form}"] = sum(every) / len(every)
    print(json.dumps(measured, indent=1))
    return measured


def _table(measured: dict[str, float]) -> str:
    lines = ["| task | " + " | ".join(FORMS) + " |", "|---|" + "---|" * len(FORMS)]
    for task in (*TASKS, "answers"):
        name = "**all**" if task == "answers" else task
        lines.append(f"| {name} | " + " | ".join(f"{measured[f'{task}, {form}']:.1%}" for form in FORMS) + " |")
    return "\n".join(lines)


def write_card(folder: Path, n: int) -> None:
    """Measure on `n` held-out problems, and write README.md from the results and training.json."""
    values = json.loads((folder / "training.json").read_text())
    measured = evaluate(folder, n)
    judge = Judge(folder)
    values |= {
        "parameters": f"{judge.model.num_parameters():,}",
        "vocabulary": f"{len(judge.tokenizer):,}",
        "size": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "tokens": f"{values['tokens'] / 1e6:.1f}",
        "problems": n,
        "passages": len(passages(n)),
        "answers": _table(measured),
        "real": "\n".join(f"| {kind.replace('_', ' ')} | {measured[f'real, {kind}']:.1%} |" for kind in CORRUPTIONS),
        "steered": f"{measured['steered']:.1%}",
    }
    (folder / "README.md").write_text(CARD.format_map(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, default=1100)
    options = parser.parse_args()
    write_card(options.folder, options.problems)


if __name__ == "__main__":
    main()
