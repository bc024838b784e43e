"""Statistics from hidden states, compared with the bare matmul and with other implementations of the same numbers."""

import pytest

from bench.harness.timing import Case

SLOW = ("F.linear_cross_entropy, chunked",)  # 20 times slower than the others on a CPU, so measured at N=64 only
SAVE_TIME = (*SLOW, "torch.compile")
CASES = [
    Case("linear", "qwen3-0.6b", 512, rounds=15, memory=True, without=SLOW),
    Case("linear", "qwen3-0.6b", 512, "bf16", rounds=15, memory=True, without=SLOW),
    Case("linear", "qwen3-0.6b", 64, rounds=5, memory=True),
    Case("linear", "qwen3-0.6b", 512, "bf16", rounds=7, isa="AVX2", upcast=True, without=SAVE_TIME),
    Case("linear", "qwen3-0.6b", 1, "bf16", rounds=15, without=SAVE_TIME),
    Case("linear", "qwen3-0.6b", 4096, rounds=3, memory=True, without=SAVE_TIME),
    Case("linear", "qwen2.5-0.5b", 512, without=SAVE_TIME),
    Case("linear", "qwen2.5-1.5b", 256, without=SAVE_TIME),
    Case("linear", "qwen2.5-7b", 128, without=SAVE_TIME),
    Case("linear", "qwen3-4b", 128, without=SAVE_TIME),
    Case("linear", "qwen3-8b", 128, without=SAVE_TIME),
    Case("linear", "llama3.2-1b", 256, without=SAVE_TIME),
    Case("linear", "llama3-8b", 128, without=SAVE_TIME),
    Case("linear", "gemma2-2b", 128, without=SAVE_TIME),
    Case("linear", "gemma3-1b", 256, without=SAVE_TIME),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear(case, run_and_keep):
    run_and_keep("cpu-linear", case)
