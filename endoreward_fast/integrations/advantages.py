"""Token-level advantages for groups of completions, with the same bound as GRPO's."""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def token_advantages(
    to_go: Tensor, rewards: Tensor, *, endo: int, weights: Tensor, group: int, scale: Scale
) -> Tensor:  # fmt: skip
    """Return the advantage of each token. Each `group` consecutive rows are completions of one prompt.

        A[i, h] = N[i, h] / (s + 1e-4),    N[i, h] = w_e (G[i, h] - mean_j G[j, h]) + S_i - mean_j S_j

    to_go    (N, C) G: rewards-to-go of the endogenous reward, NaN where there is no token. At position h, the mean is
             over the completions of the group that have a token there. Once only one is left, it has no baseline to
             differ from, and its term is 0
    rewards  (N, K) the reward of each completion by each function, NaN for none. Column `endo` is the endogenous reward
    weights  (K,) weights of the functions, w_e for the endogenous reward; S is the weighted sum of the other rewards
    scale    the completions over which s is computed: "group" or "batch"; "none": A = N

    Over n completions with a reward, s is the largest of these: the standard deviation of the total rewards, which is
    GRPO's s, and sqrt(sum_j N[j, h]^2 / (n - 1)) at each position h. N sums to 0 over a group at each position, so

        |A| <= (n - 1) / sqrt(n)                    with "group", for n completions in the group,
        |A| <= sqrt((g - 1) (n - 1) / g)            with "batch", for n completions in groups of g.

    These are GRPO's bounds. The standard deviation of the totals alone gives no bound, because completions with nearly
    equal totals can have rewards-to-go that differ by many nats. "none" has no bound, as in GRPO.

    The baseline depends on the prompt and the position, never on the token chosen there, so it does not change the
    expected policy gradient (apart from each completion's own share in mean and s, as in GRPO). The result equals
    GRPO's advantage for completions of equal length with their whole reward on the last token, and for tokens that only
    the other functions reward.
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
    # A group with one scored completion has no spread (NaN) and gets advantage 0.
    return numerator.nan_to_num(0.0).float()


def centred(x: Tensor, group: int) -> Tensor:
    """Subtract from x (N, ...) the mean over each `group` of its rows. The mean ignores NaN entries, which stay NaN."""
    grouped = x.view(-1, group, *x.shape[1:])
    return (grouped - grouped.nanmean(1, keepdim=True)).view(x.shape)


def largest_spread(total: Tensor, numerator: Tensor) -> Tensor:
    """Return s (R,) from total (R, n), NaN where missing, and numerator (R, n, C). NaN for fewer than two totals."""
    count = (~total.isnan()).sum(1)
    of_totals = (total - total.nanmean(1, keepdim=True)).square().nansum(1)
    squares = torch.cat([of_totals[:, None], numerator.square().sum(1)], 1).amax(1)
    return torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)
