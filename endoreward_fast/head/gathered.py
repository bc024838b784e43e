"""Heads whose weights are there only while they run: FSDP, of both kinds.

It gathers a module's weights before its forward and drops them after it. The gradient of the module's output tells it
to gather them again, and the end of the backward to reduce their gradients. So the vocabulary is read inside the
head's own forward, where its weights are whole, and autograd is given a path that keeps the order:

    what was read -> the head's output -> the model's output -> what is returned

The backward of the reading waits for both of its uses, and by then every module on the path has its weights back. The
output on the path is empty, (B, 0, V), and the gradients along it are zeros.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class Modules(Protocol):
    """A model, or what is around one."""

    def modules(self) -> Iterator[nn.Module]: ...


def weights_come_and_go(model: Modules) -> bool:
    """Whether `fully_shard` or `FullyShardedDataParallel` holds weights of this model, or of a part of it."""
    # By name: importing torch.distributed.fsdp for its classes takes half a second, and a sharded model has done so.
    kinds = {kind.__name__ for found in {type(module) for module in model.modules()} for kind in found.__mro__}
    return not kinds.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def behind(x: Any, others: Any) -> Any:
    """x, made to depend on others: in the backward, nothing of theirs runs before all gradients of x are known.

    x is a tensor or a tuple of some, others too; what is no floating-point tensor stays as it is.
    """
    awaited = [leaf for leaf in tree_leaves(others) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def tied(leaf: Tensor) -> Tensor:
        return _Behind.apply(leaf, *awaited) if awaited and leaf.is_floating_point() else leaf

    return tree_map_only(Tensor, tied, x)


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(other.shape, other.dtype, other.device) for other in others]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
