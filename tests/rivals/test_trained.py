"""Trained reward models that read common prefixes once."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from endoreward_fast.rivals.reward_model import RewardModel
from tiny_models import SIZES, TOKENIZER


@pytest.mark.parametrize("ends", ["!", " yes!", "!!"])
def test_a_shared_row_that_ends_with_the_padding_token_scores_as_it_does_alone(ends):
    torch.manual_seed(0)
    pad = TOKENIZER("!")["input_ids"][0]
    config = LlamaConfig(**SIZES | {"num_labels": 1, "pad_token_id": pad})
    scorer = RewardModel(AutoModelForSequenceClassification.from_config(config), TOKENIZER)
    prompt = "What is the sum of 2 and 3, dear machine?"
    rows = [{"prompt": prompt, "completion": text} for text in (" 5", ends, "", " no")]
    alone = [scorer.score([row])[0].score for row in rows]
    assert [found.score for found in scorer.score(rows)] == pytest.approx(alone, abs=1e-4)


def test_a_classifier_that_scores_a_padding_token_at_the_end_is_read_whole():
    """transformers scores the last token before it."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_labels": 1, "pad_token_id": 33})
    model = AutoModelForSequenceClassification.from_config(config).eval()

    def last_token(module, args, given, found):
        states = model.base_model(input_ids=given["input_ids"]).last_hidden_state
        found.logits = model.score(states[:, -1])

    scorer = RewardModel(model, TOKENIZER)
    assert scorer.head.linear
    model.register_forward_hook(last_token, with_kwargs=True)
    assert not RewardModel(model, TOKENIZER).head.linear
