"""Which implementation runs: the rule behind impl="auto", and the module of each implementation."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .fused import obstacle_to_kernels
from .tuned import Choice, choice_of

AUTO = "auto"
"""impl of the linear operators: they look the head's choice up when they run, so torch.compile does not trace it"""


def standard_impl(device: torch.device, *dtypes: torch.dtype, linear: bool) -> str:
    """Return the implementation for tensors of these dtypes. `linear`: from hidden states, not from stored logits.

    On a GPU it is "fused" if the kernels can run, with one exception. From float32 hidden states on CUDA it is
    "chunked", because the kernel's float32 product runs without tensor cores and reads shared memory with conflicts:
    by arithmetic, a tenth of cuBLAS's rate. AMD's gfx942 multiplies float32 on its matrix units and stays "fused".
    """
    if device.type != "cuda" or obstacle_to_kernels(device, *dtypes):
        return "chunked"
    exact_product = linear and dtypes[0] == torch.float32 and not torch.version.hip
    return "chunked" if exact_product else "fused"


class Configured(NamedTuple):
    """A backend under the setting of a choice, for the linear operators."""

    linear_forward: Callable
    linear_backward: Callable


def backend(impl: str, x: Tensor, weight: Tensor | None = None) -> ModuleType | Configured:
    """Return what runs `impl` for x: logits, or hidden states of a head with this weight.

    Modules are imported on first use. "chunked" from hidden states is `workspace` on a GPU that runs the kernels. AUTO,
    for hidden states only, is what `endoreward tune` chose for the head, or else the rule.
    """
    if impl == AUTO:
        return configured(
            choice_of(x, weight) or Choice(standard_impl(x.device, x.dtype, weight.dtype, linear=True)), x, weight
        )
    if impl == "fused":
        from . import fused as module
    elif impl == "compiled":
        from . import compiled as module
    elif weight is not None and x.device.type == "cuda" and not obstacle_to_kernels(x.device, x.dtype):
        from . import workspace as module
    else:
        from . import chunked as module
    return module


def configured(choice: Choice, hidden: Tensor, weight: Tensor) -> Configured:
    """Return the backend of a choice. Its setting replaces the implementation's own in the forward."""
    module = backend(choice.impl, hidden, weight)
    return Configured(partial(module.linear_forward, **choice.arguments(hidden.device)), module.linear_backward)
