"""EndoRewardModel.forward against the oracle on the model's full logits, on tiny random models."""

import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel, terminal_at
from endoreward_fast.head.head import without_cache
from endoreward_fast.vocab.reference import token_rewards as oracle
from tiny_models import EOS, MODELS, PAD, TOKENIZER, VOCAB, alone, build, random_rows, same


@pytest.fixture(scope="module", params=MODELS)
def scorer(request):
    return EndoRewardModel(MODELS[request.param](), TOKENIZER)


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


@torch.no_grad()
def test_forward_equals_the_oracle_on_full_logits(scorer):
    (ids,) = random_rows(17)
    mask = torch.arange(17) >= 5
    for options in ({}, {"entropy": True}, {"alpha": 0.5}, {"terminal": torch.zeros(1, 17, dtype=torch.bool)}):
        same(scorer(ids[None], **options), alone(scorer, ids, **options))
        same(scorer(ids[None], completion_mask=mask[None], **options), alone(scorer, ids, mask=mask[None], **options))
    assert scorer.head.linear


@torch.no_grad()
def test_a_head_that_is_not_linear_is_read_through_full_logits(llama):
    (ids,) = random_rows(9)
    model = MODELS["llama"]()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Softplus())
    with pytest.warns(UserWarning, match="full logits"):
        other = EndoRewardModel(model)
    assert not other.head.linear
    same(other(ids[None], entropy=True), alone(other, ids, entropy=True))


def padded(rows, side):
    width = max(len(row) for row in rows) + 2
    ids = torch.full((len(rows), width), PAD)
    attended = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        attended[i, start : start + len(row)] = 1
    return ids, attended


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(scorer, side):
    rows = random_rows(5, 19, 11, 2)
    ids, attended = padded(rows, side)
    for row_mask in (None, torch.ones_like(ids, dtype=torch.bool)):  # the second mask includes padding
        rewards = scorer(ids, attended, row_mask)
        for i, row in enumerate(rows):
            same(type(rewards)(*(f[i][attended[i].bool()][None] for f in rewards[:3]), None), alone(scorer, row))
        assert all((field[~attended.bool()] == 0).all() for field in rewards[:3])


@torch.no_grad()
def test_position_ids_of_left_padded_rows_may_be_given(scorer):
    ids, attended = padded(random_rows(5, 9), "left")
    positions = (attended.cumsum(1) - 1).masked_fill(attended == 0, 1)  # as in Hugging Face's generate
    same(scorer(ids, attended, position_ids=positions), scorer(ids, attended))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_rows_equal_their_separate_sequences(family):
    scorer = EndoRewardModel(MODELS[family](), TOKENIZER)
    rows = random_rows(5, 12, 1, 7)
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    rewards = scorer(ids, position_ids=positions, entropy=True)
    parts = [field[0].split([len(row) for row in rows]) for field in rewards]
    for i, row in enumerate(rows):
        same(type(rewards)(*(part[i][None] for part in parts)), alone(scorer, row, entropy=True))
    # the same with an attention mask, with padding between and after the sequences, and with two such rows
    gap = [torch.full((2,), PAD)]
    pads, zeros = [rows[0], *gap, rows[1], *gap], torch.zeros(2, dtype=torch.long)
    more = torch.cat(pads)[None].expand(2, -1)
    attended = torch.cat([torch.full((len(p),), int(p[0] != PAD)) for p in pads])[None].expand(2, -1)
    positions = torch.cat([torch.arange(5), zeros + 5, torch.arange(12), zeros])[None]
    again = scorer(more, attended, position_ids=positions)
    for row in again.reward:
        assert torch.allclose(row[:5], parts[0][0], atol=1e-4) and torch.allclose(row[7:19], parts[0][1], atol=1e-4)
        assert not row[5:7].any() and not row[19:].any()


@torch.no_grad()
def test_a_packed_sequence_may_begin_at_position_one_after_padding():
    scorer = EndoRewardModel(MODELS["llama"]())
    one, two = random_rows(4, 5)
    ids = torch.cat([one, torch.tensor([PAD]), two])[None]
    attended = (ids != PAD).long()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    positions[0, 2:4] = torch.tensor([0, 1])
    rewards = scorer(ids, attended, position_ids=positions).reward
    assert torch.allclose(rewards[0, 5:], alone(scorer, two).reward[0], atol=1e-4)


def test_models_that_cannot_keep_sequences_apart_are_refused():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = EndoRewardModel(AutoModelForCausalLM.from_config(config))
    ids = torch.cat(random_rows(4, 5))[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(EndoRewardError, match=r"'mamba'.*packed row apart"):
        scorer(ids, position_ids=positions)
    scorer(ids, position_ids=torch.arange(9)[None])  # one sequence is accepted


def test_models_that_need_padding_on_the_right_are_refused():
    model = MODELS["gpt2"]()
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None: forward(input_ids=input_ids, attention_mask=attention_mask)
    scorer = EndoRewardModel(model)
    (ids,) = random_rows(6)
    attended = torch.ones(1, 6, dtype=torch.long)
    whole = scorer(ids[None], attended)  # no padding on the left: accepted
    same(whole, alone(scorer, ids))
    attended[0, 0] = 0
    with pytest.raises(EndoRewardError, match="pad on the right"):
        scorer(ids[None], attended)


def test_gradients_equal_those_of_full_logits(scorer):
    (ids,) = random_rows(8)
    weight = [p for p in scorer.model.parameters() if p.ndim == 2][-1]
    embedding = scorer.model.get_input_embeddings().weight

    def gradient(rewards):
        loss = (rewards.reward * torch.arange(8.0)).sum() + rewards.entropy.sum() + rewards.logprob[0, 3]
        return torch.autograd.grad(loss, (weight, embedding))

    ours = gradient(scorer(ids[None], entropy=True))
    logits = scorer.model(input_ids=ids[None], **without_cache(scorer.model)).logits
    for a, b in zip(ours, gradient(oracle(logits, ids[None], entropy=True)), strict=True):
        assert b.abs().max() > 1e-3 and (a - b).abs().max() <= 1e-4 * b.abs().max()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest output of any operation."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def test_logits_never_exist():
    vocab, batch, length = 16384, 2, 48
    model = build(LlamaConfig, vocab_size=vocab, tie_word_embeddings=False)
    scorer = EndoRewardModel(model)
    ids = torch.stack(random_rows(length, length))
    weights = max(p.numel() for p in model.parameters())
    assert weights < batch * length * vocab  # otherwise the bound below would prove nothing
    with Largest() as seen:
        rewards = scorer(ids)
    assert seen.numel <= weights
    rewards.reward.sum().backward()
    with Largest() as eager, torch.no_grad():
        model(input_ids=ids)
    assert eager.numel >= batch * length * vocab  # the recorder does see logits if there are any


def test_default_mask_and_terminal(llama):
    """All tokens but the first are scored, and the episode ends with the last. Each run of a mask ends an episode."""
    (ids,) = random_rows(8)
    with torch.no_grad():
        rewards = llama(ids[None])
        assert (rewards.value[0] != 0).tolist() == [False] + [True] * 7
        total = rewards.logprob.sum() + rewards.value[0, 1]  # sum r = sum log pi + V(s_1)
        assert math.isclose(rewards.reward.sum(), total, rel_tol=1e-5)
        ids[4] = EOS
        mask = torch.ones(1, 8, dtype=torch.bool)
        ends = terminal_at(ids[None], mask, EOS)
        same(llama(ids[None], terminal=ends), alone(llama, ids, terminal=ends))


def test_integer_masks_are_accepted_and_wrong_shapes_are_named(llama):
    ids = torch.stack(random_rows(6, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]] * 2)
    with torch.no_grad():
        assert torch.equal(llama(ids, completion_mask=mask).reward, llama(ids, completion_mask=mask.bool()).reward)
    for options, name in (
        ({"completion_mask": mask[:, 2:]}, "completion_mask"),
        ({"attention_mask": mask[:1]}, "attention_mask"),
        ({"terminal": mask.bool()[0]}, "terminal"),
        ({"position_ids": torch.zeros(3, 2, 6, dtype=torch.long)}, "position_ids"),
    ):
        with pytest.raises(ValueError, match=rf"{name} (is )?\("):
            llama(ids, **options)
    with pytest.raises(ValueError, match=r"input_ids is \(6,\)"):
        llama(ids[0])
