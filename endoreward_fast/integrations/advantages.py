"""An advantage for every token of a group of completions, bounded as GRPO's own is."""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def token_advantages(
    to_go: Tensor, rewards: Tensor, *, endo: int, weights: Tensor, group: int, scale: Scale
) -> Tensor:  # fmt: skip
    """Advantages of tokens, each group of `group` rows being completions of one prompt:

        A[i, h] = N[i, h] / (s + 1e-4),    N[i, h] = w_e (G[i, h] - mean_j G[j, h]) + S_i - mean_j S_j

    to_go    (N, C) G: rewards-to-go of the endogenous reward; NaN where there is no token. The mean is over the
             completions of the group that still go on at place h: of the last one, the rest is compared with nothing
    rewards  (N, K) every function's reward of each completion, NaN where it gave none; column `endo` is this one's
    weights  (K,) of the functions; S is the weighted sum of the others' rewards
    scale    over which completions s is taken: those of the "group" or of the "batch"; "none": A = N

    s is the largest of these spreads, over n completions that have a reward: the standard deviation of the total
    rewards, which is GRPO's s, and sqrt(sum_j N[j, h]^2 / (n - 1)) at each place h. N sums to 0 over a group at each
    place, so

        |A| <= (n - 1) / sqrt(n)                    with "group", n being the completions of the group,
        |A| <= sqrt((g - 1) (n - 1) / g)            with "batch", of n completions in groups of g,

    which are GRPO's own bounds. The standard deviation of the totals alone gives no bound: completions whose totals
    nearly tie may differ by many nats on the way. "none" has no bound, as in GRPO.

    The baseline depends on the prompt and the place, never on the token chosen there, so the policy gradient keeps its
    expectation (up to the completion's own share in mean and s, as in GRPO). For completions of one length whose whole
    reward comes with the last token, and for tokens that only the other functions reward, this is GRPO's advantage.
    Returns (N, C) float32; 0 for a row without any reward.
    """
    given = ~rewards.isnan()
    other = [k for k in range(rewards.shape[1]) if k != endo]
    weighted = rewards.double() * weights
    others = weighted[:, other].nansum(1).masked_fill(~given[:, other].any(1), torch.nan)
    total = weighted.nansum(1).masked_fill(~given.any(1), torch.nan)
    own = centred(to_go.double().masked_fill(~given[:, [endo]], torch.nan), group) * weights[endo]
    numerator = own.nan_to_num(0.0) + centred(others, group).nan_to_num(0.0)[:, None]
    if scale != "none":
        size = group if scale == "group" else len(total)
        spread = largest_spread(total.view(-1, size), numerator.view(-1, size, numerator.shape[1]))
        numerator = numerator / (spread.repeat_interleave(size)[:, None] + 1e-4)
    # One scored completion in a group has no spread, and nothing to be compared with.
    return numerator.nan_to_num(0.0).float()


def centred(x: Tensor, group: int) -> Tensor:
    """x (N, ...) less the mean over each `group` of its rows; NaN entries stay NaN and do not count."""
    grouped = x.view(-1, group, *x.shape[1:])
    return (grouped - grouped.nanmean(1, keepdim=True)).view(x.shape)


def largest_spread(total: Tensor, numerator: Tensor) -> Tensor:
    """(R,) from total (R, n), NaN where there is none, and numerator (R, n, C); NaN for fewer than two totals."""
    count = (~total.isnan()).sum(1)
    of_totals = (total - total.nanmean(1, keepdim=True)).square().nansum(1)
    squares = torch.cat([of_totals[:, None], numerator.square().sum(1)], 1).amax(1)
    return torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)
