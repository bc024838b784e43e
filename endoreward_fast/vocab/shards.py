"""Which rows of a split head this process holds, and whether they can be read; sharded.py reads them."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class VocabShard(NamedTuple):
    """Which rows of a head's weight this process holds: those from `start` on, of the whole vocabulary."""

    group: Any
    """torch.distributed process group whose ranks hold the shards; None: the default group"""
    start: int
    """the whole vocabulary's row that the local weight begins with"""


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
        weight, bias, shard = head_here(weight, bias)
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
    sizes = weight.device_mesh.shape
    split = [dim for dim, placed in enumerate(weight.placements) if sizes[dim] > 1 and not placed.is_replicate()]
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


def head_here(weight: DTensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """What of a DTensor head lies here, weight and bias, and which of its rows that is; None: all of them.

    The bias is placed as the weight, or the whole one on every rank; a plain tensor is this process's own rows.
    Raises ValueError for a head that cannot be read so.
    """
    rows, shard = _of_dtensor(weight)
    if not isinstance(bias, DTensor):
        return rows, bias, shard
    if (bias.device_mesh, bias.placements) == (weight.device_mesh, weight.placements):
        return rows, bias.to_local(), shard
    if not all(p.is_replicate() for p in bias.placements):
        raise ValueError(
            f"bias is a DTensor placed {bias.placements} beside a weight placed {weight.placements}: expected the same "
            "placement, or Replicate()"
        )
    start = shard.start if shard else 0
    return rows, bias.to_local()[start : start + len(rows)], shard


# ---------------------------------------------------------------------- for the check of a head (head_check, head_kind)


def why_not_readable(weight: DTensor, bias: Tensor | None) -> str | None:
    """Why a DTensor head cannot be read shard by shard; None if it can."""
    try:
        head_here(weight, bias)
    except ValueError as error:
        return str(error).removeprefix("weight is ")
    return None


def agreed_by_its_shards(reason: str | None, weight: DTensor) -> str | None:
    """`agreed` among the ranks that share a head; this rank's own reason where none do."""
    try:
        _, shard = _of_dtensor(weight)
    except ValueError:
        return reason
    return reason if shard is None else agreed(reason, shard.group)


def same_everywhere(x: Tensor) -> Tensor:
    """A replicated DTensor as the plain tensor that it is on every rank; a plain one as it is."""
    return x.to_local() if isinstance(x, DTensor) and all(p.is_replicate() for p in x.placements) else x


def agreed(reason: str | None, group: Any) -> str | None:
    """The first rank's reason not to read the head that they share, or to refuse it: the ranks have to take the same
    path, or some would wait for others that do not come."""
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next((r for r in reasons if r is not None), None)
