"""bench.parts: its parts add up, and its counts of work are those of the formulas."""

import pytest
import torch

from bench import parts

ROWS = [
    {"prompt": "What is the capital of France?", "completion": answer} for answer in ("Paris.", "Rome, I believe.", "")
]


@pytest.fixture(scope="module")
def scorer():
    return parts.load("pocket", "float32")


def test_parts_add_up(scorer):
    found = parts.case("pocket", "float32", scorer, ROWS, rounds=1)
    assert tuple(found["parts"]) == parts.PARTS
    assert sum(cell["share"] for cell in found["parts"].values()) == pytest.approx(1)
    for part in ("tokenize", "matmul", "attention", "elementwise", "head"):
        assert found["parts"][part]["seconds"] > 0, part
    text = parts.table(found)
    assert all(part in text for part in parts.PARTS)


def test_work_is_counted(scorer):
    ready = scorer.encode(ROWS[:1])
    scorer.states = 0
    products, attention, moved = parts.work_of(scorer, ready)
    # One row whose last token ends it: after that token no state is needed, but a row alone is read whole.
    tokens = len(ready[0].input_ids)
    weights = sum(m.weight.numel() for m in scorer.model.base_model.modules() if isinstance(m, torch.nn.Linear))
    assert products == 2 * tokens * weights
    config = scorer.model.config
    pairs = tokens * (tokens + 1) // 2
    assert attention == 4 * pairs * config.num_hidden_layers * config.hidden_size
    assert moved > 0
    assert scorer.states == ready[0].num_scored  # V(s') of the last token is 0
