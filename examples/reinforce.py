"""REINFORCE in plain PyTorch: a policy learns from the rewards that its own first version gives to each token.

    python examples/reinforce.py --model pocket --steps 16

The questions are the embedded model's: put yours in their place. The reward rises, and so do right answers, as long as
the model believes in them: the reward sharpens what it believes, right or wrong. examples/README.md has figures.
"""

import argparse

import torch

from endoreward_fast import EndoRewardModel, rewards_to_go, sequence_score, terminal_at
from endoreward_fast.pocket.quiz import problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a causal language model with a chat template")
    for name, default in {"steps": 16, "questions": 8, "group": 8, "lr": 1e-4, "kl": 0.01, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    policy = EndoRewardModel.from_pretrained(args.model)
    frozen = EndoRewardModel.from_pretrained(args.model).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    quiz = [problem for problem in problems(args.questions, args.seed, tasks=["count"]) for _ in range(args.group)]
    policy.tokenizer.padding_side = "left"
    prompts = policy.tokenizer.apply_chat_template(
        [p.prompt() for p in quiz], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(policy.device)
    start = prompts["input_ids"].shape[1]

    for step in range(args.steps):
        ids = policy.model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=4)
        answer = torch.arange(ids.shape[1], device=ids.device) >= start
        ends = terminal_at(ids, answer.expand(ids.shape), policy.eos_ids)
        answer = answer & (ends.cumsum(1) == ends)  # an answer goes to its first end, and padding follows
        attended = torch.cat([prompts["attention_mask"], answer[:, start:]], 1)

        # Rewards and the KL term's reference in one forward. Without an end, the last state's value is counted.
        reference = frozen(ids, attended, answer, terminal=ends)
        logprob = policy(ids, attended, answer, terminal=ends).logprob
        reward = reference.reward - args.kl * (logprob.detach() - reference.logprob)
        to_go, going = (x.unflatten(0, (-1, args.group)) for x in (rewards_to_go(reward, answer), answer))
        baseline = to_go.sum(1, keepdim=True) / going.sum(1, keepdim=True).clamp(min=1)  # of the answers that go on
        advantage = ((to_go - baseline) * going).flatten(0, 1)
        loss = -(advantage / advantage[answer].std() * logprob).sum() / len(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        texts = policy.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        right = sum(text.strip() == p.answer for text, p in zip(texts, quiz, strict=True)) / len(quiz)
        mean = sequence_score(reference.reward, answer).mean()
        print(f"step {step + 1:2}: mean reward of an answer {mean:.2f}, right answers {right:.0%}")


if __name__ == "__main__":
    main()
