"""Find the rows of a split head that this process holds, and refuse heads that sharded.py cannot read."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class VocabShard(NamedTuple):
    """Says which rows of the whole vocabulary this process holds: its weight begins with row `start`."""

    group: Any
    """torch.distributed process group whose ranks hold the shards; None: the default group"""
    start: int
    """index in the whole vocabulary of the local weight's first row"""


def localize(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabShard | None, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Return (hidden, weight, bias, shard) as plain local tensors, without the padding behind `vocab_size`.

    A DTensor weight knows its own shard if it is split by vocabulary; gradients flow back into it. Raises ValueError
    for a weight that is split otherwise, or that DeepSpeed ZeRO-3 keeps on other ranks.
    """
    if isinstance(weight, DTensor):
        if shard is not None:
            raise ValueError("weight is a DTensor, which knows its own shard: omit `shard`")
        weight, bias, shard = head_here(weight, bias)
    if isinstance(hidden, DTensor):
        if not all(p.is_replicate() for p in hidden.placements):
            raise ValueError(
                f"hidden is a DTensor placed {hidden.placements}: expected Replicate() on every mesh dimension"
            )
        hidden = hidden.to_local()
    if hasattr(weight, "ds_id") and not weight.numel():
        raise ValueError(
            "weight is empty, because DeepSpeed ZeRO-3 has partitioned it: gather it with GatheredParameters"
        )
    if shard is not None:
        if not isinstance(shard.start, int) or shard.start < 0:
            raise ValueError(f"shard.start={shard.start!r}: expected the index of a row, an int >= 0")
        if dist.get_rank(shard.group) < 0:
            raise ValueError("shard.group does not contain this process: pass the group that holds the shards")
    if vocab_size is not None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: expected 1 or more")
        kept = max(0, vocab_size - (shard.start if shard else 0))
        weight, bias = weight[:kept], bias if bias is None else bias[:kept]
    return hidden, weight, bias, shard


def _of_dtensor(weight: DTensor) -> tuple[Tensor, VocabShard | None]:
    """Return the local rows of a weight (V, D) and their shard; the shard is None if each rank has the whole weight."""
    sizes = weight.device_mesh.shape
    split = [dim for dim, placed in enumerate(weight.placements) if sizes[dim] > 1 and not placed.is_replicate()]
    if not split:
        return weight.to_local(), None
    if len(split) > 1 or not weight.placements[split[0]].is_shard(0):
        raise ValueError(
            f"weight is a DTensor placed {weight.placements}: expected Shard(0), a split by vocabulary, on one mesh "
            "dimension and Replicate() on the others"
        )
    [dim] = split
    each = -(-weight.shape[0] // weight.device_mesh.size(dim))  # as torch.chunk: the last ranks may have fewer or none
    start = each * weight.device_mesh.get_local_rank(dim)
    return weight.to_local(), VocabShard(weight.device_mesh.get_group(dim), start)


def head_here(weight: DTensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """Return the local weight and bias of a DTensor head, and their shard; the shard is None if they are whole.

    The bias must have the weight's placement or Replicate(). A plain tensor must hold this process's rows.
    Raises ValueError for any other placement.
    """
    rows, shard = _of_dtensor(weight)
    if not isinstance(bias, DTensor):
        return rows, bias, shard
    if (bias.device_mesh, bias.placements) == (weight.device_mesh, weight.placements):
        return rows, bias.to_local(), shard
    if not all(p.is_replicate() for p in bias.placements):
        raise ValueError(
            f"bias is a DTensor placed {bias.placements} with a weight placed {weight.placements}: expected the same "
            "placement, or Replicate()"
        )
    start = shard.start if shard else 0
    return rows, bias.to_local()[start : start + len(rows)], shard


# ---------------------------------------------------------------------- for the check of a head (head/check, head/kind)


def why_not_readable(weight: DTensor, bias: Tensor | None) -> str | None:
    """Return why a DTensor head cannot be read shard by shard; None if it can."""
    try:
        head_here(weight, bias)
    except ValueError as error:
        return str(error).removeprefix("weight is ")
    return None


def agreed_by_its_shards(reason: str | None, weight: DTensor) -> str | None:
    """Return `agreed` among the ranks that share a split head; for a whole head, this rank's own reason."""
    try:
        _, shard = _of_dtensor(weight)
    except ValueError:
        return reason
    return reason if shard is None else agreed(reason, shard.group)


def same_everywhere(x: Tensor) -> Tensor:
    """Turn a replicated DTensor into a plain tensor. Return any other tensor unchanged."""
    return x.to_local() if isinstance(x, DTensor) and all(p.is_replicate() for p in x.placements) else x


def agreed(reason: str | None, group: Any) -> str | None:
    """Return the first reason that any rank has not to read the shared head; None if no rank has one.

    All ranks must take the same path. Otherwise some would wait for others in a collective.
    """
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next((r for r in reasons if r is not None), None)
