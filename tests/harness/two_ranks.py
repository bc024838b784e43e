"""EndoRewardModel with FSDP, DDP and split heads, on two processes over gloo. `test_own_loop.py` starts them once.

Each rank has different rows, and the loss is the mean over ranks. The expected values come from one plain model that
reads the rows of all ranks.
"""

import functools
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from endoreward_fast import EndoRewardModel
from tiny_models import MODELS, ROWS, TOKENIZER, build, random_rows, same

WORLD, LENGTH = 2, 12


def untied():
    return build(LlamaConfig, tie_word_embeddings=False)


def tied():
    return build(LlamaConfig, tie_word_embeddings=True)


def rewards_of(scorer, rank, rows=slice(None)):
    """Return the rewards of this rank's two rows, or of one of them."""
    ids = torch.stack(random_rows(*[LENGTH] * 2 * WORLD))[2 * rank : 2 * rank + 2]
    mask = (torch.arange(LENGTH) >= 4).expand(2, -1).clone()
    mask[0, 7 + rank :] = False
    return scorer(ids[rows], completion_mask=mask[rows], entropy=True)


def loss_of(rewards):
    weights = torch.linspace(-1, 1, LENGTH)
    return (rewards.reward * weights).sum() + rewards.logprob.square().sum() + rewards.entropy.sum()


@functools.cache
def one_process(build_model):
    """Return (rewards of every rank, {parameter: gradient of the mean loss})."""
    scorer = EndoRewardModel(build_model())
    rewards = [rewards_of(scorer, rank) for rank in range(WORLD)]
    (sum(map(loss_of, rewards)) / WORLD).backward()
    return [type(r)(*(field.detach() for field in r)) for r in rewards], {n: p.grad for n, p in inner(scorer)}


def inner(module):
    """Return [(name without the prefix of wrapping modules, parameter)]."""
    return [(name.rpartition("model.")[-1], p) for name, p in module.named_parameters()]


def assert_gradients(module, build_model, tolerance=1e-6, frozen=()):
    _, expected = one_process(build_model)
    assert {name for name, _ in inner(module)} == set(expected)
    for name, parameter in inner(module):
        if name in frozen:
            assert parameter.grad is None, f"{name} is frozen"
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        found = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        error = (found - expected[name]).norm() / expected[name].norm()
        assert found.dtype == torch.float32 and error <= tolerance, f"{name}: relative error {error:.1e}"
    module.zero_grad()


# -------------------------------------------------------------------------------------------------------------- FSDP2


def shard(model, mesh, *, layers=True, head=False, root=None, keep=None, **options):
    for layer in model.model.layers if layers else ():
        fully_shard(layer, mesh=mesh, **options)
    if head:
        fully_shard(model.lm_head, mesh=mesh, **options)
    fully_shard(model if root is None else root, mesh=mesh, reshard_after_forward=keep, **options)


def sharded(build_model, mesh, first, **options):
    """Create an EndoRewardModel and shard its model, in this order if `first`. No warning may occur."""
    model = build_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = EndoRewardModel(model, TOKENIZER) if first else None
        shard(model, mesh, **options)
        scorer = scorer or EndoRewardModel(model, TOKENIZER)
    assert scorer.head.linear
    return scorer


def fsdp2(build_model, rank, mesh, *, first, **options):
    scorer = sharded(build_model, mesh, first, **options)
    shapes = []
    scorer.head.module.register_forward_hook(lambda *args: shapes.append(args[-1].shape))
    for _ in range(2):  # the second time after everything is sharded again
        rewards = rewards_of(scorer, rank)
        same(rewards, one_process(build_model)[0][rank], 1e-6)
        loss_of(rewards).backward()
        assert_gradients(scorer, build_model)
    with torch.no_grad():
        same(rewards_of(scorer, rank), one_process(build_model)[0][rank], 1e-6)
    parts = [rewards_of(scorer, rank, slice(i, i + 1)) for i in range(2)]  # two forwards, then one backward
    sum(map(loss_of, parts)).backward()
    assert_gradients(scorer, build_model)
    assert {shape[1] for shape in shapes} == {0}  # logits never exist


def fsdp2_around_the_scorer(build_model, rank, mesh, **options):
    scorer = EndoRewardModel(build_model())
    shard(scorer.model, mesh, root=scorer, **options)
    rewards = rewards_of(scorer, rank)
    same(rewards, one_process(build_model)[0][rank], 1e-6)
    loss_of(rewards).backward()
    assert_gradients(scorer, build_model)


def assert_scores_text(scorer, build_model):
    expected = EndoRewardModel(build_model(), TOKENIZER).score(ROWS)
    for ours, by_itself in zip(scorer.score(ROWS), expected, strict=True):
        assert abs(ours.score - by_itself.score) <= 1e-5 * abs(by_itself.score)


def fsdp2_scores_text_and_padded_rows(rank, mesh):
    plain, scorer = EndoRewardModel(untied()), sharded(untied, mesh, True)
    assert_scores_text(scorer, untied)
    ids = torch.stack(random_rows(LENGTH, LENGTH))
    attended = (torch.arange(LENGTH) >= 3 - rank).long().expand(2, -1)
    with torch.no_grad():
        same(scorer(ids, attended), plain(ids, attended))
    loss_of(rewards_of(scorer, rank)).backward()  # scoring does not prevent training
    assert_gradients(scorer, untied)


def fsdp2_with_a_frozen_head(rank, mesh):
    scorer = sharded(untied, mesh, True, head=True)
    scorer.head.module.requires_grad_(False)
    loss_of(rewards_of(scorer, rank)).backward()
    assert_gradients(scorer, untied, frozen=("lm_head.weight",))


def fsdp2_with_compiled_layers(rank, mesh):
    model = untied()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    shard(model, mesh)
    scorer = EndoRewardModel(model)
    rewards = rewards_of(scorer, rank)
    same(rewards, one_process(untied)[0][rank])
    loss_of(rewards).backward()
    assert_gradients(scorer, untied)


def fsdp2_with_gradient_checkpointing(rank, mesh, reentrant):
    scorer = sharded(untied, mesh, True)
    scorer.model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        scorer.model.enable_input_require_grads()
    loss_of(rewards_of(scorer, rank)).backward()
    assert_gradients(scorer, untied)


def fsdp2_in_mixed_precision(rank, mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    scorer = sharded(untied, mesh, False, head=True, mp_policy=policy)
    rewards = rewards_of(scorer, rank)
    same(rewards, one_process(untied)[0][rank], 0.02)
    loss_of(rewards).backward()
    assert_gradients(scorer, untied, 0.15)


# -------------------------------------------------------------------------------------------------------------- FSDP1


def fsdp1(build_model, rank, mesh, *, first, **options):
    model = build_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scorer = EndoRewardModel(model, TOKENIZER) if first else None
        whole = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        scorer = scorer or EndoRewardModel(whole, TOKENIZER)
    scorer.model = whole
    assert scorer.head.linear
    assert_scores_text(scorer, build_model)
    for _ in range(2):
        rewards = rewards_of(scorer, rank)
        same(rewards, one_process(build_model)[0][rank], 1e-6)
        loss_of(rewards).backward()
        if options["use_orig_params"]:  # otherwise gradients have no names
            with FullyShardedDataParallel.summon_full_params(whole, with_grads=True):
                assert_gradients(whole.module, build_model)
        whole.zero_grad()


# ------------------------------------------------------------------------------------------------------------- others


def a_vocabulary_sharded_head_is_read_shard_by_shard(rank, mesh):
    model = untied()
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    scorer = EndoRewardModel(model)
    assert scorer.head.linear and type(scorer.head.weight).__name__ == "DTensor"
    rewards = rewards_of(scorer, 0)  # the ranks of one model read the same rows
    same(rewards, one_process(untied)[0][0], 1e-5)
    loss_of(rewards).backward()
    plain = EndoRewardModel(untied())
    loss_of(rewards_of(plain, 0)).backward()
    for (name, ours), (_, theirs) in zip(inner(scorer), inner(plain), strict=True):
        gradient = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        assert (gradient - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name


def a_head_sharded_after_it_was_checked_is_read(rank, mesh):
    scorer = EndoRewardModel(untied())
    parallelize_module(scorer.model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    same(rewards_of(scorer, 0), one_process(untied)[0][0], 1e-5)


def a_head_split_by_its_width_falls_back(rank, mesh):
    model = untied()
    parallelize_module(model, mesh, {"lm_head": RowwiseParallel(input_layouts=Replicate())})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scorer = EndoRewardModel(model)
    assert "expected Shard(0), a split by vocabulary" in str(caught[-1].message), caught[-1].message
    with torch.no_grad():
        same(rewards_of(scorer, 0), one_process(untied)[0][0])


def ddp(build_model, rank, mesh):
    scorer = DistributedDataParallel(EndoRewardModel(build_model()))
    rewards = rewards_of(scorer, rank)
    same(rewards, one_process(build_model)[0][rank], 1e-6)
    loss_of(rewards).backward()
    assert_gradients(scorer, build_model)


ROOTS = {
    "layers": {},
    "layers, nothing kept gathered": {"keep": True},
    "root alone": {"layers": False},
    "root alone, nothing kept gathered": {"layers": False, "keep": True},
    "layers, head": {"head": True},
}
CASES = {
    f"fsdp2 {wrapped}, {model.__name__}, {'before' if first else 'after'}": partial(fsdp2, model, first=first, **how)
    for wrapped, how in ROOTS.items()
    for model in (untied, tied)
    for first in ((True, False) if wrapped == "layers" else (model is untied,))
    if not (model is tied and "head" in how)  # FSDP2 itself refuses a weight in two groups
} | {
    "fsdp2 layers, softcap": partial(fsdp2, MODELS["gemma2"], first=True),
    "fsdp2 around the scorer": partial(fsdp2_around_the_scorer, untied),
    "fsdp2 around the scorer alone, tied": partial(fsdp2_around_the_scorer, tied, layers=False, keep=True),
    "fsdp2 scores text and padded rows": fsdp2_scores_text_and_padded_rows,
    "fsdp2 with checkpoints": partial(fsdp2_with_gradient_checkpointing, reentrant=False),
    "fsdp2 with reentrant checkpoints": partial(fsdp2_with_gradient_checkpointing, reentrant=True),
    "fsdp2 in mixed precision": fsdp2_in_mixed_precision,
    "fsdp2 with a frozen head": fsdp2_with_a_frozen_head,
    "fsdp2 with compiled layers": fsdp2_with_compiled_layers,
    "fsdp1, before": partial(fsdp1, untied, first=True, use_orig_params=True),
    "fsdp1, after": partial(fsdp1, tied, first=False, use_orig_params=True),
    "fsdp1, flat": partial(fsdp1, untied, first=False, use_orig_params=False),
    "a vocabulary-sharded head is read shard by shard": a_vocabulary_sharded_head_is_read_shard_by_shard,
    "a head sharded afterwards is read": a_head_sharded_after_it_was_checked_is_read,
    "a head split by its width falls back": a_head_split_by_its_width_falls_back,
    "ddp, untied": partial(ddp, untied),
    "ddp, tied": partial(ddp, tied),
}


# ------------------------------------------------------------------------------------------------------------- running


def run():
    """Return {case: error on either rank, or ""}."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=WORLD)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]
    return {name: "\n".join(filter(None, (of_rank[name] for of_rank in found))) for name in CASES}


def _rank(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    found = dict.fromkeys(CASES, f"rank {rank} did not get this far")
    try:
        for name, case in CASES.items():
            try:
                case(rank=rank, mesh=mesh)
                found[name] = ""
            except Exception:
                found[name] = f"rank {rank}: {traceback.format_exc()}"
            dist.barrier()
    finally:
        torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # everything is saved. An abort was seen once, presumably of a thread while the process shut down
