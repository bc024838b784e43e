r"""`python -m bench.paper.math`: the paper's RL experiment, for a machine with its weights and a GPU.

Li et al. (arXiv 2506.23235) train Qwen2.5-Math-7B on MATH with its own endogenous reward and a KL penalty of 0.01. The
average over five mathematics benchmarks rises from 33.0 to 38.8. This command does that training with TRL's GRPOTrainer
and EndoReward. It measures greedy accuracy on a test set before and after, judged by math-verify
(trl.rewards.accuracy_reward):

    python -m bench.paper.math --model Qwen/Qwen2.5-Math-7B --train DigitalLearningGmbH/MATH-lighteval \
        --test HuggingFaceH4/MATH-500 --lora 64 --rate 1e-5

--lora trains adapters, which fit on one 80 GB GPU beside the reward model. The paper trained all weights. The command
has been run with the embedded model only, not at the paper's size.
Data sets are names on the Hugging Face hub or JSON Lines files, with `problem` and `solution` in every row.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

INSTRUCTION = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def rows_of(name: str, split: str, limit: int | None):
    """Return a Dataset with the columns prompt (messages) and solution."""
    from datasets import load_dataset

    local = Path(name).suffix in (".json", ".jsonl")
    found = load_dataset("json", data_files=name, split="train") if local else load_dataset(name, split=split)
    missing = {"problem", "solution"} - set(found.column_names)
    if missing:
        raise SystemExit(f"{name} has no column {', '.join(sorted(missing))}: it has {', '.join(found.column_names)}")
    found = found.select(range(min(len(found), limit or len(found))))
    asked = [[{"role": "user", "content": INSTRUCTION.format(problem=row["problem"])}] for row in found]
    return found.select_columns(["solution"]).add_column("prompt", asked)


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: Any, rows: Any, length: int, batch: int) -> float:
    """Return the share of greedy answers that math-verify accepts, among rows whose solution it can parse."""
    from trl.rewards import accuracy_reward

    model.eval()
    judged: list[float | None] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        asked = tokenizer.apply_chat_template(
            part["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        ).to(model.device)  # fmt: skip
        ids = model.generate(**asked, do_sample=False, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        judged += accuracy_reward([[{"role": "assistant", "content": text}] for text in said], part["solution"])
    known = [value for value in judged if value is not None]
    if not known:
        raise SystemExit("math-verify can read none of the test set's solutions: write the answers as \\boxed{...}")
    return sum(known) / len(known)


def trainer_of(args: argparse.Namespace):
    """Build a GRPOTrainer whose reward is the endogenous reward of the initial model."""
    import trl

    from endoreward_fast.integrations.trl import EndoReward

    adapters = None
    if args.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = trl.GRPOConfig(
        output_dir=str(args.out), max_steps=args.steps, beta=0.01, learning_rate=args.rate, temperature=1.0,
        per_device_train_batch_size=args.batch, num_generations=args.group, max_completion_length=args.length,
        gradient_accumulation_steps=args.accumulate, seed=args.seed, logging_steps=1, save_strategy="no", report_to=[],
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    rows = rows_of(args.train, "train", None)
    return trl.GRPOTrainer(
        args.model, reward_funcs=[EndoReward(args.model)], args=settings, train_dataset=rows, peft_config=adapters
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m bench.paper.math", description=__doc__.splitlines()[0])
    found.add_argument("--model", required=True, help="name or folder")
    found.add_argument("--train", required=True, help="data set with problem and solution (the solutions are not used)")
    found.add_argument("--test", required=True, help="data set with problem and solution")
    found.add_argument("--limit", type=int, help="use only this many rows of the test set")
    found.add_argument("--steps", type=int, default=200)
    found.add_argument("--batch", type=int, default=16, help="answers in a forward pass")
    found.add_argument("--accumulate", type=int, default=8, help="forward passes in a step")
    found.add_argument("--group", type=int, default=8, help="answers to a question")
    found.add_argument("--length", type=int, default=2048, help="maximum number of tokens of an answer")
    found.add_argument("--rate", type=float, default=1e-6, help="learning rate (adapters: try 1e-5)")
    found.add_argument("--lora", type=int, help="train adapters of this rank (needs peft); default: all weights")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", type=Path, default=Path("paper-math"), help="folder for the model and result.json")
    return found


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    test, trainer = rows_of(args.test, "test", args.limit), trainer_of(args)
    found = {"rows": len(test)}
    for when in ("before", "after"):
        found[when] = accuracy(trainer.model, trainer.processing_class, test, args.length, args.batch)
        print(f"{when}: {100 * found[when]:.1f}% of {len(test)} right", flush=True)
        if when == "before":
            trainer.train()
    trainer.save_model()
    record = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "results": found,
        "log": trainer.state.log_history,
    }
    (args.out / "result.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
