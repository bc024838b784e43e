"""`python shard_ranks.py FOLDER`: a head split over 2, 3 and 4 processes, by gloo (NCCL where each has a GPU);
what every rank gets for every case goes to FOLDER/WORLD-RANK.pt. test_sharded.py says what it ought to be.
"""

import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

import endoreward_fast as er
from endoreward_fast.sharded import VocabShard, agreed
from tiny_models import ROWS as ROWS_OF_TEXT
from tiny_models import TOKENIZER, build, random_rows

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
}


def data(name, world):
    """hidden, weight, bias, targets, mask and upstream gradients: the same on every rank, and in the test."""
    torch.manual_seed(list(HEADS).index(name))
    options = dict(HEADS[name])
    hidden, weight = torch.randn(ROWS, DIM), torch.randn(PADDED, DIM)
    bias = torch.randn(PADDED) + options.pop("offset", 0.0) if options.pop("bias", False) else None
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
    return [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]


def statistics(name, rank, world, impl="chunked", group=None, dtype=torch.float32):
    hidden, weight, bias, targets, mask, upstream, options = data(name, world)
    targets[4] = VOCAB + 7  # nowhere, and off the mask: nobody asks
    part = rows_of(rank, world)
    h, w, b = leaves(hidden.to(dtype), weight[part].to(dtype), None if bias is None else bias[part])
    out = er.linear_vocab_stats(
        h, w, targets, mask=mask, bias=b, entropy=True, logit_mean=True, impl=impl,
        shard=VocabShard(group, part.start), **options,
    )  # fmt: skip
    alive = out.lse.isfinite() & mask
    sum((torch.where(alive & f.isfinite(), f, 0.0) * g).sum() for f, g in zip(out, upstream, strict=True)).backward()
    return {"out": [f.detach() for f in out], "grads": [x if x is None else x.grad for x in (h, w, b)]}


def rewards(rank, world, impl="chunked"):
    hidden, weight, _, _, _, upstream, _ = data("plain", world)
    part = rows_of(rank, world)
    h, w, _ = leaves(hidden[:12].view(2, 6, DIM), weight[part], None)
    tokens = (torch.arange(12).view(2, 6) * 13) % VOCAB
    mask = torch.tensor([[False, True, True, True, True, True], [False, False, True, True, True, False]])
    shard = VocabShard(dist.group.WORLD, part.start)
    out = er.linear_token_rewards(h, w, tokens, mask=mask, entropy=True, alpha=0.7, shard=shard, impl=impl)
    sum((f * g[:12].view(2, 6)).sum() for f, g in zip(out, upstream, strict=True)).backward()
    return {"out": [f.detach() for f in out], "grads": [h.grad, w.grad], "tokens": tokens, "mask": mask}


def of_dtensors(rank, world):
    """As tensor parallelism lays a head out: torch.chunk's rows, the last ones fewer; and padding left out."""
    hidden, weight, _, targets, mask, upstream, _ = data("plain", world)
    mesh = init_device_mesh("cpu", (world,))
    whole = weight.clone().requires_grad_()
    split = distribute_tensor(whole.detach(), mesh, [Shard(0)]).requires_grad_()
    same = distribute_tensor(weight, mesh, [Replicate()])
    h = hidden.clone().requires_grad_()
    out = er.linear_vocab_stats(h, split, targets, mask=mask, entropy=True, logit_mean=True, vocab_size=VOCAB)
    sum((f * g).sum() for f, g in zip(out, upstream, strict=True)).backward()
    replicated = er.linear_vocab_stats(hidden, same, targets, mask=mask, vocab_size=VOCAB)
    said = {}
    for kind, wrong in {
        "by width": lambda: er.linear_vocab_stats(hidden, distribute_tensor(weight, mesh, [Shard(1)]), targets),
        "both": lambda: er.linear_vocab_stats(hidden, split, targets, shard=VocabShard(None, 0)),
        "hidden": lambda: er.linear_vocab_stats(distribute_tensor(hidden, mesh, [Shard(0)]), split, targets),
    }.items():
        said[kind] = message(wrong)
    grads = [h.grad, split.grad.full_tensor()]
    verdict = agreed("rank 1 sees other logits" if rank == 1 else None, split)
    return {"out": [f.detach() for f in out], "grads": grads, "lse": replicated.lse, "said": said, "agreed": verdict}


def uneven():
    """A model whose 385 words two ranks cannot share evenly."""
    return build(LlamaConfig, tie_word_embeddings=False, vocab_size=385)


def of_a_model(rank, world, folder):
    """transformers' own tensor parallelism: tp_plan="auto"."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto")
    scorer = er.EndoRewardModel(model, TOKENIZER)
    with torch.no_grad():
        rewards = scorer(torch.stack(random_rows(12, 12)), entropy=True)
    scores = [row.score for row in scorer.score(ROWS_OF_TEXT)]
    return {
        "linear": scorer.head.linear,
        "rows": len(scorer.head.weight.to_local()),
        "out": [*rewards],
        "scores": scores,
    }


def message(call):
    try:
        call()
    except (ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


def refused(rank, world):
    hidden, weight, _, targets, _, _, _ = data("plain", world)
    part = rows_of(rank, world)

    def ask(**changes):
        given = {"targets": targets, "start": part.start, "impl": "chunked"} | changes
        shard = VocabShard(None, given["start"])
        return lambda: er.linear_vocab_stats(hidden, weight[part], given["targets"], shard=shard, impl=given["impl"])

    return {
        "outside": message(ask(targets=torch.full((ROWS,), VOCAB))),
        "overlap": message(ask(start=0)),
        "reference": message(ask(impl="reference")),
    }


def in_a_group(rank, world):
    """The last two ranks alone share a head, as where other ranks hold other rows of a batch."""
    group = dist.new_group([world - 2, world - 1])
    return statistics("plain", rank - (world - 2), 2, group=group) if rank >= world - 2 else None


def traffic(rank, world, dtype):
    """Numbers sent by each collective, of a forward and a backward."""
    sent = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted(call, place):
        def run(*args, **options):
            sent.append((call.__name__, args[place].numel(), str(args[place].dtype)))
            return call(*args, **options)

        return run

    dist.all_gather, dist.all_reduce = counted(gather, 1), counted(reduce, 0)
    try:
        statistics("plain", rank, world, dtype=dtype)
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return sent


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
    found["traffic"] = {dtype: traffic(rank, world, dtype) for dtype in (torch.float32, torch.bfloat16)}
    if backend == "gloo" and world == 2:
        found["model"] = of_a_model(rank, world, folder)
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
    uneven().save_pretrained(f"{sys.argv[1]}/model")  # here: among several ranks only the first one writes
    failed = 0
    for world in WORLDS:
        children = [fork(rank, world, sys.argv[1]) for rank in range(world)]
        failed += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
    sys.exit(min(1, failed))
