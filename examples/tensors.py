"""Rewards, log-probabilities and entropies from hidden states, in a training loop of your own. No logits are written.

    python examples/tensors.py --model Qwen/Qwen2.5-0.5B-Instruct

The loop fine-tunes on question and answer pairs: the loss is the negative log-probability of the answer's tokens, and
the same pass gives their reward and entropy. `linear_token_rewards` is differentiable in all of its outputs.
It wants the head as arguments: pass `bias`, `logit_scale` and `softcap` where the model has them (Gemma 2 has a
softcap, Cohere a scale). `EndoRewardModel(model)` finds them by itself.
"""

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from endoreward_fast import linear_token_rewards, sequence_score
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a causal language model's name or folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = pocket_path() if args.model == "pocket" else args.model
    model = AutoModelForCausalLM.from_pretrained(path).to(device)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    quiz = problems(args.steps * args.batch, split="train")
    for step in range(args.steps):
        batch = quiz[step * args.batch : (step + 1) * args.batch]
        questions = [f"Question: {p.question}\nAnswer:" for p in batch]
        answers = [f" {p.answer}{tokenizer.eos_token}" for p in batch]
        # Each part is tokenized alone, so that it is known where the answer begins. Special tokens lead the question.
        asked, given = tokenizer(questions)["input_ids"], tokenizer(answers, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*q, *a]) for q, a in zip(asked, given, strict=True)]
        tokens = pad_sequence(rows, batch_first=True).to(device)  # padding needs no mask: it comes after the answer
        place = torch.arange(tokens.shape[1], device=device)
        start = torch.tensor([len(q) for q in asked], device=device)[:, None]
        end = torch.tensor([len(row) for row in rows], device=device)[:, None]
        answer = (place >= start) & (place < end)

        hidden = model.base_model(tokens).last_hidden_state  # (B, T, D), what the head reads
        out = linear_token_rewards(hidden, model.get_output_embeddings().weight, tokens, mask=answer, entropy=True)
        loss = -out.logprob[answer].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reward, entropy = sequence_score(out.reward.detach(), answer).mean(), out.entropy[answer].mean()
        print(f"step {step + 1}: loss {loss:.3f}, reward of an answer {reward:.2f}, entropy of a token {entropy:.3f}")


if __name__ == "__main__":
    main()
