"""Rows and options that a server has to score as the model in this process does."""

import numpy as np
import pytest
import torch

USER = {"role": "user", "content": "What is 2 + 3?"}
ROWS = [
    {"prompt": "What is 2 + 3?", "completion": "5"},
    {"prompt": "What is 2 + 3?", "completion": ""},
    {"messages": [USER, {"role": "assistant", "content": "6"}]},
    {"prompt": [USER], "completion": "5"},
    {"prompt": [], "completion": [{"role": "assistant", "content": "5"}]},
    {"prompt": "2 + 3 =", "completion": " 5", "chat": False},
    {"prompt_ids": [5, 6, 7], "completion_ids": (8, 9), "terminal": False},
    {"prompt_ids": torch.tensor([5, 6, 7]), "completion_ids": np.array([8, 9, 10]), "completion_mask": [1, 0, 1]},
    {"prompt_ids": [5], "completion_ids": []},
    {"prompt_ids": [5], "completion_ids": [10**6]},
    {"prompt": "p", "completion": 5},
    {"prompt": "p"},
    {"prompt": "p", "completion": "c", "chosen": "a column of data", "rejected": "that scoring does not read"},
    "no row",
]
OPTIONS = [
    {"alpha": 2.0, "reduction": "mean", "gamma": 0.9, "floor": 0.1},
    {"chat": False},
    {"system": "Be brief.", "append_eos": False},
    {"max_length": 12, "truncate": "completion", "date": "2026-01-02"},
    {"alpha": np.float32(1.5), "max_tokens_per_batch": None, "reference": None},
]


def close(found, wanted):
    """Check that results are equal, but for the rounding of another batch."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.score == (None if other.score is None else pytest.approx(other.score, abs=1e-4))
        assert (one.num_tokens, one.flags, one.error) == (other.num_tokens, other.flags, other.error)
