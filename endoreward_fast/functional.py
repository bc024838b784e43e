"""The public functions on tensors: check the arguments, choose an implementation, flatten, run, restore the shape.

vocab/reference.py has the formulas. Every function returns float32 and never writes to its inputs. Gradients flow
through every field. `mask` selects the rows to compute; the other rows come back 0 and get no gradient.

impl  "fused"      Triton kernels, on a CUDA or ROCm device (or in the interpreter with TRITON_INTERPRET=1, for tests)
      "chunked"    torch code with a bounded workspace, on any device
      "compiled"   C++ code, on the CPU; the machine's compiler builds it on first use
      "reference"  eager torch that materialises everything, on any device; the oracle of the tests
      "auto"       "fused" or "chunked", or what `endoreward tune` chose for the head; see `choose_impl`
A named impl that cannot run raises ValueError. It never falls back to another one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .types import TokenRewards, VocabStats
from .vocab import reference
from .vocab.checks import check_linear, check_logits, check_named, check_reverse_mode, check_rewards, check_rows
from .vocab.choice import AUTO, Impl, choose_impl, uses_kernels
from .vocab.prepare import as_3d, autocast, flat

if TYPE_CHECKING:
    from .vocab.shard_layout import VocabShard


def vocab_stats(
    logits: Tensor, targets: Tensor | None = None, *, mask: Tensor | None = None, alpha: float | Tensor = 1.0,
    entropy: bool = False, logit_mean: bool = False, named: Sequence[int] | Tensor | None = None, impl: Impl = "auto",
) -> VocabStats:  # fmt: skip
    """Compute statistics of each row of logits over the vocabulary, reading the logits once.

        lse          = log sum_a exp(z_a / alpha)                               nats
        target_logit = z[target]
        entropy      = -sum_a pi_a log pi_a, with pi = softmax(z / alpha)       nats
        logit_mean   = sum_a z_a / V
        named_logprob[k] = log pi_named[k]                                      nats

    Row i is paired with targets[i]; nothing is shifted.

    logits   (..., V) bf16, fp16, fp32 or fp64, any strides
    targets  (...) int64. -100 marks a row without a target; its target_logit is 0. None: no row has a target
    mask     (...) rows to compute, as bool or as integers 0 and 1. On a GPU any other integer counts as 1, unchecked
    alpha    soft-RL temperature, > 0: a number, or (...) float32 with one for each row. No gradient flows into it
    entropy, logit_mean  whether to compute these fields; otherwise they are None
    named    K token ids, a list or a tensor (K,) int64: their log-probabilities in every row, (..., K), from the same
             logits as lse, so none exceeds 0. An id may occur twice. A judge's "Yes" and "No" need one pass, not two.
             torch.compile makes a graph for each list of another length; with tensors one graph serves all lengths
    impl     implementation, see `choose_impl`

    Without targets this is a logsumexp in one read:

        >>> vocab_stats(torch.tensor([[0.0, 0.0], [1.0, -float("inf")]])).lse
        tensor([0.6931, 1.0000])

    Two sampling temperatures, and the log-probabilities of tokens 0 and 1:

        >>> logits, alpha = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([1.0, 2.0])
        >>> vocab_stats(logits, alpha=alpha, named=[0, 1]).named_logprob
        tensor([[-0.1269, -2.1269],
                [-0.3133, -1.3133]])

    Returns VocabStats, float32 (...). A row that is all -inf has lse -inf, entropy 0 and named_logprob -inf.
    Raises ValueError for a wrong shape, dtype or device, and for alpha <= 0 (in a tensor: on the mask, and not on a
    GPU). A target or a named id outside [0, V) raises IndexError on the CPU; on a GPU its row or column comes back NaN.
    """
    check_logits(logits)
    targets, mask = check_rows(targets, mask, logits, "logits", alpha)
    many = alpha if isinstance(alpha, Tensor) else None
    named = None if named is None else check_named(named, logits.shape[-1], logits.device)
    chosen = choose_impl(impl, logits.device, logits.dtype, extras=many is not None or named is not None)
    if chosen == "reference":
        return reference.vocab_stats(
            logits, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, named=named
        )
    check_reverse_mode(chosen, logits)
    from .vocab.ops import logits_stats

    number, alphas = (float(alpha), None) if many is None else (1.0, _alpha_of_rows(many, mask))
    out = logits_stats(
        as_3d(logits), flat(targets), flat(mask), None, number, entropy, logit_mean, chosen, alphas, named
    )
    return _vocab_stats(out, targets.shape, entropy, logit_mean, named)


def linear_vocab_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor | None = None, *, mask: Tensor | None = None,
    bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None, alpha: float | Tensor = 1.0,
    entropy: bool = False, logit_mean: bool = False, named: Sequence[int] | Tensor | None = None, impl: Impl = "auto",
    shard: "VocabShard | None" = None, vocab_size: int | None = None,
) -> VocabStats:  # fmt: skip
    """Compute `vocab_stats` from hidden states and the head's weight, without writing the logits to memory.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    hidden       (..., D)
    weight       (V, D), of the dtype of hidden. If hidden is float32, weight may be bf16 or fp16: "chunked" upcasts it
                 chunk by chunk, which gives exact float32 logits without a float32 copy of the weight
    targets      (...) int64 or None, as in `vocab_stats`
    mask         (...) as in `vocab_stats`. Rows off the mask cost nothing
    bias         (V,) or None
    logit_scale  factor of the logits
    softcap      None: no cap
    vocab_size   number of vocabulary entries; the rows of weight behind them are padding and are left out
    shard        describes the rows of a split vocabulary that weight and bias of this process hold. hidden, targets and
                 mask must be the same on every rank, and every rank returns the same (see vocab/sharded.py). A DTensor
                 weight placed Shard(0) needs no shard. A split head takes one alpha for all rows, and no named tokens

    The other arguments are as in `vocab_stats`. Under autocast, hidden, weight and bias are cast first, as in a linear
    layer. Returns and raises as `vocab_stats`.
    """
    hidden, weight, bias, shard = _localize(hidden, weight, bias, shard, vocab_size)
    check_linear(hidden, weight, bias, logit_scale, softcap, sharded=shard is not None)
    hidden, weight, bias = autocast(hidden, weight, bias)
    targets, mask = check_rows(targets, mask, hidden, "hidden", alpha)
    many = alpha if isinstance(alpha, Tensor) else None
    if shard is not None:
        _refuse_extras(alpha, named)
    named = None if named is None else check_named(named, weight.shape[0], hidden.device)
    chosen = choose_impl(
        impl, hidden.device, hidden.dtype, weight.dtype, linear=True, extras=many is not None or named is not None
    )  # fmt: skip
    head = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    if chosen == "reference":
        _refuse_sharded(shard)
        return reference.linear_vocab_stats(
            hidden, weight, targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean, named=named, **head
        )
    check_reverse_mode(chosen, hidden, weight, bias)
    number, alphas = (float(alpha), None) if many is None else (1.0, _alpha_of_rows(many, mask))
    out = _linear_stats(shard)(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat(targets), flat(mask), None,
        float(logit_scale), softcap, number, entropy, logit_mean, _run_as(impl, chosen, shard),
        *(() if shard else (alphas, named)),
    )  # fmt: skip
    return _vocab_stats(out, targets.shape, entropy, logit_mean, named)


def token_rewards(
    logits: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None,
    cu_seqlens: Tensor | None = None, alpha: float | Tensor = 1.0, entropy: bool = False, impl: Impl = "auto",
) -> TokenRewards:  # fmt: skip
    """Compute the endogenous reward of each token from a language model's logits, read as a soft Q function.

        r_t = z_{t-1}[token_t] - V_t        V_t = alpha * logsumexp(z_t / alpha), 0 after a terminal token

    logits      (B, T, V). logits[:, t] is the state after tokens[:, : t + 1]; this function does the shift
    tokens      (B, T) int64. A token of -100 (as in labels) is not scored
    mask        (B, T) tokens to score (the completion), as bool or as integers 0 and 1. Default: all tokens but the
                first of each sequence. The first token was chosen in no known state and never has a reward
    terminal    (B, T) tokens after which the episode ends, of the same types. Default: the last token of each
                unbroken run of the mask. All False bootstraps every run with V (truncated completions)
    cu_seqlens  (S + 1,) int32 or int64: offsets of S sequences packed into the B * T tokens in row-major order
    alpha       soft-RL temperature, > 0: a number, or (B, T) float32 with one for each token. alpha[:, t] is the
                temperature under which token t was sampled, so it belongs to the state before the token:
                logprob_t = log softmax(z_{t-1} / alpha_t)[token_t] and V(s) = alpha_t logsumexp(z_{t-1} / alpha_t).
                V(s') has the alpha of the next token of the run; where the end of a run is bootstrapped, V(s') has the
                alpha of the run's last token. Values off the mask are not used. No gradient flows into alpha
    entropy, impl  as in `vocab_stats`

    Returns TokenRewards, float32 (B, T), 0 off the mask. The rewards up to a terminal token sum to the sum of
    alpha_t * logprob_t, plus V of the first state. A state that is all -inf allows no action: a token that leads to it
    counts as terminal, and a token chosen in it has reward and logprob -inf.
    Raises as `vocab_stats`.
    Source: Li et al., arXiv 2506.23235, inverse soft Bellman operator.
    """
    check_logits(logits)
    mask, terminal = check_rewards(tokens, mask, terminal, cu_seqlens, logits, "logits", alpha, alpha_of_each=True)
    many = alpha if isinstance(alpha, Tensor) else None
    chosen = choose_impl(impl, logits.device, logits.dtype, extras=many is not None)
    if chosen == "reference":
        return reference.token_rewards(
            logits, tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens, alpha=alpha, entropy=entropy
        )
    check_reverse_mode(chosen, logits)
    from .vocab.ops import logits_stats
    from .vocab.plan import alpha_of_rows, plan_rows

    plan = plan_rows(tokens, mask, terminal, cu_seqlens, uses_kernels(chosen, tokens.device))
    number, alphas = (float(alpha), None) if many is None else (1.0, alpha_of_rows(many, plan))
    out = logits_stats(logits, plan.targets, plan.needed, plan.successor, number, entropy, False, chosen, alphas, None)
    return _token_rewards(out, tokens, entropy)


def linear_token_rewards(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, mask: Tensor | None = None, terminal: Tensor | None = None,
    cu_seqlens: Tensor | None = None, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, alpha: float | Tensor = 1.0, entropy: bool = False, impl: Impl = "auto",
    shard: "VocabShard | None" = None, vocab_size: int | None = None,
) -> TokenRewards:  # fmt: skip
    """Compute `token_rewards` from hidden states (B, T, D) and the head's weight (V, D), without writing the logits.

    bias, logit_scale, softcap, shard and vocab_size are as in `linear_vocab_stats`, the other arguments as in
    `token_rewards`. States that no scored token needs (prompts, padding) cost nothing.
    """
    hidden, weight, bias, shard = _localize(hidden, weight, bias, shard, vocab_size)
    check_linear(hidden, weight, bias, logit_scale, softcap, sharded=shard is not None)
    hidden, weight, bias = autocast(hidden, weight, bias)
    mask, terminal = check_rewards(tokens, mask, terminal, cu_seqlens, hidden, "hidden", alpha, alpha_of_each=True)
    many = alpha if isinstance(alpha, Tensor) else None
    if shard is not None:
        _refuse_extras(alpha, None)
    chosen = choose_impl(impl, hidden.device, hidden.dtype, weight.dtype, linear=True, extras=many is not None)
    if chosen == "reference":
        _refuse_sharded(shard)
        return reference.linear_token_rewards(
            hidden, weight, tokens, mask=mask, terminal=terminal, cu_seqlens=cu_seqlens, bias=bias,
            logit_scale=logit_scale, softcap=softcap, alpha=alpha, entropy=entropy,
        )  # fmt: skip
    check_reverse_mode(chosen, hidden, weight, bias)
    from .vocab.plan import alpha_of_rows, plan_rows

    plan = plan_rows(tokens, mask, terminal, cu_seqlens, uses_kernels(chosen, tokens.device))
    number, alphas = (float(alpha), None) if many is None else (1.0, alpha_of_rows(many, plan))
    out = _linear_stats(shard)(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, plan.targets, plan.needed, plan.successor,
        float(logit_scale), softcap, number, entropy, False, _run_as(impl, chosen, shard),
        *(() if shard else (alphas, None)),
    )  # fmt: skip
    return _token_rewards(out, tokens, entropy)


def _localize(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: "VocabShard | None", vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, "VocabShard | None"]:
    """Call shard_layout.localize unless all tensors are plain: it imports torch.distributed.tensor, half a second."""
    plain = shard is None and vocab_size is None and type(weight) in (Tensor, torch.nn.Parameter)
    if plain and type(hidden) in (Tensor, torch.nn.Parameter) and weight.numel():
        return hidden, weight, bias, None
    from .vocab.shard_layout import localize

    return localize(hidden, weight, bias, shard, vocab_size)


def _run_as(impl: Impl, chosen: str, shard: "VocabShard | None") -> str:
    """Return the operator's impl: "auto" looks for the head's tuning. A shard's V is not the head's, so it does not."""
    return AUTO if impl == "auto" and shard is None else chosen


def _linear_stats(shard: "VocabShard | None") -> Callable[..., list[Tensor]]:
    """Return the operator on a whole head or, with a shard, on a head that is split over processes."""
    if shard is None:
        from .vocab.ops import linear_stats

        return linear_stats
    from .vocab.sharded import sharded_linear_stats

    return partial(sharded_linear_stats, shard=shard)


def _alpha_of_rows(alpha: Tensor, mask: Tensor | None) -> Tensor:
    """Return the temperatures of rows (N,), with 1 in rows off the mask."""
    return (alpha if mask is None else torch.where(mask, alpha, 1.0)).reshape(-1)


def _refuse_extras(alpha: float | Tensor, named: Sequence[int] | Tensor | None) -> None:
    if named is not None:
        raise ValueError("a sharded head takes no named tokens: pass named=None")
    if isinstance(alpha, Tensor):
        raise ValueError("a sharded head takes no alpha as a tensor: pass a number")


def _refuse_sharded(shard: "VocabShard | None") -> None:
    if shard is not None:
        raise ValueError("impl='reference' cannot read a sharded head: use impl='auto'")


def _vocab_stats(
    out: list[Tensor], shape: torch.Size, entropy: bool, logit_mean: bool, named: Tensor | None
) -> VocabStats:  # fmt: skip
    lse, target_logit, h, mean = out[:4]
    return VocabStats(
        lse.view(shape), target_logit.view(shape),
        h.view(shape) if entropy else None, mean.view(shape) if logit_mean else None,
        None if named is None else out[-1].view(*shape, named.shape[0]),  # len() is a constant to torch.export
    )  # fmt: skip


def _token_rewards(out: list[Tensor], tokens: Tensor, entropy: bool) -> TokenRewards:
    def shaped(field: Tensor) -> Tensor:  # view_as takes a third of the time of view(shape)
        # Modules return these fields, and FSDP2 warns of views: its hooks do not see what is written to them in place.
        return field.view_as(tokens).clone() if field.requires_grad else field.view_as(tokens)

    reward, logprob, value, h = out[6:10]
    return TokenRewards(shaped(reward), shaped(logprob), shaped(value), shaped(h) if entropy else None)
