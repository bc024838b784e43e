"""Statistics from stored logits, compared with logsumexp + gather, log_softmax and torch.compile."""

import pytest

from bench.harness.timing import Case

CASES = [
    Case("logits", "qwen3-0.6b", 512, rounds=21, memory=True),
    Case("logits", "qwen3-0.6b", 512, "bf16", rounds=11, memory=True),
    Case("logits", "qwen3-0.6b", 8, rounds=21, without=("torch.compile",)),
    Case("logits", "llama3-8b", 512, rounds=11, without=("torch.compile",)),
    Case("logits", "gemma3-1b", 512, rounds=11, without=("torch.compile",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits(case, run_and_keep):
    run_and_keep("cpu-logits", case)
