"""Scores of the embedded model: against the oracle on a conversation, under a system prompt, and text against noise."""

import math

import pytest

from endoreward_fast import EndoRewardModel
from tiny_models import expected_score


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


def test_a_conversation_scores_as_the_oracle_says(pocket):
    messages = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
    (result,) = pocket.score([{"messages": messages}], per_token=True)
    text = pocket.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    before = pocket.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*before, *result.tokens.ids]
    score, logprob = expected_score(pocket, ids, len(before))
    assert math.isclose(result.score, score, rel_tol=1e-4, abs_tol=1e-3)
    assert math.isclose(result.logprob, logprob, rel_tol=1e-4, abs_tol=1e-3)
    assert "".join(result.tokens.texts) == " 5" + pocket.tokenizer.eos_token  # the template starts a turn with a space


def test_a_system_prompt_changes_the_score(pocket):
    row = {"prompt": "What is 2 + 3?", "completion": "5"}
    plain, steered = pocket.score([row]), pocket.score([row], system="Answer in one word.")
    assert plain[0].score != steered[0].score


def test_text_beats_noise(pocket):
    ranked = pocket.rank("The function returns the number of", [" items in the list.", " qzx vjk wq pzzt."], chat=False)
    assert ranked[0].index == 0
