"""Vocabulary statistics of a head that is split over processes by vocabulary. The processes exchange O(N) numbers.

Shard r reads its own rows of the weight and computes, for each row of hidden states,

    shift_r = max z    log_total_r = ln sum exp((z - shift_r) / alpha)    H_r = entropy of its softmax    sum z

The whole vocabulary follows from these:

    lse       = logsumexp_r lse_r                   share_r    = exp(lse_r - lse)
    entropy   = sum_r share_r (H_r - ln share_r)    logit_mean = sum_r (sum z) / V

Rows off the mask are removed first. The forward makes one all_gather of six float32 per row; on the CPU, an all_gather
of one number precedes it (see `_refuse_unequal`). In the backward, each shard computes its share of the gradients, and
one all_reduce adds up the gradients of `hidden`. As in any tensor-parallel layer, all ranks must have the same hidden
states, request the same gradients and receive the same upstream gradients.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import NO_TARGET
from .ops import linear_stats, linear_stats_backward, outputs, row_grads
from .rows import SUM_SCALE, KeptRows, RowGrads, RowStats, at_next, poisoned, rewards_of, successor_among
from .shard_layout import VocabShard


class Shards(NamedTuple):
    """The gathered numbers of all shards, float32: (shards, N) for each row, and (shards,) for the shard itself."""

    shift: Tensor
    log_total: Tensor
    target_logit: Tensor
    """0 if another shard holds the target"""
    entropy: Tensor
    total: Tensor
    """sum of z"""
    target: Tensor
    """the target token; float32 is exact up to 2^24"""
    start: Tensor
    size: Tensor
    """vocabulary entries"""
    mask: Tensor
    """fingerprint of the rows that the mask keeps"""


def sharded_linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
    successor: Tensor | None, logit_scale: float, softcap: float | None, alpha: float, entropy: bool,
    logit_mean: bool, impl: str, shard: VocabShard,
) -> list[Tensor]:  # fmt: skip
    """Compute `ops.linear_stats` of the whole vocabulary. weight and bias are this process's rows of it.

    `targets` index the whole vocabulary. Every rank returns the same.

    On the CPU every rank raises the same error: IndexError for a target outside the vocabulary; ValueError for shards
    that overlap or leave a gap, and for ranks with different targets, masks or numbers of rows. On a GPU such rows come
    back NaN, and the numbers of rows are not compared.
    """
    head = {"logit_scale": logit_scale, "softcap": softcap, "alpha": alpha, "impl": impl}
    wanted = {"entropy": entropy, "logit_mean": logit_mean}
    kept = KeptRows(mask)
    rows = torch.arange(len(targets), device=targets.device) if mask is None else kept.index
    if mask is not None:
        successor = successor_among(successor, mask, rows)
    out = _ShardedLinear.apply(
        kept.take(hidden), weight, bias, kept.take(targets), successor, _fingerprint(rows), shard, head, wanted
    )
    made = [True, True, entropy, logit_mean, True, True, True, True, True, entropy][: len(out)]
    out = [kept.spread(f) if m else f for f, m in zip(out, made, strict=True)]
    return (
        out if successor is None else out[:6] + [at_next(f) if m else f for f, m in zip(out[6:], made[6:], strict=True)]
    )


class _ShardedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, successor, fingerprint, shard, head, wanted):
        here = (targets >= shard.start) & (targets < shard.start + len(weight))
        own = torch.where(here, targets - shard.start, NO_TARGET)
        _refuse_unequal(len(targets), targets.device, shard.group)
        local = _local_stats(hidden, weight, bias, own, head, wanted)
        shards = _gather(local, targets, (shard.start, len(weight), fingerprint), shard.group)
        if targets.device.type == "cpu":
            _refuse_lost(targets, shards)
        whole, log_share = _merge(shards, head["alpha"])
        lost = _lost(targets, shards)
        whole = RowStats(
            whole.lse, whole.target_logit, whole.entropy if wanted["entropy"] else None,
            whole.logit_mean if wanted["logit_mean"] else None, whole.shift, whole.log_total,
        )  # fmt: skip
        # Compute rewards before poisoning the statistics: the row before a lost row needs the lost row's value.
        rewards = successor if successor is None else rewards_of(whole, targets, successor, head["alpha"])
        rewards, whole = rewards and poisoned(rewards, lost), poisoned(whole, lost)
        ctx.shard, ctx.head = shard, head
        ctx.fraction = len(weight) / shards.size.sum()
        share = torch.where(lost, torch.nan, log_share[dist.get_rank(shard.group)])
        ctx.save_for_backward(hidden, weight, bias, own, targets, successor, share, *local, *whole)
        ctx.set_materialize_grads(False)
        found = outputs(whole, rewards)
        ctx.mark_non_differentiable(found[4], found[5])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads):
        hidden, weight, bias, own, targets, successor, log_share, *stats = ctx.saved_tensors
        local, whole = RowStats(*stats[: len(stats) // 2]), RowStats(*stats[len(stats) // 2 :])
        upstream = row_grads(list(grads), targets, successor, whole, ctx.head["alpha"])
        ours = _share_of(upstream, local, whole, log_share, ctx.fraction)
        needs = list(ctx.needs_input_grad[:3])
        found = [torch.zeros_like(x) if need else None for x, need in zip((hidden, weight, bias), needs, strict=True)]
        if len(weight):
            out = linear_stats_backward(
                hidden, weight, bias, own, None, outputs(local, None), *ours[:4], ctx.head["logit_scale"],
                ctx.head["softcap"], ctx.head["alpha"], needs, ctx.head["impl"],
            )  # fmt: skip
            found = [g if need else None for g, need in zip(out, needs, strict=True)]
        if needs[0]:
            # Sum in float32, because each low-precision addition would round. all_reduce needs contiguous memory.
            whole_gradient = found[0].float().contiguous()
            dist.all_reduce(whole_gradient, group=ctx.shard.group)
            found[0] = whole_gradient.to(hidden.dtype)
        return *found, *(None,) * 6


def _local_stats(hidden, weight, bias, own, head, wanted) -> RowStats:
    """Return this shard's statistics. An empty shard counts as logits of -inf."""
    if not len(weight):
        zero = hidden.new_zeros(len(own), dtype=torch.float32)
        dead = torch.full_like(zero, -torch.inf)
        return RowStats(dead, zero, zero, zero, dead, dead)
    out = linear_stats(
        hidden, weight, bias, own, None, None, head["logit_scale"], head["softcap"], head["alpha"], wanted["entropy"],
        wanted["logit_mean"], head["impl"], None, None,
    )[: len(RowStats._fields)]  # fmt: skip
    return RowStats(*(f if f.numel() == len(own) else torch.zeros_like(out[0]) for f in out))


def _refuse_unequal(rows: int, device: torch.device, group: Any) -> None:
    """Raise ValueError on every rank if the numbers of rows differ. gloo would abort the process during the gather.

    Not on a GPU, where reading the result would stall the stream.
    """
    if device.type != "cpu":
        return
    counts = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.full((1,), rows, dtype=torch.int64), group=group)
    numbers = torch.cat(counts)
    if (numbers != rows).any():
        raise ValueError(
            f"the processes that share a head have {numbers.tolist()} rows (after their masks): give every process the "
            "same rows"
        )


def _fingerprint(rows: Tensor) -> Tensor:
    """Hash a set of row numbers into an integer below 2^24, which float32 holds exactly."""
    prime = 16777213
    return ((rows + 1).square() % prime).sum() % prime


def _gather(local: RowStats, targets: Tensor, about: tuple[Any, ...], group: Any) -> Shards:
    """Gather the row statistics of every shard, and `about`: its start, its size and the fingerprint of its mask."""
    total = local.logit_mean * SUM_SCALE * about[1]
    rows = torch.stack([local.shift, local.log_total, local.target_logit, local.entropy, total, targets.float()])
    mine = torch.cat([rows.flatten(), *(rows.new_ones(1) * x for x in about)])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    everyone = torch.stack(gathered)
    return Shards(*everyone[:, : -len(about)].unflatten(1, rows.shape).unbind(1), *everyone[:, -len(about) :].unbind(1))


def _merge(shards: Shards, alpha: float) -> tuple[RowStats, Tensor]:
    """Return statistics of the whole vocabulary, and ln of each shard's share of the probability (shards, N)."""
    shift = shards.shift.amax(0)
    finite = _finite(shift)
    offset = (shards.shift - finite) / alpha + shards.log_total  # -inf for a shard that is empty or all -inf
    log_total = torch.logsumexp(offset, 0)
    log_share = offset - _finite(log_total)
    vocab = shards.size.sum()
    entropy = (log_share.exp() * (shards.entropy - _finite(log_share))).sum(0).clamp(min=0.0)
    entropy = torch.minimum(entropy, vocab.double().log().float())
    lse = finite / alpha + log_total
    return RowStats(
        lse, shards.target_logit.sum(0), entropy, shards.total.sum(0) / vocab / SUM_SCALE, shift, log_total
    ), log_share


def _share_of(upstream: RowGrads, local: RowStats, whole: RowStats, log_share: Tensor, fraction: float) -> RowGrads:
    """Turn gradients of the whole vocabulary's statistics into gradients of this shard's statistics.

    The gradient of target_logit takes effect only in the shard that holds the target: other shards see no target.
    """
    share = log_share.exp()
    lse, entropy, mean = upstream.lse * share, upstream.entropy, upstream.logit_mean
    if entropy is not None:
        lse = lse + entropy * share * (local.entropy - _finite(log_share) - whole.entropy)
        entropy = entropy * share
    return RowGrads(lse, upstream.target_logit, entropy, None if mean is None else mean * fraction)


def _finite(x: Tensor) -> Tensor:
    """Replace -inf by 0. The result is multiplied by a probability of 0."""
    return torch.where(x == -torch.inf, 0.0, x)


def _lost(targets: Tensor, shards: Shards) -> Tensor:
    """Return bool (N,): rows whose statistics are invalid, the same on every rank."""
    vocab = shards.size.sum()
    outside = (targets != NO_TARGET) & ((targets < 0) | (targets >= vocab))
    return outside | ~_split(shards) | _unlike(shards) | (shards.mask != shards.mask[0]).any()


def _split(shards: Shards) -> Tensor:
    """Return whether each vocabulary row is in exactly one shard.

    This holds if, for every shard with rows, the shards that start before it hold `start` rows together and no other
    shard with rows starts at the same row.
    """
    start, size = shards.start, shards.size
    before = (size * (start < start.unsqueeze(1))).sum(1)
    with_it = (size * (start <= start.unsqueeze(1))).sum(1)
    return ((size == 0) | ((before == start) & (with_it == start + size))).all()


def _unlike(shards: Shards) -> Tensor:
    """Return bool (N,): rows for which ranks were given different targets."""
    return (shards.target != shards.target[:1]).any(0)


def _refuse_lost(targets: Tensor, shards: Shards) -> None:
    """Raise ValueError or IndexError, the same on every rank, if a row is lost. CPU only: it would stall a GPU."""
    if not _split(shards):
        ends = zip(shards.start, shards.size, strict=True)
        spans = ", ".join(f"[{int(start)}, {int(start + size)})" for start, size in ends)
        raise ValueError(
            f"shards of the vocabulary overlap or leave a gap: {spans}; expected each row in exactly one shard"
        )
    if (shards.mask != shards.mask[0]).any():
        raise ValueError("the processes that share a head have different masks: give every process the same mask")
    if (unlike := _unlike(shards)).any():
        row = int(unlike.nonzero()[0])
        given = [int(target) for target in shards.target[:, row]]
        raise ValueError(
            f"the processes that share a head have different targets: {given} at row {row} (of those on the mask), "
            "where -100 is no target: give every process the same rows"
        )
    if (lost := _lost(targets, shards)).any():
        row, vocab = int(lost.nonzero()[0]), int(shards.size.sum())
        raise IndexError(
            f"target {int(targets[row])} at row {row} (of those on the mask) is outside the vocabulary [0, {vocab})"
        )
