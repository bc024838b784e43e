"""Best of N: sample completions from a causal language model, rank them by its own reward, print the best.

    python examples/best_of_n.py "What is the capital of France?" --n 8 --model Qwen/Qwen2.5-0.5B-Instruct

The token ids are scored as they were sampled, so nothing is tokenized twice. With the sum, completions of one prompt
are ranked as by their log-probability, which prefers short ones; --reduction mean divides by the length.
"""

import argparse

import torch

from endoreward_fast import EndoRewardModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="Count the a in: a b a a b")
    parser.add_argument("--model", default="pocket", help="a causal language model's name or folder")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--reduction", choices=("sum", "mean"), default="sum")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    scorer = EndoRewardModel.from_pretrained(args.model)
    tokenizer = scorer.tokenizer
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": args.prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        prompt = tokenizer(args.prompt, return_tensors="pt")
    sampled = scorer.model.generate(
        **prompt.to(scorer.device), do_sample=True, temperature=args.temperature, top_k=0,
        num_return_sequences=args.n, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip

    rows = []
    for ids in sampled[:, prompt["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(ids) if token in scorer.eos_ids), None)
        completion = ids if end is None else ids[: end + 1]  # what follows the end is padding
        # A completion that max_new_tokens cut off is not terminal: the value of its last state is counted.
        row = {"prompt_ids": prompt["input_ids"][0], "completion_ids": completion, "terminal": end is not None}
        rows.append(row)
    scores = [result.score for result in scorer.score(rows, reduction=args.reduction)]
    texts = [tokenizer.decode(row["completion_ids"], skip_special_tokens=True) for row in rows]
    ranking = sorted(zip(scores, texts, strict=True), reverse=True)
    for score, text in ranking:
        print(f"{score:9.2f}  {text!r}")
    print(f"best: {ranking[0][1]}")


if __name__ == "__main__":
    main()
