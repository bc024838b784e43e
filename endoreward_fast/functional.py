"""The public functions on tensors: check the arguments, choose an implementation, flatten, run, shift back.

Formulas are in reference.py's head. Every function returns float32, never writes to its inputs, and differentiates
through every field. `mask` picks the rows that are computed; the others come back 0 and get no gradient.

impl  "fused"      Triton kernels: a CUDA or ROCm device (or TRITON_INTERPRET=1, for tests)
      "chunked"    bounded workspace, in torch: any device
      "compiled"   C++, built once by the machine's compiler when first asked for, then kept: CPU
      "reference"  eager torch, everything materialised: the oracle
      "auto"       see `choose_impl`
A named impl that cannot run raises; it never falls back.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .types import NO_TARGET, TokenRewards, VocabStats
from .vocab import reference
from .vocab.checks import check_linear, check_logits, check_reverse_mode, check_rewards, check_rows

if TYPE_CHECKING:
    from .vocab.shards import VocabShard

Impl = Literal["auto", "fused", "chunked", "compiled", "reference"]


def choose_impl(impl: Impl, device: torch.device, *dtypes: torch.dtype) -> str:
    """The rule behind impl="auto", and the refusal of an impl that cannot run.

    auto: "fused" on CUDA and ROCm devices where Triton is installed and the dtypes are one of bf16, fp16 and fp32;
    "chunked" otherwise. On the CPU it is chunked even under TRITON_INTERPRET=1: the interpreter is for tests; and never
    "compiled", even where that has been built before: a default must not depend on what else ran on the machine.
    """
    if impl not in ("auto", "fused", "chunked", "compiled", "reference"):
        raise ValueError(f"impl={impl!r}: expected 'auto', 'fused', 'chunked', 'compiled' or 'reference'")
    if impl == "compiled":
        if device.type != "cpu":
            raise ValueError(f"impl='compiled' cannot run here: it is for the CPU, and its tensors on {device.type!r}")
        return impl
    if impl in ("chunked", "reference"):
        return impl
    from .vocab.fused import obstacle_to_kernels

    obstacle = obstacle_to_kernels(device, *dtypes)
    if impl == "fused" and obstacle:
        raise ValueError(f"impl='fused' cannot run here: {obstacle}; impl='auto' would take 'chunked'")
    on_gpu = device.type == "cuda"
    return "fused" if not obstacle and (impl == "fused" or on_gpu) else "chunked"


def vocab_stats(
    logits: Tensor, targets: Tensor | None = None, *, mask: Tensor | None = None, alpha: float = 1.0,
    entropy: bool = False, logit_mean: bool = False, impl: Impl = "auto",
) -> VocabStats:  # fmt: skip
    """Statistics of each row of logits over the vocabulary, in one read of it. Row i goes with targets[i]: no shift.

        lse          = log sum_a exp(z_a / alpha)                target_logit = z[target]
        entropy      = -sum_a pi_a log pi_a, pi = softmax(z / alpha), nats
        logit_mean   = sum_a z_a / V

    logits   (..., V) bf16, fp16, fp32 or fp64, any strides
    targets  (...) int64; -100: no target, and target_logit is 0. None: no row has one
    mask     (...) rows to compute: bool, or integers 0 and 1 (on a GPU other integers are not noticed: they count as 1)
    alpha    soft-RL temperature, > 0

    Without targets it is a logsumexp in one read:

        >>> vocab_stats(torch.tensor([[0.0, 0.0], [1.0, -float("inf")]])).lse
        tensor([0.6931, 1.0000])

    Returns VocabStats, float32 (...). A row that is all -inf has lse -inf and entropy 0.
    Raises ValueError for shapes, dtypes and devices; IndexError on the CPU for a target outside [0, V) (on a GPU the
    row comes back NaN).
    """
    check_logits(logits)
    targets, mask = check_rows(targets, mask, logits, "logits", alpha)
    chosen = choose_impl(impl, logits.device, logits.dtype)
    if chosen == "reference":
        return reference.vocab_stats(logits, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean)
    check_reverse_mode(chosen, logits)
    from .vocab.ops import logits_stats

    out = logits_stats(_as_3d(logits), _flat(targets), _flat(mask), None, float(alpha), entropy, logit_mean, chosen)
    return _vocab_stats(out, targets.shape, entropy, logit_mean)


def linear_vocab_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor | None = None, *, mask: Tensor | None = None,
    bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None, alpha: float = 1.0,
    entropy: bool = False, logit_mean: bool = False, impl: Impl = "auto", shard: "VocabShard | None" = None,
    vocab_size: int | None = None,
) -> VocabStats:  # fmt: skip
    """`vocab_stats` of the logits that hidden states and the head's weight make, which are never written to memory:

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    hidden   (..., D)       weight  (V, D)                   bias     (V,) or None
    targets  (...) int64    mask    (...) as `vocab_stats`   softcap  None: no cap

    hidden and weight have one dtype; float32 hidden also goes with a bf16 or fp16 weight, which is then upcast chunk
    by chunk ("chunked"): exact float32 logits with no float32 copy of the weight.
    Under autocast, hidden, weight and bias are cast to its dtype first, as a linear layer would.
    Returns and raises as `vocab_stats`; targets may be left out there too. Rows off the mask cost nothing.

    vocab_size   rows of weight from here on are padding, and are left out
    shard        weight (and bias) are this process's rows of a vocabulary that is split over a process group; hidden,
                 targets and mask are those of every rank, and every rank returns the same (see sharded.py). A DTensor
                 weight placed Shard(0) needs none.
    """
    hidden, weight, bias, shard = _localize(hidden, weight, bias, shard, vocab_size)
    check_linear(hidden, weight, bias, logit_scale, softcap, sharded=shard is not None)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    targets, mask = check_rows(targets, mask, hidden, "hidden", alpha)
    chosen = choose_impl(impl, hidden.device, hidden.dtype, weight.dtype)
    head = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    if chosen == "reference":
        _refuse_sharded(shard)
        return reference.linear_vocab_stats(
            hidden, weight, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, **head
        )
    check_reverse_mode(chosen, hidden, weight, bias)
    out = _linear_stats(shard)(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, _flat(targets), _flat(mask), None,
        float(logit_scale), softcap, float(alpha), entropy, logit_mean, chosen,
    )  # fmt: skip
    return _vocab_stats(out, targets.shape, entropy, logit_mean)


def token_rewards(
    logits: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None,
    cu_seqlens: Tensor | None = None, alpha: float = 1.0, entropy: bool = False, impl: Impl = "auto",
) -> TokenRewards:  # fmt: skip
    """The endogenous reward of each token: what a language model's logits, read as a soft Q function, say it earned.

        r_t = z_{t-1}[token_t] - V_t        V_t = alpha * logsumexp(z_t / alpha), 0 after a terminal token

    logits      (B, T, V): logits[:, t] is the state after tokens[:, : t + 1]; the shift is done here
    tokens      (B, T) int64; -100, as in labels: not scored, as if off the mask
    mask        (B, T) bool, or 0 and 1 as in `vocab_stats`: tokens to score (the completion). Default: all but the
                first of each sequence, which was chosen in no known state and never has a reward
    terminal    (B, T) as mask: tokens after which the episode ends. Default: the last of each unbroken run of the
                mask; all False bootstraps with V everywhere (truncated completions)
    cu_seqlens  (S + 1,) int: offsets of S sequences packed into the B * T tokens, row-major

    Returns TokenRewards, float32 (B, T), 0 off the mask. Summed to a terminal token, rewards are
    alpha * (sum of logprob) + V of the first state. A state that is all -inf allows no action: reaching it counts as
    terminal, and a token chosen in it has reward and logprob -inf.
    Raises as `vocab_stats`. Source: Li et al., arXiv 2506.23235, inverse soft Bellman operator.
    """
    check_logits(logits)
    mask, terminal = check_rewards(tokens, mask, terminal, cu_seqlens, logits, "logits", alpha)
    chosen = choose_impl(impl, logits.device, logits.dtype)
    if chosen == "reference":
        return reference.token_rewards(
            logits, tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens, alpha=alpha, entropy=entropy
        )
    check_reverse_mode(chosen, logits)
    from .vocab.ops import logits_stats
    from .vocab.rows import plan_rows

    plan = plan_rows(tokens, mask, terminal, cu_seqlens)
    out = logits_stats(logits, plan.targets, plan.needed, plan.successor, float(alpha), entropy, False, chosen)
    return _token_rewards(out, tokens, plan.targets, entropy)


def linear_token_rewards(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None,
    cu_seqlens: Tensor | None = None, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, alpha: float = 1.0, entropy: bool = False, impl: Impl = "auto",
    shard: "VocabShard | None" = None, vocab_size: int | None = None,
) -> TokenRewards:  # fmt: skip
    """`token_rewards` from hidden states (B, T, D) and the head's weight (V, D), never writing logits to memory.

    The head is that of `linear_vocab_stats`, the rest as in `token_rewards`. States that no scored token touches
    (prompts, padding) cost nothing. shard and vocab_size as there.
    """
    hidden, weight, bias, shard = _localize(hidden, weight, bias, shard, vocab_size)
    check_linear(hidden, weight, bias, logit_scale, softcap, sharded=shard is not None)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    mask, terminal = check_rewards(tokens, mask, terminal, cu_seqlens, hidden, "hidden", alpha)
    chosen = choose_impl(impl, hidden.device, hidden.dtype, weight.dtype)
    if chosen == "reference":
        _refuse_sharded(shard)
        return reference.linear_token_rewards(
            hidden, weight, tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens, bias=bias,
            logit_scale=logit_scale, softcap=softcap, alpha=alpha, entropy=entropy,
        )  # fmt: skip
    check_reverse_mode(chosen, hidden, weight, bias)
    from .vocab.rows import plan_rows

    plan = plan_rows(tokens, mask, terminal, cu_seqlens)
    out = _linear_stats(shard)(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, plan.targets, plan.needed, plan.successor,
        float(logit_scale), softcap, float(alpha), entropy, False, chosen,
    )  # fmt: skip
    return _token_rewards(out, tokens, plan.targets, entropy)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which raises for meta, a device without autocast
        return hidden, weight, bias
    if hidden.dtype == torch.float64:  # which autocast leaves alone
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _localize(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: "VocabShard | None", vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, "VocabShard | None"]:
    """shards.localize, which imports torch.distributed.tensor (half a second): for plain tensors there is no need."""
    plain = shard is None and vocab_size is None and type(weight) in (Tensor, torch.nn.Parameter)
    if plain and type(hidden) in (Tensor, torch.nn.Parameter) and weight.numel():
        return hidden, weight, bias, None
    from .vocab.shards import localize

    return localize(hidden, weight, bias, shard, vocab_size)


def _linear_stats(shard: "VocabShard | None") -> Callable[..., list[Tensor]]:
    """The operator on the head as it lies here, or across processes."""
    if shard is None:
        from .vocab.ops import linear_stats

        return linear_stats
    from .vocab.sharded import sharded_linear_stats

    return partial(sharded_linear_stats, shard=shard)


def _refuse_sharded(shard: "VocabShard | None") -> None:
    if shard is not None:
        raise ValueError("impl='reference' reads a whole head, and this one is sharded: take impl='auto'")


def _as_3d(logits: Tensor) -> Tensor:
    """(..., V) as (outer, inner, V) without a copy where strides allow: a slice [:, :-1] has its own outer pitch."""
    if logits.ndim == 3:
        return logits
    return logits[(None,) * (3 - logits.ndim)] if logits.ndim < 3 else logits.flatten(0, -3)


def _flat(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.reshape(-1)


def _vocab_stats(out: list[Tensor], shape: torch.Size, entropy: bool, logit_mean: bool) -> VocabStats:
    lse, target_logit, h, mean = out[:4]
    return VocabStats(
        lse.view(shape), target_logit.view(shape),
        h.view(shape) if entropy else None, mean.view(shape) if logit_mean else None,
    )  # fmt: skip


def _token_rewards(out: list[Tensor], tokens: Tensor, targets: Tensor, entropy: bool) -> TokenRewards:
    """Rows (state in which the token was chosen) -> tokens: one place to the right; the first has none."""
    reward, logprob, value = out[6:9]

    def at_token(field: Tensor) -> Tensor:
        rows = field.view(tokens.shape)
        return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1)

    h = at_token(torch.where(targets != NO_TARGET, out[2], 0.0)) if entropy else None
    return TokenRewards(at_token(reward), at_token(logprob), at_token(value), h)
