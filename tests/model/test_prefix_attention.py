"""Attention to one copy of a prefix: what a row's own copy gives, and nothing of the model is changed."""

import pytest
import torch
import torch.nn.functional as F

from endoreward_fast import EndoRewardModel
from endoreward_fast.model.prefix_attention import NeedsCopies, PrefixAttention
from endoreward_fast.scoring.past import Past
from tiny_models import EOS, MODELS, TOKENIZER

SIZE, PREFIXES, PARENTS = 16, (9, 5), [0, 0, 1]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def held(heads, dtype=torch.float32):
    width, lengths = max(PREFIXES), torch.tensor(PREFIXES)
    shape = len(PREFIXES), heads, width, SIZE
    states = torch.zeros(len(PREFIXES), width, 1)
    return Past([drawn(*shape, seed=1, dtype=dtype)], [drawn(*shape, seed=2, dtype=dtype)], states, lengths, lengths)


def visible(own, window):
    """(rows, 1, own, width + own): padding on the left of a prefix is hidden, and so is what lies before the window."""
    width = max(PREFIXES)
    query, key = torch.arange(width, width + own)[:, None], torch.arange(width + own)
    seen = (key <= query) & (key > query - window)
    return torch.stack([seen & (key >= width - PREFIXES[parent]) for parent in PARENTS])[:, None]


def both(own, window=100, heads=(6, 2), dtype=torch.float32):
    """Attention in place, and of every row to a copy in float64."""
    groups = heads[0] // heads[1]
    past = held(heads[1], dtype)
    query = drawn(3, heads[0], own, SIZE, seed=3, dtype=dtype)
    key, value = (drawn(3, heads[1], own, SIZE, seed=n, dtype=dtype) for n in (4, 5))
    with PrefixAttention(past, PARENTS) as attention:
        k, v = attention.cache.update(key, value, 0)
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        found = F.scaled_dot_product_attention(query, k, v, attn_mask=visible(own, window))
    wanted, same = [], []
    for row, parent in enumerate(PARENTS):
        length = PREFIXES[parent]
        k, v = (
            torch.cat([before[0][parent, :, :length], x[row]], 1).repeat_interleave(groups, 0)
            for before, x in ((past.keys, key), (past.values, value))
        )
        mask = visible(own, window)[row, 0, :, max(PREFIXES) - length :]
        q, k, v = query[row : row + 1], k[None], v[None]
        wanted.append(F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask))
        same.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return found, torch.cat(wanted), torch.cat(same)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize("window", [100, 7, 3, 1])
@pytest.mark.parametrize("own", [1, 6, 40])
def test_attention_in_place_is_that_to_a_copy(own, window, heads):
    found, wanted, same = both(own, window, heads)
    assert (found - wanted).abs().max() <= (same - wanted).abs().max() + 1e-6


def test_bfloat16_is_no_further_from_float64_than_attention_to_a_copy():
    found, wanted, same = both(40, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).square().mean() <= (same - wanted).square().mean()


def test_attention_without_a_cache_is_left_alone():
    query, key, value = (drawn(3, 2, 4, SIZE, seed=n) for n in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with PrefixAttention(held(2), PARENTS):
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, is_causal=True), expected)


def test_attention_of_another_kind_is_refused():
    key = drawn(3, 2, 4, SIZE)
    with pytest.raises(NeedsCopies), PrefixAttention(held(2), PARENTS) as attention:
        attention.cache.update(key, key, 0)  # nothing attends
    for mask in (torch.zeros(3, 1, 4, 13), torch.ones(3, 1, 4, 4, dtype=torch.bool)):  # a bias; the own tokens only
        with pytest.raises(NeedsCopies, match="mask"), PrefixAttention(held(2), PARENTS) as attention:
            F.scaled_dot_product_attention(key, *attention.cache.update(key, key, 0), attn_mask=mask)


def ids(count, seed):
    return drawn(count, seed=seed).argsort().tolist()


@pytest.fixture(scope="module")
def rows():
    return [{"prompt_ids": ids(60, 1), "completion_ids": [*ids(9, n), EOS]} for n in range(2, 11)]


def test_a_model_reads_rows_behind_one_copy_and_stays_as_it_was(rows):
    scorer = EndoRewardModel(MODELS["llama"](), TOKENIZER)
    wanted = [scorer.score([row])[0].score for row in rows]
    seen, config = [], scorer.model.config.to_json_string()
    scorer.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(kwargs["input_ids"]), kwargs.get("past_key_values"))), with_kwargs=True
    )
    found = [result.score for result in scorer.score(rows)]
    assert found == pytest.approx(wanted, abs=1e-4)
    count, cache = seen[-1]
    assert count == len(rows) and cache.layers[0].keys.shape[0] == 1
    assert scorer.model.config.to_json_string() == config
    assert scorer.model.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_is_replaced_later_reads_behind_copies(rows):
    scorer = EndoRewardModel(MODELS["llama"](), TOKENIZER)
    wanted = [result.score for result in scorer.score(rows)]
    scorer.model.set_attn_implementation("eager")
    assert [result.score for result in scorer.score(rows)] == pytest.approx(wanted, abs=1e-4)
