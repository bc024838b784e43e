"""A head whose vocabulary is split over processes: each reads its own rows, and O(N) numbers cross the wire.

    shard r has  shift_r = max z,  log_total_r = ln sum exp((z - shift_r) / alpha),  H_r of its own softmax,  sum z

    share_r   = exp(lse_r - lse)                               lse = logsumexp_r lse_r
    entropy   = sum_r share_r (H_r - ln share_r)               logit_mean = sum_r (sum z) / V

One all_gather of at most seven float32 a row in the forward; in the backward every shard takes its share of the
upstream gradients, and one all_reduce adds up what the shards say of `hidden`. As in every tensor-parallel layer, all
ranks hold the same hidden states, and have to be given the same upstream gradients.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .ops import linear_stats, linear_stats_backward, outputs, row_grads
from .rows import RowGrads, RowStats, poisoned, rewards_of
from .types import NO_TARGET


class VocabShard(NamedTuple):
    """Which rows of a head's weight this process holds: those from `start` on, of the whole vocabulary."""

    group: Any
    """torch.distributed process group whose ranks hold the shards; None: the default group"""
    start: int
    """the whole vocabulary's row that the local weight begins with"""


class Shards(NamedTuple):
    """What each shard says of each row: (N,) float32 of one, (shards, N) of all."""

    shift: Tensor
    log_total: Tensor
    target_logit: Tensor
    """0 where another shard has the target"""
    has_target: Tensor
    """1 or 0"""
    entropy: Tensor
    total: Tensor
    """sum of z"""
    size: Tensor
    """vocabulary entries"""


def sharded_linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
    successor: Tensor | None, logit_scale: float, softcap: float | None, alpha: float, entropy: bool,
    logit_mean: bool, impl: str, shard: VocabShard,
) -> list[Tensor]:  # fmt: skip
    """`ops.linear_stats` of the whole vocabulary from this process's rows of it; `targets` are of the whole one.

    Every rank returns the same. On the CPU, IndexError for a target that no shard has and ValueError for one that two
    have, on every rank alike; on a device such a row comes back NaN.
    """
    head = {"logit_scale": logit_scale, "softcap": softcap, "alpha": alpha, "impl": impl}
    wanted = {"entropy": entropy, "logit_mean": logit_mean}
    return list(_ShardedLinear.apply(hidden, weight, bias, targets, mask, successor, shard, head, wanted))


class _ShardedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, mask, successor, shard, head, wanted):
        here = (targets >= shard.start) & (targets < shard.start + len(weight))
        own = torch.where(here, targets - shard.start, NO_TARGET)
        local = _local_stats(hidden, weight, bias, own, mask, head, wanted)
        shards = _gather(local, here, len(weight), shard.group)
        whole, log_share = _merge(shards, head["alpha"])
        lost = _lost(targets, mask, shards)
        whole = RowStats(
            whole.lse, whole.target_logit, whole.entropy if wanted["entropy"] else None,
            whole.logit_mean if wanted["logit_mean"] else None, whole.shift, whole.log_total,
        )  # fmt: skip
        whole = _only(mask, poisoned(whole, lost))
        rewards = None if successor is None else rewards_of(whole, targets, successor, head["alpha"])
        ctx.shard, ctx.head = shard, head
        ctx.fraction = len(weight) / shards.size[:, 0].sum().item() if len(targets) else 0.0
        share = log_share[dist.get_rank(shard.group)]
        ctx.save_for_backward(hidden, weight, bias, own, targets, mask, successor, share, *local, *whole)
        ctx.set_materialize_grads(False)
        found = outputs(whole, rewards)
        ctx.mark_non_differentiable(found[4], found[5])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads):
        hidden, weight, bias, own, targets, mask, successor, log_share, *stats = ctx.saved_tensors
        local, whole = RowStats(*stats[:6]), RowStats(*stats[6:])
        upstream = row_grads(list(grads), targets, successor, whole, ctx.head["alpha"])
        ours = _share_of(upstream, local, whole, log_share, ctx.fraction)
        needs = list(ctx.needs_input_grad[:3])
        found = [torch.zeros_like(x) if need else None for x, need in zip((hidden, weight, bias), needs, strict=True)]
        if len(weight):
            out = linear_stats_backward(
                hidden, weight, bias, own, mask, outputs(local, None), *ours, ctx.head["logit_scale"],
                ctx.head["softcap"], ctx.head["alpha"], needs, ctx.head["impl"],
            )  # fmt: skip
            found = [g if need else None for g, need in zip(out, needs, strict=True)]
        if needs[0]:
            whole_gradient = found[0].float()  # in low precision each addition would round once more
            dist.all_reduce(whole_gradient, group=ctx.shard.group)
            found[0] = whole_gradient.to(hidden.dtype)
        return *found, *(None,) * 6


def _local_stats(hidden, weight, bias, own, mask, head, wanted) -> RowStats:
    """This shard's statistics; one that has no rows says what a row of -inf would."""
    if not len(weight):
        zero = hidden.new_zeros(len(own), dtype=torch.float32)
        dead = torch.full_like(zero, -torch.inf)
        return RowStats(dead, zero, zero, zero, dead, dead)
    out = linear_stats(
        hidden, weight, bias, own, mask, None, head["logit_scale"], head["softcap"], head["alpha"], wanted["entropy"],
        wanted["logit_mean"], head["impl"],
    )[: len(RowStats._fields)]  # fmt: skip
    return RowStats(*(f if f.numel() == len(own) else torch.zeros_like(out[0]) for f in out))


def _gather(local: RowStats, here: Tensor, size: int, group: Any) -> Shards:
    """Every shard's numbers: the one collective of the forward."""
    sizes = torch.full_like(local.lse, size)
    mine = Shards(
        local.shift, local.log_total, local.target_logit, here.float(), local.entropy, local.logit_mean * size, sizes
    )
    stacked = torch.stack(mine)
    gathered = [torch.empty_like(stacked) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, stacked, group=group)
    return Shards(*torch.stack(gathered, 1))


def _merge(shards: Shards, alpha: float) -> tuple[RowStats, Tensor]:
    """Statistics of the whole vocabulary, and ln of each shard's share of the probability (shards, N)."""
    shift = shards.shift.amax(0)
    finite = _finite(shift)
    offset = (shards.shift - finite) / alpha + shards.log_total  # -inf for a shard of nothing, or of nothing but -inf
    log_total = torch.logsumexp(offset, 0)
    log_share = offset - _finite(log_total)
    entropy = (log_share.exp() * (shards.entropy - _finite(log_share))).sum(0).clamp(min=0.0)
    mean = shards.total.sum(0) / shards.size.sum(0)
    lse = finite / alpha + log_total
    return RowStats(lse, shards.target_logit.sum(0), entropy, mean, shift, log_total), log_share


def _share_of(upstream: RowGrads, local: RowStats, whole: RowStats, log_share: Tensor, fraction: float) -> RowGrads:
    """Gradients of the whole vocabulary's statistics -> of this shard's. The target's reaches the one that has it: in
    the others that row has no target."""
    share = log_share.exp()
    lse, entropy, mean = upstream.lse * share, upstream.entropy, upstream.logit_mean
    if entropy is not None:
        lse = lse + entropy * share * (local.entropy - _finite(log_share) - whole.entropy)
        entropy = entropy * share
    return RowGrads(lse, upstream.target_logit, entropy, None if mean is None else mean * fraction)


def _finite(x: Tensor) -> Tensor:
    """x, with 0 for -inf, where that stands next to a probability of 0."""
    return torch.where(x == -torch.inf, 0.0, x)


def _only(mask: Tensor | None, stats: RowStats) -> RowStats:
    return stats if mask is None else RowStats(*(None if f is None else torch.where(mask, f, 0.0) for f in stats))


def _lost(targets: Tensor, mask: Tensor | None, shards: Shards) -> Tensor:
    """Rows whose target is in no shard, or in more than one."""
    holders = shards.has_target.sum(0)
    lost = (targets != NO_TARGET) & (holders != 1)
    if mask is not None:
        lost = lost & mask
    if targets.device.type == "cpu" and lost.any():
        row = int(lost.nonzero()[0])
        vocab = int(shards.size[:, 0].sum())
        if holders[row] > 1:
            raise ValueError(
                f"target {int(targets[row])} is in {int(holders[row])} shards of the vocabulary: they overlap"
            )
        raise IndexError(f"target {int(targets[row])} at row {row} is outside the vocabulary's shards, {vocab} rows")
    return lost


# ------------------------------------------------------------------------------------------- which rows are held here


def localize(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabShard | None, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Plain tensors of what this process holds, and which rows those are; `vocab_size` cuts off the padding behind it.

    A DTensor weight that is sharded by vocabulary says itself which; gradients flow back into it. Raises ValueError for
    one that is split otherwise, or that DeepSpeed's ZeRO-3 keeps elsewhere.
    """
    if isinstance(weight, DTensor):
        if shard is not None:
            raise ValueError("weight is a DTensor, which knows its own shard: leave `shard` out")
        weight, shard = _of_dtensor(weight)
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    if isinstance(hidden, DTensor):
        if not all(p.is_replicate() for p in hidden.placements):
            raise ValueError(f"hidden is a DTensor placed {hidden.placements}: expected the same on every rank")
        hidden = hidden.to_local()
    if hasattr(weight, "ds_id") and not weight.numel():
        raise ValueError("weight is empty: DeepSpeed ZeRO-3 keeps it elsewhere; gather it with GatheredParameters")
    if vocab_size is not None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: expected 1 or more")
        kept = max(0, vocab_size - (shard.start if shard else 0))
        weight, bias = weight[:kept], bias if bias is None else bias[:kept]
    return hidden, weight, bias, shard


def _of_dtensor(weight: DTensor) -> tuple[Tensor, VocabShard | None]:
    """The local rows of a weight (V, D), and where they lie; None for a weight that is whole on every rank."""
    split = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not split:
        return weight.to_local(), None
    if len(split) > 1 or not weight.placements[split[0]].is_shard(0):
        raise ValueError(
            f"weight is a DTensor placed {weight.placements}: it can be read split over one mesh dimension by "
            "vocabulary, Shard(0), and not by its width or in parts to be added"
        )
    [dim] = split
    each = -(-weight.shape[0] // weight.device_mesh.size(dim))  # as torch.chunk: the last ones may have less, or none
    start = min(weight.shape[0], each * weight.device_mesh.get_local_rank(dim))
    return weight.to_local(), VocabShard(weight.device_mesh.get_group(dim), start)


# -------------------------------------------------------------------------------- for the check of a head (head_check)


def why_not_readable(weight: Tensor) -> str | None:
    """Why a DTensor head cannot be read shard by shard; None if it can."""
    try:
        _of_dtensor(weight)
    except ValueError as error:
        return str(error).removeprefix("weight is ")
    return None


def rows_here(x: Tensor | None) -> tuple[Tensor | None, int]:
    """What of a head's weight or bias lies here, and which row it begins with."""
    if not isinstance(x, DTensor):
        return x, 0
    local, shard = _of_dtensor(x)
    return local, shard.start if shard else 0


def same_everywhere(x: Tensor) -> Tensor:
    """A replicated DTensor as the plain tensor that it is on every rank; a plain one as it is."""
    return x.to_local() if isinstance(x, DTensor) and all(p.is_replicate() for p in x.placements) else x


def agreed(reason: str | None, weight: Tensor) -> str | None:
    """The first rank's reason not to read the head: the ranks have to take the same path."""
    _, shard = _of_dtensor(weight)
    if shard is None:
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size(shard.group)
    dist.all_gather_object(reasons, reason, group=shard.group)
    return next((r for r in reasons if r is not None), None)
