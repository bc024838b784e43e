"""`python -m bench.one_forward`: time rewards and reference log-probabilities from one forward and from two.

GRPO with a KL term runs a frozen reference model over every completion. The endogenous reward model is the same frozen
policy, so one forward can serve both. This script times a batch of completions on the CPU with random weights of
Qwen3-0.6B's shape, with separate forwards and with a shared one. Writes bench/results/one-forward.json.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from bench.harness import timing
from endoreward_fast import EndoRewardModel

LAYERS, ROWS, PROMPT, COMPLETION = 28, 4, 64, 128


def build(layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def jobs(model: Qwen3ForCausalLM, rows: int, prompt: int, completion: int) -> dict:
    """Return {name: call}; the first is the baseline. Exit if their log-probabilities differ."""
    scorer = EndoRewardModel(model)
    add_fused_lm_head(model)
    ids = torch.randint(0, 151936, (rows, prompt + completion), generator=torch.Generator().manual_seed(1))
    scored = (torch.arange(prompt + completion) >= prompt).expand(rows, -1)
    labels = ids.masked_fill(~scored, -100)
    attended, terminal = torch.ones_like(ids), torch.zeros_like(scored)

    def theirs():
        """Return the reference log-probabilities as GRPOTrainer computes them."""
        return model(input_ids=ids, attention_mask=attended, labels=labels, fused_lm_head=True).log_probs

    def ours():
        return scorer.rewards_of_padded(ids, scored, terminal, attention_mask=attended)

    gap = (theirs()[:, -completion:] - ours().logprob[:, -completion:]).abs().max().item()
    if gap > 1e-3:
        raise SystemExit(f"the two log-probabilities differ by {gap}: nothing was timed")
    return {
        "TRL's reference, then the reward": lambda: (theirs(), ours()),
        "the same pass twice": lambda: (ours(), ours()),
        "one pass for both": ours,
    }


def run(layers: int, rows: int, prompt: int, completion: int, rounds: int, folder: Path) -> Path:
    with torch.inference_mode():
        calls = jobs(build(layers), rows, prompt, completion)
        times = timing.interleave(calls, rounds)
    first = next(iter(calls))
    found = {name: timing.spread(t, times[first]) for name, t in times.items()}
    for name, s in found.items():
        quartiles = f"{s['ratio_low']:.2f}-{s['ratio_high']:.2f}"
        print(f"{name:34}{s['median_s']:8.2f} s  {s['ratio']:6.3f} of the first  quartiles {quartiles}")
    case = {"layers": layers, "rows": rows, "prompt": prompt, "completion": completion, "rounds": rounds}
    return timing.write("one-forward", timing.environment(), [case | {"baseline": first, "peers": found}], folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    print(run(args.layers, ROWS, PROMPT, COMPLETION, args.rounds, args.out))
