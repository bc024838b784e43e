"""A vocabulary split over 2, 3 and 4 real processes (shard_ranks.py) against the whole one, to the error budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import endoreward_fast as er
import shard_ranks
from endoreward_fast import reference
from shard_ranks import HEADS, PADDED, VOCAB, WORLDS, data, rows_of
from tiny_models import ROWS, TOKENIZER, random_rows

WORLD = pytest.mark.parametrize("world", WORLDS)
F64 = torch.float64


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{world: [each rank's results]}"""
    folder = tmp_path_factory.mktemp("shards")
    script = Path(shard_ranks.__file__)
    path = os.pathsep.join([str(script.parent), str(script.parents[1])])
    ran = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in WORLDS}


def whole(name, world, dtype):
    """Statistics and gradients of the whole head by the oracle's formulas."""
    hidden, weight, bias, targets, mask, upstream, options = data(name, world)
    h, w, b = (None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    out = reference.linear_vocab_stats(
        h, w[:VOCAB], targets, mask=mask, bias=None if b is None else b[:VOCAB], entropy=True, logit_mean=True,
        dtype=dtype, **options,
    )  # fmt: skip
    alive = out.lse.isfinite() & mask
    sum(
        (torch.where(alive & f.isfinite(), f, 0.0) * g.to(dtype)).sum() for f, g in zip(out, upstream, strict=True)
    ).backward()
    return out, [None if x is None else x.grad for x in (h, w, b)]


@WORLD
@pytest.mark.parametrize("name", HEADS)
def test_every_rank_has_the_whole_vocabularys_statistics(name, world, found, assert_within_budget):
    oracle, eager = whole(name, world, F64)[0], whole(name, world, torch.float32)[0]
    # A mean over the vocabulary is a sum of logits: it rounds at their size, not at its own.
    scale = {"logit_mean": 3e4 if "offset" in name else 20.0, "entropy": 5.0}
    for rank in found[world]:
        for field, ours in zip(oracle._fields, rank[name]["out"], strict=True):
            finite = getattr(oracle, field)
            if field == "logit_mean" and "inf" in name:
                assert (ours == finite.float()).all()  # -inf: a vocabulary with an entry that is ruled out has no mean
                continue
            assert_within_budget(ours, getattr(eager, field), finite, scale=scale.get(field, 1.0), name=field)
        for first, other in zip(found[world][0][name]["out"], rank[name]["out"], strict=True):
            assert torch.equal(first, other)  # bitwise, so that ranks cannot drift apart


@WORLD
@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_the_whole_heads(name, world, found):
    _, (hidden, weight, bias) = whole(name, world, F64)
    for r, rank in enumerate(found[world]):
        part = rows_of(r, world)
        wanted = (hidden, weight[part], None if bias is None else bias[part])
        for ours, oracle in zip(rank[name]["grads"], wanted, strict=True):
            if oracle is not None:
                size = 3e-2 if "offset" in name else 2e-5  # an offset of 3e4 leaves 3 digits of a softmax in float32
                torch.testing.assert_close(ours.double(), oracle, rtol=size, atol=size)


@WORLD
def test_rewards_and_their_gradients(world, found, assert_within_budget):
    hidden, weight, _, _, _, upstream, _ = data("plain", world)
    first = found[world][0]["rewards"]
    h, w = hidden[:12].view(2, 6, -1).double().requires_grad_(), weight[:VOCAB].double().requires_grad_()
    options = {"mask": first["mask"], "entropy": True, "alpha": 0.7}
    oracle = reference.linear_token_rewards(h, w, first["tokens"], dtype=F64, **options)
    sum((f * g[:12].view(2, 6)).sum() for f, g in zip(oracle, upstream, strict=True)).backward()
    eager = reference.linear_token_rewards(hidden[:12].view(2, 6, -1), weight[:VOCAB], first["tokens"], **options)
    for r, rank in enumerate(found[world]):
        for ours, same_dtype, exact in zip(rank["rewards"]["out"], eager, oracle, strict=True):
            assert_within_budget(ours, same_dtype, exact, scale=20.0)
        torch.testing.assert_close(rank["rewards"]["grads"][0].double(), h.grad, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(
            rank["rewards"]["grads"][1].double(), w.grad[rows_of(r, world)], rtol=2e-5, atol=2e-5
        )


@WORLD
def test_a_dtensor_knows_its_own_shard(world, found, assert_within_budget):
    oracle, (hidden, weight, _) = whole("plain", world, F64)
    eager = whole("plain", world, torch.float32)[0]
    for rank in found[world]:
        for field, ours in zip(oracle._fields, rank["dtensor"]["out"], strict=True):
            assert_within_budget(ours, getattr(eager, field), getattr(oracle, field), scale=20.0, name=field)
        torch.testing.assert_close(rank["dtensor"]["lse"].double(), oracle.lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["dtensor"]["grads"][0].double(), hidden, rtol=2e-5, atol=2e-5)
        gradient = rank["dtensor"]["grads"][1]
        torch.testing.assert_close(gradient.double(), weight, rtol=2e-5, atol=2e-5)
        assert gradient.shape == (PADDED, shard_ranks.DIM) and (gradient[VOCAB:] == 0).all()
        assert rank["dtensor"]["agreed"] == "rank 1 sees other logits"  # or one would gather and another not
        said = rank["dtensor"]["said"]
        assert "split over one mesh dimension by vocabulary, Shard(0), and not by its width" in said["by width"]
        assert "leave `shard` out" in said["both"] and "expected the same on every rank" in said["hidden"]


@WORLD
def test_one_gather_and_one_sum_of_a_few_numbers_a_row(world, found):
    """In float32, whatever the hidden states are."""
    for rank in found[world]:
        for sent in rank["traffic"].values():
            assert sent == [
                ("all_gather", 7 * shard_ranks.ROWS, "torch.float32"),
                ("all_reduce", shard_ranks.ROWS * shard_ranks.DIM, "torch.float32"),
            ]
        assert len(rank["traffic"]) == 2


@WORLD
def test_a_group_of_some_ranks_shares_a_head(world, found, assert_within_budget):
    oracle, (hidden, weight, _) = whole("plain", 2, F64)
    eager = whole("plain", 2, torch.float32)[0]
    assert [rank["group"] is None for rank in found[world]] == [True] * (world - 2) + [False] * 2
    for r, rank in enumerate(found[world][-2:]):
        for field, ours in zip(oracle._fields, rank["group"]["out"], strict=True):
            assert_within_budget(ours, getattr(eager, field), getattr(oracle, field), scale=20.0, name=field)
        torch.testing.assert_close(rank["group"]["grads"][0].double(), hidden, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(rank["group"]["grads"][1].double(), weight[rows_of(r, 2)], rtol=2e-5, atol=2e-5)


@WORLD
def test_what_is_wrong_is_said_on_every_rank_alike(world, found):
    if found[world][0]["refused"] is None:
        pytest.skip("on a device nothing raises: such rows are NaN")
    for rank in found[world]:
        said = rank["refused"]
        assert (
            said["outside"] == f"IndexError: target {VOCAB} at row 0 is outside the vocabulary's shards, {VOCAB} rows"
        )
        assert "shards of the vocabulary: they overlap" in said["overlap"]
        assert "reads a whole head, and this one is sharded" in said["reference"]


def test_a_tensor_parallel_model_is_read_shard_by_shard(found):
    """transformers' tp_plan="auto"; at load every rank checks its own rows against the model's own logits."""
    if "model" not in found[2][0]:
        pytest.skip("shown on the CPU")
    scorer = er.EndoRewardModel(shard_ranks.uneven(), TOKENIZER)
    with torch.no_grad():
        rewards = scorer(torch.stack(random_rows(12, 12)), entropy=True)
    scores = [row.score for row in scorer.score(ROWS)]
    assert [rank["model"]["rows"] for rank in found[2]] == [193, 192]
    for rank in found[2]:
        assert rank["model"]["linear"]
        for ours, theirs in zip(rank["model"]["out"], rewards, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        assert rank["model"]["scores"] == pytest.approx(scores, abs=1e-3)


# --- without processes


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_vocab_size_leaves_padding_out(impl):
    hidden, weight, bias, targets, mask, _, _ = data("bias", 2)
    cut = er.linear_vocab_stats(hidden, weight[:VOCAB], targets, mask=mask, bias=bias[:VOCAB], impl=impl)
    padded = er.linear_vocab_stats(hidden, weight, targets, mask=mask, bias=bias, vocab_size=VOCAB, impl=impl)
    assert torch.equal(cut.lse, padded.lse)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        er.linear_vocab_stats(hidden, weight, torch.full_like(targets, VOCAB), vocab_size=VOCAB, impl=impl)
    with pytest.raises(ValueError, match="vocab_size=0: expected 1 or more"):
        er.linear_vocab_stats(hidden, weight, targets, vocab_size=0, impl=impl)


def test_a_weight_that_zero_3_keeps_elsewhere_is_refused_by_name():
    hidden, _, _, targets, _, _, _ = data("plain", 2)
    empty = torch.nn.Parameter(torch.empty(0))
    empty.ds_id = 7  # what DeepSpeed marks it with
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 keeps it elsewhere; gather it with GatheredParameters"):
        er.linear_vocab_stats(hidden, empty, targets)
