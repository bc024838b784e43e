"""A head whose vocabulary is split over processes: each reads its own rows, and O(N) numbers cross the wire.

    shard r has  shift_r = max z,  log_total_r = ln sum exp((z - shift_r) / alpha),  H_r of its own softmax,  sum z

    share_r   = exp(lse_r - lse)                               lse = logsumexp_r lse_r
    entropy   = sum_r share_r (H_r - ln share_r)               logit_mean = sum_r (sum z) / V

One all_gather of six float32 a row in the forward (on the CPU one of a single number before it, see `_refuse_unequal`);
in the backward every shard takes its share of the upstream gradients, and one all_reduce adds up what the shards say
of `hidden`. As in every tensor-parallel layer, all ranks hold the same hidden states and ask for the same gradients,
and have to be given the same upstream gradients.
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
    """What each shard says, float32: of each row (shards, N), and of itself (shards,)."""

    shift: Tensor
    log_total: Tensor
    target_logit: Tensor
    """0 where another shard has the target"""
    entropy: Tensor
    total: Tensor
    """sum of z"""
    target: Tensor
    """which token was asked for, -100 off the mask: float32 counts to 2^24"""
    start: Tensor
    size: Tensor
    """vocabulary entries"""


def sharded_linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
    successor: Tensor | None, logit_scale: float, softcap: float | None, alpha: float, entropy: bool,
    logit_mean: bool, impl: str, shard: VocabShard,
) -> list[Tensor]:  # fmt: skip
    """`ops.linear_stats` of the whole vocabulary from this process's rows of it; `targets` are of the whole one.

    Every rank returns the same. On the CPU, on every rank alike, IndexError for a target outside the vocabulary, and
    ValueError for shards that overlap or leave a gap and for ranks that were given different targets, masks or numbers
    of rows. On a device such rows come back NaN; the number of rows is not compared there.
    """
    head = {"logit_scale": logit_scale, "softcap": softcap, "alpha": alpha, "impl": impl}
    wanted = {"entropy": entropy, "logit_mean": logit_mean}
    return list(_ShardedLinear.apply(hidden, weight, bias, targets, mask, successor, shard, head, wanted))


class _ShardedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, mask, successor, shard, head, wanted):
        asked = targets if mask is None else torch.where(mask, targets, NO_TARGET)
        here = (asked >= shard.start) & (asked < shard.start + len(weight))
        own = torch.where(here, asked - shard.start, NO_TARGET)
        _refuse_unequal(len(targets), targets.device, shard.group)
        local = _local_stats(hidden, weight, bias, own, mask, head, wanted)
        shards = _gather(local, asked, shard.start, len(weight), shard.group)
        whole, log_share = _merge(shards, head["alpha"])
        lost = _lost(asked, shards)
        whole = RowStats(
            whole.lse, whole.target_logit, whole.entropy if wanted["entropy"] else None,
            whole.logit_mean if wanted["logit_mean"] else None, whole.shift, whole.log_total,
        )  # fmt: skip
        whole = _only(mask, poisoned(whole, lost))
        rewards = None if successor is None else rewards_of(whole, targets, successor, head["alpha"])
        ctx.shard, ctx.head = shard, head
        ctx.fraction = len(weight) / shards.size.sum()
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
            # In low precision each addition would round once more; and what is added is memory, whatever its strides.
            whole_gradient = found[0].float().contiguous()
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


def _refuse_unequal(rows: int, device: torch.device, group: Any) -> None:
    """ValueError, on every rank, unless all have as many rows: gloo would end the process in the middle of a gather.

    On a device, reading what was gathered would stall the stream.
    """
    if device.type != "cpu":
        return
    counts = [torch.empty(1) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.full((1,), float(rows)), group=group)
    numbers = torch.cat(counts)
    if (numbers != rows).any():
        raise ValueError(
            f"the processes that share a head gave {numbers.long().tolist()} rows: expected the same rows on every one"
        )


def _gather(local: RowStats, asked: Tensor, start: int, size: int, group: Any) -> Shards:
    """Every shard's numbers: the one collective of the forward that grows with N."""
    rows = torch.stack(
        [local.shift, local.log_total, local.target_logit, local.entropy, local.logit_mean * size, asked.float()]
    )
    mine = torch.cat([rows.flatten(), *(rows.new_full((1,), x) for x in (start, size))])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    everyone = torch.stack(gathered)
    return Shards(*everyone[:, :-2].unflatten(1, rows.shape).unbind(1), everyone[:, -2], everyone[:, -1])


def _merge(shards: Shards, alpha: float) -> tuple[RowStats, Tensor]:
    """Statistics of the whole vocabulary, and ln of each shard's share of the probability (shards, N)."""
    shift = shards.shift.amax(0)
    finite = _finite(shift)
    offset = (shards.shift - finite) / alpha + shards.log_total  # -inf for a shard of nothing, or of nothing but -inf
    log_total = torch.logsumexp(offset, 0)
    log_share = offset - _finite(log_total)
    vocab = shards.size.sum()
    entropy = (log_share.exp() * (shards.entropy - _finite(log_share))).sum(0).clamp(min=0.0)
    entropy = torch.minimum(entropy, vocab.double().log().float())
    lse = finite / alpha + log_total
    return RowStats(lse, shards.target_logit.sum(0), entropy, shards.total.sum(0) / vocab, shift, log_total), log_share


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


def _lost(asked: Tensor, shards: Shards) -> Tensor:
    """Rows (N,) whose statistics mean nothing; on the CPU an error says why, the same on every rank."""
    start, size, vocab = shards.start, shards.size, shards.size.sum()
    before = (size * (start < start.unsqueeze(1))).sum(1)  # entries in shards that begin further down
    split = ((size == 0) | (start == before)).all() & ((start + size) * (size > 0)).amax().eq(vocab)
    unlike = (shards.target != shards.target[:1]).any(0)
    outside = (asked != NO_TARGET) & ((asked < 0) | (asked >= vocab))
    if asked.device.type == "cpu":
        if not split:
            spans = ", ".join(f"[{int(a)}, {int(a + n)})" for a, n in zip(start, size, strict=True))
            raise ValueError(f"shards of the vocabulary overlap or leave a gap: {spans}; expected each row in one")
        if unlike.any():
            row = int(unlike.nonzero()[0])
            given = [int(target) for target in shards.target[:, row]]
            raise ValueError(
                f"the processes that share a head were given different targets, {given} at row {row} (-100: none, or "
                "off the mask): expected the same rows on every one"
            )
        if outside.any():
            row = int(outside.nonzero()[0])
            raise IndexError(
                f"target {int(asked[row])} at row {row} is outside the vocabulary's shards, {int(vocab)} rows"
            )
    return ~split | unlike | outside


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
    if shard is not None:
        if not isinstance(shard.start, int) or shard.start < 0:
            raise ValueError(f"shard.start={shard.start!r}: expected the number of a row, an int >= 0")
        if dist.get_rank(shard.group) < 0:
            raise ValueError("shard.group does not have this process in it")
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
    start = each * weight.device_mesh.get_local_rank(dim)
    return weight.to_local(), VocabShard(weight.device_mesh.get_group(dim), start)


# ---------------------------------------------------------------------- for the check of a head (head_check, head_kind)


def why_not_readable(weight: Tensor) -> str | None:
    """Why a DTensor head cannot be read shard by shard; None if it can."""
    try:
        _of_dtensor(weight)
    except ValueError as error:
        return str(error).removeprefix("weight is ")
    return None


def rows_here(x: Tensor | None) -> tuple[Tensor | None, VocabShard | None]:
    """What of a head's weight or bias lies here, and which of its rows that is; None: all of them."""
    return _of_dtensor(x) if isinstance(x, DTensor) else (x, None)


def same_everywhere(x: Tensor) -> Tensor:
    """A replicated DTensor as the plain tensor that it is on every rank; a plain one as it is."""
    return x.to_local() if isinstance(x, DTensor) and all(p.is_replicate() for p in x.placements) else x


def agreed(reason: str | None, group: Any) -> str | None:
    """The first rank's reason not to read the head that they share: the ranks have to take the same path."""
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next((r for r in reasons if r is not None), None)
