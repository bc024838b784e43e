"""Support for FSDP1 and FSDP2, where a head has its weights only while it runs.

FSDP gathers a module's weights before its forward and frees them afterwards. When the gradient of the module's output
arrives, FSDP gathers the weights again; at the end of the backward it reduces their gradients. The vocabulary is
therefore read inside the head's forward, where the weights are whole, and an autograd path keeps the order:

    result of the reader -> the head's output -> the model's output -> returned value

The backward of the reader waits for the gradients of both uses of its result. By then every module on the path has its
weights again. The output on the path is empty, (B, 0, V), and the gradients along the path are zeros.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class Modules(Protocol):
    """A model, or a wrapper around one."""

    def modules(self) -> Iterator[nn.Module]: ...


def weights_come_and_go(model: Modules) -> bool:
    """Return whether `fully_shard` or `FullyShardedDataParallel` shards this model or a part of it."""
    # Compare names: importing torch.distributed.fsdp for the classes takes half a second.
    kinds = {kind.__name__ for found in {type(module) for module in model.modules()} for kind in found.__mro__}
    return not kinds.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def behind(x: Any, others: Any) -> Any:
    """Make x depend on others: the backward of others starts only after all gradients of x are known.

    x and others are tensors or nested tuples of tensors. Tensors of x that are not floating-point stay unchanged.
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
