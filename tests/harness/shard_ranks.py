"""`python shard_ranks.py FOLDER`: a head split over 2, 3 and 4 processes, by gloo (NCCL where each has a GPU);
what every rank gets for every case goes to FOLDER/WORLD-RANK.pt. test_sharded.py says what it ought to be.
"""

import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import endoreward_fast as er
from endoreward_fast.vocab import sharded
from endoreward_fast.vocab.shard_layout import VocabShard, agreed
from shard_models import (
    MODELS_SPLIT,
    of_a_bad_shard,
    of_a_model,
    of_a_padded_head,
    of_disagreement,
    of_little_left,
    of_logits_in_parts,
    of_two_meshes,
)  # fmt: skip

WORLDS = (2, 3, 4)
ROWS, DIM, VOCAB, PADDED = 13, 24, 157, 160
CUTS = {2: (60,), 3: (7, 110), 4: (40, 41, 157)}  # uneven; one of a single row, one of none
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled and capped": {"logit_scale": 0.3, "softcap": 2.5, "bias": True},
    "alpha": {"alpha": 0.4},
    "common offset": {"bias": True, "offset": 3e4},
    "a shard of -inf": {"bias": True, "ruled_out": "shard"},
    "a row of -inf": {"bias": True, "ruled_out": "all"},
    "transposed": {"transposed": True},
}


def data(name, world):
    """hidden, weight, bias, targets, mask and upstream gradients: the same on every rank, and in the test."""
    with torch.device("cpu"):  # a device draws other numbers
        *tensors, options = _data(name, world)
    here = torch.get_default_device()
    return *(x if x is None else x.to(here) for x in tensors), options


def _data(name, world):
    torch.manual_seed(list(HEADS).index(name))
    options = dict(HEADS[name])
    hidden, weight = torch.randn(ROWS, DIM), torch.randn(PADDED, DIM)
    bias = torch.randn(PADDED) + options.pop("offset", 0.0) if options.pop("bias", False) else None
    if options.pop("transposed", False):  # in memory, the rows side by side
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    ruled_out = options.pop("ruled_out", None)
    if ruled_out:
        bias[: CUTS[world][0] if ruled_out == "shard" else None] = -torch.inf
    targets = torch.linspace(0, VOCAB - 1, ROWS).long()  # in every shard
    targets[3] = -100
    mask = torch.arange(ROWS) % 5 != 4
    return hidden, weight, bias, targets, mask, torch.randn(4, ROWS), options


def rows_of(rank, world):
    edges = (0, *CUTS[world], VOCAB)
    return slice(edges[rank], edges[rank + 1])


def leaves(hidden, weight, bias):
    return [None if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]


def statistics(name, rank, world, impl="chunked", group=None, dtype=torch.float32, wide=False):
    """`wide`: float32 hidden states beside a weight of `dtype`."""
    hidden, weight, bias, targets, mask, upstream, options = data(name, world)
    targets[4] = VOCAB + 7  # nowhere, and off the mask: nobody asks
    part = rows_of(rank, world)
    h, w, b = leaves(hidden if wide else hidden.to(dtype), weight[part].to(dtype), None if bias is None else bias[part])
    out = er.linear_vocab_stats(
        h, w, targets, mask=mask, bias=b, entropy=True, logit_mean=True, impl=impl,
        shard=VocabShard(group, part.start), **options,
    )  # fmt: skip
    alive = out.lse.isfinite() & mask
    sum(
        (torch.where(alive & f.isfinite(), f, 0.0) * g).sum() for f, g in zip(out[:4], upstream, strict=True)
    ).backward()
    return {"out": [f.detach() for f in out[:4]], "grads": [x if x is None else x.grad for x in (h, w, b)]}


def rewards(rank, world, impl="chunked"):
    hidden, weight, _, _, _, upstream, _ = data("plain", world)
    part = rows_of(rank, world)
    h, w, _ = leaves(hidden[:12].view(2, 6, DIM), weight[part], None)
    tokens = (torch.arange(12).view(2, 6) * 13) % VOCAB
    mask = torch.tensor([[False, True, True, True, True, True], [False, False, True, True, True, False]])
    shard = VocabShard(dist.group.WORLD, part.start)
    out = er.linear_token_rewards(h, w, tokens, mask=mask, entropy=True, alpha=0.7, shard=shard, impl=impl)
    sum((f * g[:12].view(2, 6)).sum() for f, g in zip(out[:4], upstream, strict=True)).backward()
    return {"out": [f.detach() for f in out[:4]], "grads": [h.grad, w.grad], "tokens": tokens, "mask": mask}


def of_dtensors(rank, world):
    """As tensor parallelism lays a head out: torch.chunk's rows, the last ones fewer; and padding left out."""
    hidden, weight, _, targets, mask, upstream, _ = data("plain", world)
    mesh = init_device_mesh(hidden.device.type, (world,))
    whole = weight.clone().requires_grad_()
    split = distribute_tensor(whole.detach(), mesh, [Shard(0)]).requires_grad_()
    same = distribute_tensor(weight, mesh, [Replicate()])
    h = hidden.clone().requires_grad_()
    out = er.linear_vocab_stats(h, split, targets, mask=mask, entropy=True, logit_mean=True, vocab_size=VOCAB)
    sum((f * g).sum() for f, g in zip(out[:4], upstream, strict=True)).backward()
    replicated = er.linear_vocab_stats(hidden, same, targets, mask=mask, vocab_size=VOCAB)
    said = {}
    for kind, wrong in {
        "by width": lambda: er.linear_vocab_stats(hidden, distribute_tensor(weight, mesh, [Shard(1)]), targets),
        "both": lambda: er.linear_vocab_stats(hidden, split, targets, shard=VocabShard(None, 0)),
        "hidden": lambda: er.linear_vocab_stats(distribute_tensor(hidden, mesh, [Shard(0)]), split, targets),
    }.items():
        said[kind] = message(wrong)
    grads = [h.grad, split.grad.full_tensor()]
    few = er.linear_vocab_stats(hidden, distribute_tensor(weight[:5], mesh, [Shard(0)]), targets.clamp(max=4)).lse
    alike = distribute_tensor(hidden, mesh, [Replicate()])
    whole_bias, beside = torch.linspace(-1, 1, PADDED), {}
    for kind, bias in {
        "split": distribute_tensor(whole_bias, mesh, [Shard(0)]),
        "on every rank": distribute_tensor(whole_bias, mesh, [Replicate()]),
        "in parts": DTensor.from_local(whole_bias, mesh, [Partial()]),
    }.items():
        beside[kind] = outcome(lambda bias=bias: er.linear_vocab_stats(alike, split, targets, bias=bias).lse.detach())
    verdict = agreed("rank 1 sees other logits" if rank == 1 else None, mesh.get_group())
    return {
        "out": [f.detach() for f in out[:4]],
        "grads": grads,
        "lse": replicated.lse,
        "few": few,
        "said": said,
        "agreed": verdict,
        "bias": beside,
    }


def of_a_grid(rank, world):
    """lse and gradients of a head split over one dimension of a 2 x 2 mesh, whichever; the other may split nothing."""
    hidden, weight, _, targets, _, _, _ = data("plain", world)
    found = {}
    for shape, placed in (((2, 2), (Replicate(), Shard(0))), ((2, 2), (Shard(0), Replicate())),
                          ((1, 4), (Shard(1), Shard(0))), ((4, 1), (Shard(0), Partial()))):  # fmt: skip
        mesh = init_device_mesh(hidden.device.type, shape)
        rows = distribute_tensor(weight[:VOCAB], mesh, [Replicate() if p.is_partial() else p for p in placed])
        split = DTensor.from_local(rows.to_local(), mesh, placed, shape=rows.shape, stride=rows.stride())
        h, w = hidden.clone().requires_grad_(), split.detach().requires_grad_()
        lse = er.linear_vocab_stats(h, w, targets).lse
        lse.sum().backward()
        found[shape, str(placed)] = lse.detach(), h.grad
    mesh = init_device_mesh(hidden.device.type, (2, 2))
    split = distribute_tensor(weight[:VOCAB], mesh, [Replicate(), Shard(0)])
    bias = distribute_tensor(torch.ones(VOCAB), mesh, [Shard(0), Replicate()])
    return found, message(lambda: er.linear_vocab_stats(hidden, split, targets, bias=bias))


def outcome(call):
    """What call() gives, or why not."""
    try:
        return call()
    except (ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def message(call):
    found = outcome(call)
    return found if isinstance(found, str) else "nothing was said"


def as_on_a_device(rank, world):
    """Where nothing can raise: rewards and gradients with a token that is no word, and with unlike targets."""
    hidden, weight, _, _, _, _, _ = data("plain", world)
    part, found = rows_of(rank, world), {}
    tokens = (torch.arange(12).view(2, 6) * 13) % VOCAB
    lost = tokens.clone()
    lost[0, 3] = VOCAB + 5
    unlike = tokens.clone()
    unlike[1, 2] += rank
    for kind, given in {"right": tokens, "outside": lost, "unlike": unlike, "start": tokens, "mask": tokens}.items():
        h, w, _ = leaves(hidden[:12].view(2, 6, DIM), weight[part], None)
        start = part.start + (kind == "start" and rank > 0)
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[:, 0] = False
        if kind == "mask":
            mask[0, 1 + rank] = False
        with patch.object(sharded, "_refuse_lost", lambda targets, shards: None):
            out = er.linear_token_rewards(h, w, given, mask=mask, shard=VocabShard(None, start))
        out.logprob.sum().backward()
        found[kind] = {"out": [f.detach() for f in out[:3]], "grads": [h.grad, w.grad]}
    return found


def refused(rank, world):
    hidden, weight, _, targets, _, _, _ = data("plain", world)
    part = rows_of(rank, world)
    alone = dist.new_group([0])

    def say(rows=ROWS, targets=targets, start=part.start, group=None, **options):
        options = {"impl": "chunked"} | options
        shard = VocabShard(group, start)
        return message(
            lambda: er.linear_vocab_stats(hidden[:rows], weight[part], targets[:rows], shard=shard, **options)
        )

    def say_rows(count):
        many, asked = torch.zeros(count, DIM, dtype=torch.float32), torch.zeros(count, dtype=torch.long)
        return message(lambda: er.linear_vocab_stats(many, weight[part], asked, shard=VocabShard(None, part.start)))

    def in_bfloat16(call):
        torch.set_default_dtype(torch.bfloat16)  # to which 257 is 256
        try:
            return call()
        finally:
            torch.set_default_dtype(torch.float32)

    return {
        "outside": say(targets=torch.full((ROWS,), VOCAB)),
        "below": say(targets=torch.full((ROWS,), -1)),
        "overlap": say(start=0, targets=torch.full((ROWS,), -100)),
        "one off": say(start=part.start + (rank > 0), targets=torch.full((ROWS,), -100)),
        "reference": say(impl="reference"),
        "rows": say(rows=ROWS - rank),
        "targets": say(targets=torch.full((ROWS,), rank)),
        "masks": say(mask=torch.arange(ROWS) >= rank),
        "other masks": say(mask=torch.arange(ROWS) != rank, targets=torch.full((ROWS,), -100)),
        "default dtype": in_bfloat16(lambda: say_rows(257 - rank)),
        "start": say(start=-1) + say(start=1.0),
        "outsider": say(group=alone) if rank else None,
    }


def in_low_precision(rank, world):
    """(hidden, weight): statistics"""
    half, bfloat = torch.float16, torch.bfloat16
    kinds = {(half, half): {}, (bfloat, bfloat): {}, (torch.float32, bfloat): {"wide": True}}
    return {kinds_: statistics("plain", rank, world, dtype=kinds_[1], **options) for kinds_, options in kinds.items()}


def cut_short(rank, world):
    """lse of the words before `vocab_size`, that ends at a shard's edge, in one, or leaves but the first a part."""
    hidden, weight, _, _, _, _, _ = data("plain", world)
    part, targets = rows_of(rank, world), torch.zeros(ROWS, dtype=torch.long)
    return {
        vocab: er.linear_vocab_stats(
            hidden, weight[part], targets, logit_mean=True, shard=VocabShard(None, part.start), vocab_size=vocab
        )[::3]
        for vocab in (3, CUTS[world][0], VOCAB - 20, VOCAB, PADDED)
    }


def of_nothing(rank, world):
    """No row at all, or none on the mask: statistics, rewards, and gradients of them."""
    hidden, weight, _, targets, _, _, _ = data("plain", world)
    part, found = rows_of(rank, world), []
    shard = VocabShard(None, part.start)
    for rows in (0, 12):
        h, w, _ = leaves(hidden[:rows], weight[part], None)
        mask = torch.zeros(rows, dtype=torch.bool)
        with patch.object(sharded, "linear_stats", wraps=sharded.linear_stats) as local:
            out = er.linear_vocab_stats(
                h, w, targets[:rows], mask=mask, entropy=True, logit_mean=True, shard=shard, impl="chunked"
            )
        assert all(len(call.args[0]) == 0 for call in local.call_args_list)  # rows off the mask cost nothing
        rewards = er.linear_token_rewards(
            h.view(2, rows // 2, DIM), w, targets[:rows].view(2, -1), mask=mask.view(2, -1), entropy=True, shard=shard,
        )  # fmt: skip
        sum(f.sum() for f in (*out[:4], *rewards)).backward()
        found += [*out[:4], *rewards, h.grad, w.grad]
    return [f.detach() for f in found]


def frozen(rank, world):
    """One of hidden and weight is not trained; and a backward that comes twice. The traffic of each."""
    hidden, weight, _, targets, mask, upstream, _ = data("plain", world)
    part, found = rows_of(rank, world), {}
    for which in ("hidden", "weight", "neither"):
        h, w, _ = leaves(hidden, weight[part], None)
        h.requires_grad_(which != "hidden"), w.requires_grad_(which != "weight")

        def both(h=h, w=w):
            out = er.linear_vocab_stats(
                h, w, targets, mask=mask, entropy=True, logit_mean=True, shard=VocabShard(None, part.start)
            )
            loss = sum((f * g).sum() for f, g in zip(out[:4], upstream, strict=True))
            wanted = [x for x in (h, w) if x.requires_grad]
            return [torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2)]

        (first, again), sent = counted(both)
        found[which] = {"grads": first, "again": again, "sent": [name for name, _, _ in sent]}
    return found


def in_modes(rank, world):
    """lse, and the gradient of hidden where there is one, without gradients, and under autocast."""
    hidden, weight, _, targets, _, _, _ = data("plain", world)
    part = rows_of(rank, world)

    def lse(h, w):
        return er.linear_vocab_stats(h, w, targets, shard=VocabShard(None, part.start)).lse

    h, w, _ = leaves(hidden, weight[part], None)
    with torch.no_grad():
        found = {"no_grad": [lse(h, w)]}
    with torch.inference_mode():
        found["inference"] = [lse(hidden, weight[part]).clone()]
    with torch.autocast(hidden.device.type, torch.bfloat16):
        out = lse(h, w)
    found["autocast"] = [out.detach(), *torch.autograd.grad(out.sum(), (h, w))]
    return found


def in_a_group(rank, world):
    """The last two ranks alone share a head, as where other ranks hold other rows of a batch."""
    group = dist.new_group([world - 2, world - 1])
    return statistics("plain", rank - (world - 2), 2, group=group) if rank >= world - 2 else None


def counted(call):
    """What call() gives, and the numbers that each of its collectives sends."""
    sent = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def noted(collective, place):
        def run(*args, **options):
            sent.append((collective.__name__, args[place].numel(), str(args[place].dtype)))
            return collective(*args, **options)

        return run

    dist.all_gather, dist.all_reduce = noted(gather, 1), noted(reduce, 0)
    try:
        with CommDebugMode() as everything:  # others would show here
            found = call()
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    assert everything.get_total_counts() == len(sent)
    return found, sent


def work(rank, world, folder):
    backend = "nccl" if torch.cuda.device_count() >= world else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    found = {name: statistics(name, rank, world) for name in HEADS}
    found |= {"rewards": rewards(rank, world), "dtensor": of_dtensors(rank, world), "group": in_a_group(rank, world)}
    found["traffic"] = {
        dtype: counted(partial(statistics, "plain", rank, world, dtype=dtype))[1]
        for dtype in (torch.float32, torch.bfloat16)
    }
    for case in (in_low_precision, cut_short, of_nothing, frozen, in_modes, as_on_a_device):
        found[case.__name__] = case(rank, world)
    if backend == "gloo" and world == 2:
        found["model"] = {name: of_a_model(rank, world, f"{folder}/{name}") for name in MODELS_SPLIT}
        for case in (of_a_padded_head, of_logits_in_parts, of_a_bad_shard, of_disagreement, of_little_left):
            found[case.__name__] = case(rank, world)
    if backend == "gloo" and world == 4:
        found["meshes"] = of_two_meshes(rank, world)
    if world == 4:
        found["grid"] = of_a_grid(rank, world)
    found["refused"] = refused(rank, world) if backend == "gloo" else None
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def fork(rank, world, folder):
    """torch is imported once; a child that fails says why and fails the whole."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work(rank, world, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    for name, model in MODELS_SPLIT.items():  # here: among several ranks only the first one writes
        model().save_pretrained(f"{sys.argv[1]}/{name}")
    failed = 0
    for world in WORLDS:
        children = [fork(rank, world, sys.argv[1]) for rank in range(world)]
        failed += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
    sys.exit(min(1, failed))
