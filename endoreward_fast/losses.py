"""Bellman-residual losses: objectives for RL that train the logits as a soft Q function.

Both losses need V of the first state, with its gradient. `token_rewards` and `linear_token_rewards` return it beside
the log-probabilities, so a loss needs no pass of its own. Notation: y is a completion of H scored tokens, s_1 the state
in which the first of them was chosen, and Q = z / alpha, V = logsumexp(Q), log pi = Q - V in nats.

    tbrm_loss   (V(s_1)            + log pi(y) - log pi_ref(y) - r / beta)^2     arXiv 2505.15311, eq. 4
    reval_loss  (V(s_1) - V_ref(s_1) + log pi(y) - log pi_ref(y) - r / beta)^2   arXiv 2603.23355, eq. 2

Each is the sum of H Bellman residuals, squared. Their sum telescopes, so the values of later states cancel:

    delta_h = Q(s_h, a_h) - V(s_{h+1}) - log pi_ref(a_h | s_h) - r_h / beta      V(s_{H+1}) = 0

ReVal subtracts V_ref(s_h) - V_ref(s_{h+1}) from delta_h, a shaping of the reward by the reference's V. delta_h is then
the endogenous reward of the policy less that of the reference and r_h / beta. At the start of training both models are
equal, so the residual is -r / beta; TBRM's also contains V(s_1) and moves the policy even if r = 0.

Where a loss is 0 for every completion, pi is the policy that maximises E[r] - beta KL(pi || pi_ref).

`level="token"` squares each delta_h. TBRM's paper calls this BRM (eq. 3). There, training with it collapsed, because
a reward at the last token has to travel back through every residual (appendix H.3). ReVal's paper has delta_h, but does
not train with it.

No term is a stop-gradient, in either paper's algorithm. `policy._replace(value=policy.value.detach())` stops V's
gradient. ReVal's gradient in eq. 4 leaves it out, and TBRM's appendix F shows a problem on which a V that is held fixed
stays at a wrong solution.

Sources: ReVal's text was read in full, and the loss in physicsru/verl on GitHub, which is not by the authors. Its
formula of R_beta shapes by V_theta(s_h) - V_ref(s_h). Its Bellman operator and eq. 2 shape as above. TBRM's text was
read without its typeset formulas. The residual of a step is in the text, and eq. 4 is restated in ReVal's section 4.1.
The code of TBRM's authors, rlx-lab/TBRM, could not be read.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .types import TokenRewards
from .vocab.checks import (
    FLOATS,
    INTEGERS,
    as_bool,
    check_alpha,
    check_numbers,
    check_tensors,
    readable,
    require_tensors,
)  # fmt: skip

Level = Literal["trajectory", "token"]


class BellmanLoss(NamedTuple):
    """A loss, and what it is made of. Only `loss` and `residual` have a gradient."""

    loss: Tensor
    """() the mean over rows of residual^2, or with level="token" of its sum over a row. Rows without a scored token do
    not count. 0 if no row has one"""
    residual: Tensor
    """(B,), or (B, T) with level="token". 0 in rows without a scored token, and off the mask"""
    value: Tensor
    """(B,) V(s_1) - V_ref(s_1), or V(s_1) in `tbrm_loss`, nats"""
    log_ratio: Tensor
    """(B,) log pi(y) - log pi_ref(y), nats. Its mean over completions of the policy estimates KL(pi || pi_ref). If
    gamma < 1, it is the sum of the steps' log-ratios, each times gamma^(h - 1), and no such estimate"""
    target: Tensor
    """(B,) r / beta, with each step's reward times gamma^(h - 1)"""


def reval_loss(
    policy: TokenRewards, reference: TokenRewards, mask: Tensor, reward: Tensor, *, beta: float,
    alpha: float | Tensor = 1.0, gamma: float = 1.0, level: Level = "trajectory", bootstrap: bool = False,
) -> BellmanLoss:  # fmt: skip
    """Return ReVal's loss: the squared Bellman residual, with the reward shaped by the reference's V.

        residual = V(s_1) - V_ref(s_1) + log pi(y) - log pi_ref(y) - r / beta

    policy     rewards of the tokens under the policy, with their gradient
    reference  the same under the reference, with its V. No gradient flows into it. It is constant, so a replay buffer
               can store it with the completion
    mask       (B, T) scored tokens, as bool or as integers 0 and 1. A row is one trajectory: a packed row is not. If
               the mask has several unbroken runs (turns), the next turn's first state follows the last of this turn.
               Position 0 has no state and is never scored. A token of -100 is not scored either, so leave it out
    reward     (B,) reward of the completion, which counts at its last scored token; or (B, T) reward of each token.
               Values off the mask do not count, and may be NaN: clear the mask of a row that has no reward
    beta       weight of the KL penalty, > 0, in the unit of the reward. log pi(y) is a sum over tokens, so long
               completions need a small beta: the paper takes 0.02 at 600 tokens and 0.002 at 5000
    alpha      the alpha that policy and reference were computed with: a number, or (B, T) float32
    gamma      discount in (0, 1]. The papers have none. Step h is weighted by gamma^(h - 1), as in delta_h = Q(s_h) -
               gamma V(s_{h+1}) - ...
    level      "trajectory", or "token": one residual for each scored token
    bootstrap  False: a row's episode ends with its last scored token, as in the papers. True: the state after it has
               the value that `policy` and `reference` gave it, which is 0 only where the token was terminal. Pass
               `terminal_at(tokens, mask, eos)` as their `terminal`, and truncated completions keep V(s_{H+1})

    Rewards minus their mean over the completions of a prompt trained best in the paper (section 5.5.4): with rewards of
    0 and 1, a wrong answer is only drawn back to the reference. Lengths are not normalised, as in the papers. Any other
    weighting starts from `residual`: `(out.residual / mask.sum(-1).clamp(min=1)).square().mean()` is 0 for the same
    policies.

        >>> from endoreward_fast import token_rewards
        >>> tokens, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
        >>> model = token_rewards(torch.zeros(1, 3, 4), tokens, mask=mask)
        >>> reval_loss(model, model, mask, torch.tensor([1.0]), beta=0.5).residual
        tensor([-2.])

    A token that only the policy excludes (logprob -inf) has residual -inf, and a token that only the reference excludes
    +inf; a row with one of each has NaN. The loss is then not finite and its gradient is NaN, so leave such rows out of
    the mask. A token that both exclude adds 0. Float64 fields give float64 results; all others give float32.
    Raises ValueError for a reference without V, wrong shapes, devices and numbers, and, on the CPU, for a reward on the
    mask that is not finite. On a GPU, where reading it would stall the stream, and under torch.compile and torch.func,
    such a reward makes the loss NaN or inf.
    Source: arXiv 2603.23355, eq. 2.
    """
    return _loss("reval_loss", policy, reference, mask, reward, beta, alpha, gamma, level, bootstrap)


def tbrm_loss(
    policy: TokenRewards, reference: TokenRewards | Tensor, mask: Tensor, reward: Tensor, *, beta: float,
    alpha: float | Tensor = 1.0, gamma: float = 1.0, level: Level = "trajectory", bootstrap: bool = False,
) -> BellmanLoss:  # fmt: skip
    """Return TBRM's loss: the squared Bellman residual of a whole trajectory.

        residual = V(s_1) + log pi(y) - log pi_ref(y) - r / beta

    reference  rewards of the tokens under the reference, or its log-probabilities (B, T), nats

    The other arguments are as in `reval_loss`. The paper takes beta = 0.002 for completions of up to 2048 tokens, and
    works with one completion per prompt. r / beta of a right answer has to be above V(s_1), 17 nats in `pocket`: below
    it, the residual is positive at the start, and the loss lowers the probability of right answers too.

        >>> from endoreward_fast import token_rewards
        >>> tokens, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
        >>> model = token_rewards(torch.zeros(1, 3, 4), tokens, mask=mask)
        >>> tbrm_loss(model, model.logprob, mask, torch.tensor([1.0]), beta=0.5).residual  # log 4 - 2
        tensor([-0.6137])

    Returns and raises as `reval_loss`, but needs V of the policy only.
    Source: arXiv 2505.15311, eq. 4, and eq. 3 for level="token".
    """
    if isinstance(reference, Tensor):
        reference = TokenRewards(None, reference, None, None)  # type: ignore[arg-type]
    return _loss("tbrm_loss", policy, reference, mask, reward, beta, alpha, gamma, level, bootstrap)


def _loss(
    name: str, policy: TokenRewards, reference: TokenRewards, mask: Tensor, reward: Tensor, beta: float,
    alpha: float | Tensor, gamma: float, level: str, bootstrap: bool,
) -> BellmanLoss:  # fmt: skip
    shaped = name == "reval_loss"
    mask = _checked(name, policy, reference, mask, reward, shaped, bootstrap)
    check_alpha(alpha, mask.shape, mask, policy.logprob)
    _check_settings(beta, gamma, level)
    if isinstance(alpha, Tensor):
        alpha = torch.where(mask, alpha, 1.0)
    models = [policy, reference] if shaped else [policy]
    exact = any(m.logprob.dtype == torch.float64 for m in (policy, reference))
    dtype = torch.float64 if exact else torch.float32

    step = mask.cumsum(-1)  # h at scored tokens, from 1
    last = mask & (step == step[:, -1:])
    discount = _powers(gamma, step - 1, dtype)
    log_ratio = _difference(policy.logprob.to(dtype), reference.logprob.detach().to(dtype), mask)
    target = _at_tokens(reward.detach(), last, mask).to(dtype) / beta
    value, end = _values(models, mask, alpha, dtype), _ends(models, last, alpha, dtype, bootstrap)

    counts = mask & (discount > 0)  # a discount that has underflowed, times -inf, is NaN
    first_value = torch.where(mask & (step == 1), value, 0.0).sum(-1)
    log_ratios, targets = (torch.where(counts, discount * x, 0.0).sum(-1) for x in (log_ratio, target))
    if level == "token":
        residual = value + log_ratio - target - gamma * (_next_scored(value, mask, step) + end)
        residual = torch.where(mask, residual, 0.0)
        squares = residual.square().sum(-1)
    else:
        residual = first_value + log_ratios - targets - gamma * (discount * end).sum(-1)
        squares = residual.square()
    loss = squares.sum() / mask.any(-1).sum().clamp(min=1)
    return BellmanLoss(loss, residual, first_value.detach(), log_ratios.detach(), targets)


def _values(models: list[TokenRewards], mask: Tensor, alpha: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Return V / alpha of the policy, less that of the reference if it is given: (B, T), 0 off the mask."""
    values = [m.value.to(dtype) / alpha for m in models]
    return _difference(values[0], values[1].detach(), mask) if values[1:] else torch.where(mask, values[0], 0.0)


def _ends(
    models: list[TokenRewards], last: Tensor, alpha: float | Tensor, dtype: torch.dtype, bootstrap: bool
) -> Tensor:
    """Return, at each row's last scored token, V(s_{H+1}) / alpha as in `_values`: (B, T), 0 elsewhere.

    V(s') = Q(s, a) - reward. A token with logprob -inf has no successor worth a value.
    """
    if not bootstrap:
        return torch.zeros(last.shape, dtype=dtype, device=last.device)

    def end(m: TokenRewards) -> Tensor:
        there = last & (m.logprob > -math.inf)
        logprob, value, reward = (torch.where(there, x.to(dtype), 0.0) for x in (m.logprob, m.value, m.reward))
        return logprob + (value - reward) / alpha

    policy, *reference = map(end, models)
    return policy - reference[0].detach() if reference else policy


def _difference(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Return policy - reference on the mask, and 0 off it and where both are -inf."""
    counts = mask & ~((policy == -math.inf) & (reference == -math.inf))
    return torch.where(counts, policy, 0.0) - torch.where(counts, reference, 0.0)


def _at_tokens(reward: Tensor, last: Tensor, mask: Tensor) -> Tensor:
    """Return the rewards of tokens (B, T); the reward of a completion is at its last scored token."""
    return torch.where(last, reward[:, None], 0) if reward.ndim == 1 else torch.where(mask, reward, 0)


def _powers(gamma: float, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    base = torch.full(exponent.shape, gamma, dtype=dtype, device=exponent.device)
    return base if gamma == 1.0 else base.pow(exponent.clamp(min=0))


def _next_scored(value: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    """Return, at each scored token, the value at the row's next scored token; 0 at the last."""
    width = mask.shape[-1]
    place = torch.arange(width, device=mask.device).expand(mask.shape)
    here = torch.where(mask, place, width).flip(-1).cummin(-1).values.flip(-1)  # the first scored token from t on
    after = torch.cat([here[:, 1:], torch.full_like(here[:, :1], width)], -1)
    padded = torch.cat([value, torch.zeros_like(value[:, :1])], -1)
    return torch.where(mask, padded.gather(-1, after), 0.0)


def _checked(
    name: str, policy: TokenRewards, reference: TokenRewards, mask: Tensor, reward: Tensor, shaped: bool,
    bootstrap: bool,
) -> Tensor:  # fmt: skip
    """Check the tensors. Return the mask as bool, without position 0."""
    for owner, model in (("policy", policy), ("reference", reference)):
        if not isinstance(model, TokenRewards):
            raise ValueError(f"{owner} is a {type(model).__name__}: expected TokenRewards, as token_rewards returns")
    if shaped and reference.value is None:
        raise ValueError(
            "reval_loss got a reference without V: give TokenRewards of the reference model, or use tbrm_loss, which "
            "needs its log-probabilities only"
        )
    fields = ["logprob", "value", *(["reward"] if bootstrap else [])]
    wanted = {f"policy.{f}": getattr(policy, f) for f in fields} | {"reference.logprob": reference.logprob}
    if shaped:
        wanted |= {f"reference.{f}": getattr(reference, f) for f in fields[1:]}
    for place, x in wanted.items():
        if x is None:
            raise ValueError(f"{name} got no {place}: give what token_rewards returns")
        check_tensors(**{place: x})
    shape, device = policy.logprob.shape, policy.logprob.device
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"policy.logprob {tuple(shape)}: expected (B, T) with T >= 1")
    for place, x in wanted.items():
        if x.shape != shape or x.device != device or x.dtype not in FLOATS:
            raise ValueError(
                f"{place} is {tuple(x.shape)} {x.dtype} on {x.device}: expected floating point {tuple(shape)} on "
                f"{device}, like policy.logprob"
            )
    mask = as_bool("mask", mask, shape, device) & (torch.arange(shape[1], device=device) > 0)
    _check_reward(reward, mask)
    return mask


def _check_reward(reward: Tensor, mask: Tensor) -> None:
    require_tensors(reward=reward)
    shape, device = mask.shape, mask.device
    if reward.shape not in (shape[:1], shape) or reward.dtype not in (torch.bool, *INTEGERS, *FLOATS):
        raise ValueError(
            f"reward is {tuple(reward.shape)} {reward.dtype}: expected numbers ({shape[0]},), one for each row, or "
            f"{tuple(shape)}, one for each token"
        )
    if reward.device != device:
        raise ValueError(f"reward is on {reward.device}: expected {device}, like policy.logprob")
    if not readable(reward):
        return
    odd = ~reward.isfinite() & (mask.any(-1) if reward.ndim == 1 else mask)
    if bool(odd.any()):
        place = odd.nonzero()[0].tolist()
        raise ValueError(
            f"reward holds {reward[tuple(place)].item()} in row {place[0]}: expected finite numbers. Leave a row "
            "without a reward out of the mask"
        )


def _check_settings(beta: float, gamma: float, level: str) -> None:
    for name, x in (("beta", beta), ("gamma", gamma)):
        if x is None or isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a number; no gradient flows into it")
    check_numbers(beta=beta, gamma=gamma)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}: expected a finite number > 0, the weight of the KL penalty")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma}: expected a discount in (0, 1]")
    if level not in ("trajectory", "token"):
        raise ValueError(f"level={level!r}: expected 'trajectory' or 'token'")
