"""GRPO with TRL, rewarded by the policy's own first version: no reward model is trained, and none is downloaded.

    pip install '.[trl]'    # from a clone; Python 3.11
    python examples/grpo_trl.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 100

As it stands it runs on a CPU in seconds, with the embedded model. On a GPU it trains in bfloat16 by itself; for a real
run, raise --steps, --batch, --group (8 to 16) and --max-completion-length, take your own prompts, and let vLLM sample
(GRPOConfig(use_vllm=True)). The sum of token rewards falls with every token, so answers may learn to be short:
--reduction mean does not count the length.
"""

import argparse

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from endoreward_fast.integrations.trl import EndoReward
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a causal language model's name or folder")
    parser.add_argument("--output", default="grpo-out", help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="completions a step, on each device")
    parser.add_argument("--group", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--max-completion-length", type=int, default=16)
    parser.add_argument("--reduction", choices=("sum", "mean"), default="sum")
    args = parser.parse_args()

    policy = str(pocket_path()) if args.model == "pocket" else args.model
    prompts = Dataset.from_list([{"prompt": p.prompt()} for p in problems(64, split="train", tasks=["count"])])
    on_gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch,
        num_generations=args.group, max_completion_length=args.max_completion_length,
        beta=0.01, learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=not on_gpu, bf16=on_gpu,
    )  # fmt: skip
    reward = EndoReward(policy, reduction=args.reduction)  # a copy of the policy, which is not trained
    trainer = GRPOTrainer(policy, reward_funcs=[reward], args=config, train_dataset=prompts)
    trainer.train()
    for log in trainer.state.log_history:
        if "reward" in log:
            print(f"step {log['step']}: mean reward {log['reward']:.2f}, length {log['completions/mean_length']:.1f}")


if __name__ == "__main__":
    main()
