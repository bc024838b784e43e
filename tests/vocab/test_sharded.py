"""A vocabulary split over 2, 3 and 4 processes (shard_ranks.py) against the whole one, under the error budget."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import endoreward_fast as er
import shard_models
import shard_ranks
from endoreward_fast.head.head import Head, HeadRecipe
from endoreward_fast.vocab import reference
from endoreward_fast.vocab.sharded import Shards, _fingerprint, _lost, _merge, _refuse_lost, _split
from shard_ranks import HEADS, PADDED, VOCAB, WORLDS, data, rows_of
from tiny_models import TOKENIZER, random_rows

WORLD = pytest.mark.parametrize("world", WORLDS)
F64 = torch.float64


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{world: [each rank's results]}"""
    folder = tmp_path_factory.mktemp("shards")
    script = Path(shard_ranks.__file__)
    path = os.pathsep.join([str(script.parent), str(script.parents[2])])
    ran = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", map_location="cpu") for rank in range(world)]
        for world in WORLDS
    }


def whole(name, world, dtype):
    """Return statistics and gradients of the whole head by the oracle."""
    hidden, weight, bias, targets, mask, upstream, options = data(name, world)
    h, w, b = (None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    out = reference.linear_vocab_stats(
        h, w[:VOCAB], targets, mask=mask, bias=None if b is None else b[:VOCAB], entropy=True, logit_mean=True,
        dtype=dtype, **options,
    )  # fmt: skip
    alive = out.lse.isfinite() & mask
    sum(
        (torch.where(alive & f.isfinite(), f, 0.0) * g.to(dtype)).sum() for f, g in zip(out[:4], upstream, strict=True)
    ).backward()
    return out, [None if x is None else x.grad for x in (h, w, b)]


@WORLD
@pytest.mark.parametrize("name", HEADS)
def test_every_rank_has_the_whole_vocabularys_statistics(name, world, found, assert_within_budget):
    oracle, eager = whole(name, world, F64)[0], whole(name, world, torch.float32)[0]
    # The mean over the vocabulary is summed from logits, so it rounds at their magnitude.
    scale = {"logit_mean": 3e4 if "offset" in name else 20.0, "entropy": 5.0}
    for rank in found[world]:
        for field, ours in zip(oracle._fields[:4], rank[name]["out"], strict=True):
            finite = getattr(oracle, field)
            if field == "logit_mean" and "inf" in name:
                assert (ours == finite.float()).all()  # a word at -inf makes the mean -inf
                continue
            assert_within_budget(ours, getattr(eager, field), finite, scale=scale.get(field, 1.0), name=field)
        for first, other in zip(found[world][0][name]["out"], rank[name]["out"], strict=True):
            assert torch.equal(first, other)  # bitwise, or ranks could drift apart


@WORLD
@pytest.mark.parametrize("name", HEADS)
def test_gradients_match_those_of_the_whole_head(name, world, found):
    _, (hidden, weight, bias) = whole(name, world, F64)
    for r, rank in enumerate(found[world]):
        part = rows_of(r, world)
        wanted = (hidden, weight[part], None if bias is None else bias[part])
        for ours, oracle in zip(rank[name]["grads"], wanted, strict=True):
            if oracle is not None:
                size = 3e-2 if "offset" in name else 2e-5  # logits near 3e4 leave 3 digits in float32
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
        for field, ours in zip(oracle._fields[:4], rank["dtensor"]["out"], strict=True):
            assert_within_budget(ours, getattr(eager, field), getattr(oracle, field), scale=20.0, name=field)
        torch.testing.assert_close(rank["dtensor"]["lse"].double(), oracle.lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["dtensor"]["grads"][0].double(), hidden, rtol=2e-5, atol=2e-5)
        gradient = rank["dtensor"]["grads"][1]
        torch.testing.assert_close(gradient.double(), weight, rtol=2e-5, atol=2e-5)
        assert gradient.shape == (PADDED, shard_ranks.DIM) and (gradient[VOCAB:] == 0).all()
        few = (data("plain", world)[0].double() @ data("plain", world)[1][:5].double().T).logsumexp(-1)
        torch.testing.assert_close(rank["dtensor"]["few"].double(), few, rtol=1e-6, atol=1e-5)  # 1 of 4 has no rows
        assert rank["dtensor"]["agreed"] == "rank 1 sees other logits"  # or only some ranks would gather
        said = rank["dtensor"]["said"]
        assert "expected Shard(0), a split by vocabulary, on one mesh dimension" in said["by width"]
        for kind, lse in rank["dtensor"]["bias"].items():
            hidden_, weight_, _, _, _, _, _ = data("plain", world)
            z = hidden_.double() @ weight_.double().T + torch.linspace(-1, 1, PADDED).double()
            if kind == "in parts":
                assert "bias is a DTensor placed (Partial(sum),) with a weight placed (Shard(dim=0),)" in lse
            else:
                torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-5)
        assert "omit `shard`" in said["both"] and "expected Replicate() on every mesh dimension" in said["hidden"]


@WORLD
def test_the_ranks_exchange_one_gather_and_one_sum(world, found):
    """In float32 for any dtype, without rows off the mask. On the CPU the ranks first compare their numbers of rows."""
    rows = int(data("plain", world)[4].sum())
    for rank in found[world]:
        for sent in rank["traffic"].values():
            assert sent[-2:] == [
                ("all_gather", 6 * rows + 3, "torch.float32"),
                ("all_reduce", rows * shard_ranks.DIM, "torch.float32"),
            ]
            assert sent[:-2] == ([] if rank["refused"] is None else [("all_gather", 1, "torch.int64")])
        assert len(rank["traffic"]) == 2


@WORLD
def test_a_group_of_some_ranks_shares_a_head(world, found, assert_within_budget):
    oracle, (hidden, weight, _) = whole("plain", 2, F64)
    eager = whole("plain", 2, torch.float32)[0]
    assert [rank["group"] is None for rank in found[world]] == [True] * (world - 2) + [False] * 2
    for r, rank in enumerate(found[world][-2:]):
        for field, ours in zip(oracle._fields[:4], rank["group"]["out"], strict=True):
            assert_within_budget(ours, getattr(eager, field), getattr(oracle, field), scale=20.0, name=field)
        torch.testing.assert_close(rank["group"]["grads"][0].double(), hidden, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(rank["group"]["grads"][1].double(), weight[rows_of(r, 2)], rtol=2e-5, atol=2e-5)


@WORLD
def test_every_rank_raises_the_same_error(world, found):
    if found[world][0]["refused"] is None:
        pytest.skip("on a GPU nothing raises: such rows are NaN")
    for rank in found[world]:
        said = rank["refused"]
        outside = f"at row 0 (of those on the mask) is outside the vocabulary [0, {VOCAB})"
        assert said["outside"] == f"IndexError: target {VOCAB} {outside}"
        assert said["below"] == f"IndexError: target -1 {outside}"
        edges = [0, *shard_ranks.CUTS[world], VOCAB]
        for case, starts in {"overlap": [0] * world, "one off": [0, *(x + 1 for x in edges[1:-1])]}.items():
            spans = ", ".join(
                f"[{a}, {a + n})" for a, n in zip(starts, torch.tensor(edges).diff().tolist(), strict=True)
            )
            assert said[case].startswith(f"ValueError: shards of the vocabulary overlap or leave a gap: {spans};")
        assert "cannot read a sharded head: use impl='auto'" in said["reference"]
        fewer = [shard_ranks.ROWS - r for r in range(world)]
        assert f"have {fewer} rows (after their masks): give every process the same" in said["rows"]
        assert f"have {fewer} rows (after their masks): give every process the same" in said["masks"]
        assert "have different masks: give every process the same mask" in said["other masks"]
        assert f"have {[257 - r for r in range(world)]} rows" in said["default dtype"]
        assert f"have different targets: {[*range(world)]} at row 0" in said["targets"]
        assert "shard.start=-1: expected" in said["start"] and "shard.start=1.0: expected" in said["start"]
    assert all("does not contain this process" in rank["refused"]["outsider"] for rank in found[world][1:])


@WORLD
def test_low_precision_matches_one_process(world, found, assert_within_budget):
    """One process rounds the logits as its matmul does, on some machines to bfloat16."""
    hidden, weight, _, targets, mask, upstream, _ = data("plain", world)
    options = {"mask": mask, "entropy": True, "logit_mean": True}
    for h_dtype, w_dtype in found[world][0]["in_low_precision"]:
        h, w, _ = shard_ranks.leaves(hidden.to(h_dtype), weight[:VOCAB].to(w_dtype), None)
        oracle = reference.linear_vocab_stats(h, w, targets, dtype=F64, **options)
        alone = er.linear_vocab_stats(h, w, targets, impl="chunked", **options)
        sum((f * g).sum() for f, g in zip(alone[:4], upstream, strict=True)).backward()
        for r, rank in enumerate(found[world]):
            ours = rank["in_low_precision"][h_dtype, w_dtype]
            for field, one in zip(oracle._fields[:4], ours["out"], strict=True):
                assert_within_budget(one, getattr(alone, field), getattr(oracle, field), scale=20.0, name=field)
            of_hidden, of_weight, _ = ours["grads"]
            for one, other, parts in ((of_hidden, h.grad, world), (of_weight, w.grad[rows_of(r, world)], 1)):
                # Each part is rounded by half an eps, and so are both sums.
                room = 2e-5 + (parts / 2 + 1) * torch.finfo(one.dtype).eps * float(h.grad.abs().max())
                assert one.dtype == other.dtype
                torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=room)


@WORLD
def test_vocab_size_may_end_in_any_shard(world, found):
    hidden, weight, _, _, _, _, _ = data("plain", world)
    for rank in found[world]:
        for vocab, (lse, mean) in rank["cut_short"].items():
            z = hidden.double() @ weight[: min(vocab, VOCAB)].double().T
            torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(mean.double(), z.mean(-1), rtol=1e-6, atol=1e-5)
        assert len(rank["cut_short"]) == 5


@WORLD
def test_no_rows_and_empty_masks(world, found):
    for rank in found[world]:
        for x in rank["of_nothing"]:
            assert (x == 0).all()
        assert [len(x) for x in rank["of_nothing"][:4]] == [0] * 4
        assert [x.shape for x in rank["of_nothing"][10:14]] == [(12,)] * 4


@WORLD
def test_frozen_tensors_send_no_gradients(world, found):
    _, (hidden, weight, _) = whole("plain", world, F64)
    first = [] if found[world][0]["refused"] is None else ["all_gather"]
    for r, rank in enumerate(found[world]):
        wanted = {
            "hidden": [weight[rows_of(r, world)]],
            "weight": [hidden],
            "neither": [hidden, weight[rows_of(r, world)]],
        }
        for which, oracle in wanted.items():
            for grads in (rank["frozen"][which]["grads"], rank["frozen"][which]["again"]):
                for ours, exact in zip(grads, oracle, strict=True):
                    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)
            sums = ["all_reduce"] * (0 if which == "hidden" else 2)  # there are two backwards
            assert rank["frozen"][which]["sent"] == [*first, "all_gather", *sums]


@WORLD
def test_without_gradients_and_under_autocast(world, found):
    hidden, weight, _, targets, _, _, _ = data("plain", world)
    for r, rank in enumerate(found[world]):
        modes = rank["in_modes"]
        for kind, (lse, *grads) in modes.items():
            h, w, _ = shard_ranks.leaves(hidden, weight[:VOCAB], None)
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=kind == "autocast"):
                alone = er.linear_vocab_stats(h, w, targets).lse
            alone.sum().backward()
            assert lse.dtype == torch.float32
            torch.testing.assert_close(lse, alone.detach(), rtol=1e-6, atol=1e-5)
            for ours, theirs in zip(grads, (h.grad, w.grad[rows_of(r, world)]), strict=bool(grads)):
                room = (
                    2**-7 * world if kind == "autocast" else 2e-5
                )  # bfloat16 numbers of 1 to 4, rounded in each shard
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=room)
        assert set(modes) == {"no_grad", "inference", "autocast"}


def assert_like_one_process(ours, model, atol=2e-5):
    theirs = shard_models.of_scorer(er.EndoRewardModel(model, TOKENIZER))
    assert ours["linear"]
    for one, other in zip(ours["out"], theirs["out"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)
    for name, gradient in theirs["grads"].items():
        assert (ours["grads"][name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    if ours["scores"]:
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-3)


@pytest.mark.parametrize("name", shard_models.MODELS_SPLIT)
def test_a_tensor_parallel_model_is_read_shard_by_shard(name, found):
    """With tp_plan="auto" of transformers. At load every rank checks its own rows against the model's logits."""
    if "model" not in found[2][0]:
        pytest.skip("shown on the CPU")
    for rank in found[2]:
        assert_like_one_process(rank["model"][name], shard_models.MODELS_SPLIT[name]())
    if name == "untied":
        assert [rank["model"][name]["rows"] for rank in found[2]] == [193, 192]


def test_a_split_head_that_fsdp_shards_again(found):
    """Between its runs the head is split by both. While it runs at load, the ranks that share it agree."""
    if "meshes" not in found[4][0]:
        pytest.skip("shown on the CPU")
    for rank in found[4]:
        assert_like_one_process(rank["meshes"], shard_models.uneven())


def test_padding_of_a_split_head_is_cut_without_gathering_it(found):
    if "of_a_padded_head" not in found[2][0]:
        pytest.skip("shown on the CPU")
    scorer = er.EndoRewardModel(shard_models.uneven())
    scorer.model.__class__ = shard_models.Cut
    scorer.head = Head(scorer.model, recipe=HeadRecipe(vocab_size=300))
    theirs, stats = shard_models.of_scorer(scorer), scorer.stats(torch.stack(random_rows(12, 12)))
    for rank in found[2]:
        ours = rank["of_a_padded_head"]
        assert ours["linear"] and ours["asked"] == 0 and ours["vocab"] == stats.vocab == 300
        torch.testing.assert_close(ours["mean"], stats.logit_mean, rtol=1e-5, atol=1e-6)
        for one, other in zip(ours["out"], theirs["out"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
        for name, gradient in theirs["grads"].items():
            assert (ours["grads"][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_model_whose_logits_stay_split_is_refused_by_name(found):
    if "of_logits_in_parts" not in found[2][0]:
        pytest.skip("shown on the CPU")
    for rank in found[2]:
        local, global_ = rank["of_logits_in_parts"]
        assert "gives each process a part of the logits, Tensor (2, 8, 19" in local and "all 385" in local
        assert "part of the logits, DTensor (2, 8, 385)" in global_ and "output_layouts=Replicate()" in global_


# --- tests in this process


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 5), (3, 3), (8, 3)], [(0, 5), (0, 6)], [(1, 5), (6, 5)], [(5, 0), (0, 4), (6, 5)],
        [(0, 3), (0, 3), (6, 2)], [(0, 9), (0, 9), (20, 9), (30, 9)],
    ],
)  # fmt: skip
def test_shards_that_do_not_make_up_a_vocabulary(spans):
    """Also if an overlap and a gap cancel in the number of rows."""
    shards = shards_of(spans)
    assert _lost(shards.target[0].long(), shards).all()
    with pytest.raises(ValueError, match="overlap or leave a gap"):
        _refuse_lost(shards.target[0].long(), shards)


def shards_of(spans):
    start, size = torch.tensor(spans, dtype=torch.float32).T
    return Shards(*[torch.zeros(len(spans), 3)] * 6, start, size, torch.zeros(len(spans)))


def test_shards_in_any_order_with_empty_ones_anywhere():
    shards = shards_of([(6, 5), (2, 0), (0, 6), (99, 0)])
    assert not _lost(shards.target[0].long(), shards).any()


def test_every_way_to_lay_out_three_shards():
    for spans in itertools.product(itertools.product(range(5), range(4)), repeat=3):
        held = sorted(row for start, size in spans for row in range(start, start + size))
        assert bool(_split(shards_of(spans))) == (held == list(range(len(held)))), spans


def test_different_masks_have_different_fingerprints():
    """The fingerprint is one number that float32 holds exactly."""
    masks = [torch.rand(4096, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(300)]
    masks += [torch.arange(4096) != i for i in range(300)]
    found = [_fingerprint(mask.nonzero().squeeze(1)) for mask in masks]
    assert len({int(n) for n in found}) == len(masks) and all(n.float().long() == n for n in found)


@WORLD
def test_invalid_rows_are_nan_where_no_check_runs(world, found, assert_within_budget):
    """As on a GPU. The row before an invalid row is right.

    Gradients of invalid rows are NaN. Otherwise a training step would silently go in a wrong direction.
    """
    right = [rank["as_on_a_device"]["right"] for rank in found[world]]
    for r, rank in enumerate(found[world]):
        for kind, places in (("outside", [(0, 3)]), ("unlike", [(1, 2)])):
            lost = torch.zeros(2, 6, dtype=torch.bool)
            lost[tuple(torch.tensor(places).T)] = True
            ours = rank["as_on_a_device"][kind]
            for field, same in zip(ours["out"], right[r]["out"], strict=True):
                assert field[lost].isnan().all() and torch.equal(field[~lost], same[~lost]), kind
            of_hidden, of_weight = ours["grads"]
            chosen_in = lost.roll(-1, 1)  # the token was chosen in the state before it
            assert of_hidden[chosen_in].isnan().all() and not of_hidden[~chosen_in].isnan().any()
            assert of_weight.isnan().any() or not len(of_weight)
        for kind in ("start", "mask"):
            ours = rank["as_on_a_device"][kind]
            scored = ours["out"][1] != 0
            assert scored.sum() >= 9 and all(field[scored].isnan().all() for field in ours["out"]), kind


def test_a_head_split_over_one_dimension_of_a_mesh(found):
    hidden, weight, _, _, _, _, _ = data("plain", 4)
    h = hidden.double().requires_grad_()
    (h @ weight[:VOCAB].double().T).logsumexp(-1).sum().backward()
    for rank in found[4]:
        cases, said = rank["grid"]
        for lse, grad in cases.values():
            z = hidden.double() @ weight[:VOCAB].double().T
            torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(grad.double(), h.grad, rtol=2e-5, atol=2e-5)
        assert len(cases) == 4
        assert "bias is a DTensor placed (Shard(dim=0), Replicate()) with a weight placed (Replicate(), Shard" in said


def test_all_ranks_adopt_the_reason_that_one_rank_finds(found):
    """Otherwise the other ranks would wait for it, or read the head in another way."""
    if "of_disagreement" not in found[2][0]:
        pytest.skip("shown on the CPU")
    for rank in found[2]:
        assert "parameter 'lm_head.weight' has NaN or infinite values" in rank["of_a_bad_shard"]
        assert rank["of_disagreement"] == dict.fromkeys(("_recipe_mismatch", "_capture_mismatch"), "rank 1 sees noise")
        assert rank["of_little_left"] == {194: None, 193: None, 100: None}


def test_the_merged_entropy_is_at_most_ln_v():
    """With equal logits, the shards' shares and entropies round. The merged entropy must not exceed ln V."""
    for vocab in (2, 3, 5, 31, 100, 157, 301):
        sizes = torch.arange(1.0, vocab).unsqueeze(1)
        sizes = torch.stack([sizes, vocab - sizes])  # (2, V - 1, 1): every way to cut V in two
        for pair in sizes.unbind(1):
            zero = torch.zeros_like(pair)
            shards = Shards(zero, pair.log(), zero, pair.log(), zero, zero, zero[:, 0], pair[:, 0], zero[:, 0])
            entropy = _merge(shards, 1.0)[0].entropy
            assert entropy <= torch.tensor(math.log(vocab)), (vocab, pair)


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


def test_a_weight_that_zero_3_has_partitioned_is_refused_by_name():
    hidden, _, _, targets, _, _, _ = data("plain", 2)
    empty = torch.nn.Parameter(torch.empty(0))
    empty.ds_id = 7  # DeepSpeed's mark
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has partitioned it: gather it with GatheredParameters"):
        er.linear_vocab_stats(hidden, empty, targets)
