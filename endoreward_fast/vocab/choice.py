"""Which implementation runs: the rule behind impl="auto", and the module of each implementation."""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .fused import obstacle_to_kernels
from .tuned import Choice, stored_choice

AUTO = "auto"
"""impl of the linear operators: they look the head's choice up when they run, so torch.compile does not trace it"""


Impl = Literal["auto", "fused", "chunked", "compiled", "reference"]


def choose_impl(
    impl: Impl, device: torch.device, *dtypes: torch.dtype, linear: bool = False, extras: bool = False
) -> str:
    """Return the implementation to run. Raises ValueError for an impl that cannot run.

    linear   whether the statistics are computed from hidden states, not from stored logits
    extras   whether alpha is a tensor, or tokens are named. "compiled" can do neither, and "auto" then ignores a tuning
             that chose it, or the candidate kernel for Hopper

    "auto" follows a rule. From hidden states, what `endoreward tune` chose for the head replaces the rule when the
    operator runs (vocab/tuned.py). Without a tuning:

    "auto" is "fused" on CUDA and ROCm devices if Triton is installed and all tensors have one dtype out of bf16, fp16
    and fp32; otherwise "chunked". From fp32 hidden states on CUDA it is "chunked": cuBLAS multiplies exact fp32 several
    times as fast as the kernel does (estimated from compiled code). The product follows torch's settings, so it is
    exact unless the caller allows TF32. On the CPU "auto" is always "chunked". TRITON_INTERPRET=1 does not change that:
    the interpreter is for tests. An existing build of "compiled" does not change it either: a default must not depend
    on earlier runs on the machine.
    """
    if impl not in ("auto", "fused", "chunked", "compiled", "reference"):
        raise ValueError(f"impl={impl!r}: expected 'auto', 'fused', 'chunked', 'compiled' or 'reference'")
    if impl == "compiled" and device.type != "cpu":
        raise ValueError(
            f"impl='compiled' cannot run here: the tensors are on {device.type!r}, and it runs on the CPU only"
        )
    if impl == "compiled" and extras:
        raise ValueError("impl='compiled' takes one alpha for all rows, and no named tokens: use impl='chunked'")
    if impl == "auto":
        return standard_impl(device, *dtypes, linear=linear)
    obstacle = obstacle_to_kernels(device, *dtypes) if impl == "fused" else None
    if obstacle:
        raise ValueError(f"impl='fused' cannot run here: {obstacle}; impl='auto' would choose 'chunked'")
    return impl


def uses_kernels(chosen: str, device: torch.device) -> bool:
    """Return whether this implementation launches Triton kernels on this device."""
    return chosen == "fused" or (chosen == "chunked" and device.type == "cuda" and not obstacle_to_kernels(device))


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
    """A backend under a setting, for the linear operators."""

    linear_forward: Callable[..., Any]
    linear_backward: Callable[..., Any]


def backend(impl: str, x: Tensor, weight: Tensor | None = None, *, extras: bool = False) -> ModuleType | Configured:
    """Return what runs `impl` for x: logits, or hidden states of a head with this weight.

    `extras` says that rows have temperatures of their own, or that tokens are named. Of the choices that AUTO finds,
    "compiled" and the candidate for Hopper lack both, so AUTO then takes the rule's implementation.

    Modules are imported on first use. "chunked" from hidden states is `workspace` on a GPU that runs the kernels. AUTO,
    for hidden states only, is what `endoreward tune` chose for the head, or else the rule.
    """
    if impl == AUTO and weight is not None:
        impl, arguments = _auto(x.device, x.dtype, weight.dtype, weight.shape[1], weight.shape[0])
        if extras and not _takes_extras(impl, arguments):
            impl, arguments = standard_impl(x.device, x.dtype, weight.dtype, linear=True), {}
        if impl == "fused" and arguments and not _measured_like(weight):
            arguments = {}
        return _configured(impl, arguments, x, weight)
    on_gpu = weight is not None and x.device.type == "cuda"
    if impl == "chunked" and on_gpu and not obstacle_to_kernels(x.device, x.dtype):
        impl = "workspace"
    return import_module(f".{impl}", __package__)


def _takes_extras(impl: str, arguments: dict[str, Any]) -> bool:
    from ..kernels.config import LinearConfig

    return impl != "compiled" and isinstance(arguments.get("config"), LinearConfig | None)


def _measured_like(weight: Tensor) -> bool:
    """Return whether weight has aligned rows, as in a measurement. For others the table has smaller tiles."""
    from ..kernels.linear_vocab_stats import tma_usable

    return tma_usable(weight)


def configured(choice: Choice, hidden: Tensor, weight: Tensor) -> Configured:
    """Return the backend of a choice. Its setting replaces the implementation's own in the forward."""
    return _configured(choice.impl, choice.arguments(hidden.device), hidden, weight)


def _configured(impl: str, arguments: dict[str, Any], hidden: Tensor, weight: Tensor) -> Configured:
    module = backend(impl, hidden, weight)
    return Configured(partial(module.linear_forward, **arguments), module.linear_backward)


@cache
def _auto(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int, vocab: int
) -> tuple[str, dict[str, Any]]:
    """Return the implementation that `auto` takes for a head and the arguments of its forward. Reads a file once."""
    found = stored_choice(device, dtype, dim, vocab) if dtype == weight_dtype else None
    found = found or Choice(standard_impl(device, dtype, weight_dtype, linear=True))
    return found.impl, found.arguments(device)


def forget() -> None:
    """Look every head up again: the stored choices or the environment have changed."""
    _auto.cache_clear()
