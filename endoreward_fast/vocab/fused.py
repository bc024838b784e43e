"""The Triton backend. It chooses a kernel config for the device and launches. It has the same functions as `chunked`.

Rows off the mask cost nothing. The logits kernels return at once for them, and the linear path gathers the others on
the device. No number is read back to the host, so a CUDA graph can capture every forward.
"""

import importlib.util
import os
from dataclasses import replace

import torch
from torch import Tensor

from . import workspace
from .rows import RowGrads, RowRewards, RowStats

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace it
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter on the CPU. Triton reads the variable once, on import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle_to_kernels(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Return why the kernels cannot run on this device, on tensors of these dtypes if given; None if they can."""
    if not TRITON_IS_INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device.type!r}, and the kernels need a CUDA or ROCm device"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtypes and (dtypes[0] not in KERNEL_DTYPES or len(set(dtypes)) > 1):
        found = " with ".join(map(str, dtypes))
        return f"the kernels take one of bfloat16, float16 and float32, not {found}"
    return None


def logits_forward(
    logits: Tensor, targets: Tensor, *, mask, alpha: float | Tensor, entropy: bool, logit_mean: bool, successor=None,
    named=None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    from ..kernels.combine import combine
    from ..kernels.vocab_stats import logits_partials

    vocab = logits.shape[-1]
    targets, mask, successor, named = _dense(targets, mask, successor, named)
    alpha = _dense_alpha(alpha)
    partials = logits_partials(
        logits, targets, needed=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, named=named,
        config=_logits_config(vocab),
    )  # fmt: skip
    stats, rewards = combine(partials, targets, vocab=vocab, alpha=alpha, needed=mask, successor=successor, named=named)
    return RowStats(*stats), rewards and RowRewards(*rewards)


def logits_backward(
    logits: Tensor, targets: Tensor, stats: RowStats, grads: RowGrads, *, mask, alpha: float | Tensor, named=None
) -> Tensor:
    from ..kernels.vocab_stats import logits_backward as launch

    targets, mask, named, *grads = _dense(targets, mask, named, *grads)
    return launch(
        logits, targets, stats.shift, stats.log_total, stats.entropy, *grads,
        needed=mask, alpha=_dense_alpha(alpha), named=named, config=_logits_config(logits.shape[-1]),
    )  # fmt: skip


def linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask=None, bias, logit_scale: float, softcap,
    alpha: float | Tensor, entropy: bool, logit_mean: bool, successor=None, named=None, config=None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    """Run the linear kernel. `config` replaces the table's; a HopperConfig runs the candidate for Hopper.

    alpha is one temperature, or one for each row (N,). named (K,) are tokens whose log-probabilities are wanted too.
    """
    from ..kernels.combine import combine
    from ..kernels.primitives import Head
    from ..kernels.rows import keep

    bias, targets, mask, successor, named = _dense(bias, targets, mask, successor, named)
    alpha = _dense_alpha(alpha)
    kept = None if mask is None else keep(mask)
    partials = _linear_partials(
        hidden, weight, targets, config, head=Head(bias, logit_scale, softcap), alpha=alpha, entropy=entropy,
        logit_mean=logit_mean, kept=kept, named=named,
    )  # fmt: skip
    stats, rewards = combine(
        partials, targets, vocab=len(weight), alpha=alpha, needed=mask, place=kept and kept.place, successor=successor,
        named=named,
    )  # fmt: skip
    return RowStats(*stats), rewards and RowRewards(*rewards)


def _linear_partials(hidden: Tensor, weight: Tensor, targets: Tensor, config, *, alpha, named, **wanted):
    from ..kernels.config import INTERPRETER_CONFIG, LinearConfig, linear_config, tma_pays, vocab_split
    from ..kernels.linear_vocab_stats import linear_partials, tma_usable

    processors = _processors(hidden.device)
    if not isinstance(config, LinearConfig | None):
        from ..kernels.hopper_vocab_stats import BLOCK_V, hopper_partials

        if named is not None or isinstance(alpha, Tensor):
            raise ValueError("the candidate for Hopper takes one alpha for all rows, and no named tokens: use another")
        config = replace(config, split=vocab_split(len(weight), BLOCK_V, processors))
        return hopper_partials(hidden, weight, targets, config=config, programs=processors, alpha=alpha, **wanted)
    arch = _arch(hidden.device)
    size = hidden.element_size()
    tma = arch is not None and tma_pays(arch, size) and tma_usable(weight)
    if config is None:
        config = INTERPRETER_CONFIG if arch is None else linear_config(arch, size, tma)
    return linear_partials(
        hidden, weight, targets, config=config, split=vocab_split(len(weight), config.block_v, processors), tma=tma,
        interpreted=arch is None, programs=config.persistent and config.persistent * processors, alpha=alpha,
        named=named, **wanted,
    )  # fmt: skip


# The forward keeps no logits. The backward recomputes them through the workspace.
linear_backward = workspace.linear_backward


def _dense(*rows: Tensor | None) -> list[Tensor | None]:
    """Make per-row tensors contiguous for the kernels. The gradient of a sum, for example, has stride 0."""
    return [None if x is None else x.contiguous() for x in rows]


def _dense_alpha(alpha: float | Tensor) -> float | Tensor:
    return alpha if isinstance(alpha, float) else alpha.contiguous()  # isinstance(alpha, Tensor) takes 0.2 us


def _arch(device: torch.device) -> int | str | None:
    """Return the major compute capability, "hip" on ROCm, or None in the interpreter."""
    if interpreted():
        return None
    return "hip" if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # in the interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _logits_config(vocab: int):
    from ..kernels.config import LogitsConfig, interpreter_logits_config

    return interpreter_logits_config(vocab) if interpreted() else LogitsConfig()
