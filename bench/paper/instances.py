r"""Four instances for the claim about horizons (bench/paper/policy.py), each an expert and a model that imitates it.

Each expert is soft-optimal for its true reward at temperature alpha. H is the horizon.

cliff      One mistake loses all later reward (Ross & Bagnell 2010). On the track, two of the 8 tokens are right and
           earn 1 and 1 - TIE. Any other token leaves the track for good; off the track, every token earns 0. The model
           is the maximum-likelihood fit to n demonstrations with half a pseudo-count per token. At every step it leaves
           the track with the same probability 6 tokens * 1/2 / (n + 4), about 3 / n, whatever H. Off the track it has
           no data and is uniform.
confident  As `cliff`, but off the track the model puts 0.99 on one token, like a language model that repeats itself. In
           the expert's states, the model and its error are the same as in `cliff`.
random     A random automaton with 8 states, 8 tokens and rewards N(0, 1); the model as in `cliff`. Every mistake can be
           recovered from.
walk       In *every* state, the model's log-probabilities are within WALK_ERROR of the expert's. For H/2 steps, the
           expert writes "up" or "down" with equal probability and no reward. If there were more ups, the token with
           probability 0.95 then earns alpha log(2 * 0.95) per step and the other alpha log(2 * 0.05); else both earn
           nothing. Both branches have the soft value (H/2) alpha log 2, so the soft-optimal expert is indifferent
           between them, although the first earns more. The model takes "up" slightly too rarely at every step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.paper import mdp as tabular
from bench.paper.mdp import TokenMDP

RIGHT, VOCAB, TIE = 2, 8, 0.005
OFF, SURE = 1, 0.99
CLIFF_ALPHA, RANDOM_ALPHA, SMOOTHING = 0.1, 0.5, 0.5
WALK_ERROR, WALK_SURE = 0.01, 0.95


@dataclass(frozen=True)
class Instance:
    mdp: TokenMDP
    alpha: float
    values: Tensor  # (H, S, A): the expert's logits, soft-optimal Q for mdp.reward at alpha
    logits: Tensor  # (H, S, A): the model's logits


def cliff(
    horizon: int,
    n: int,
    rng: np.random.Generator,
    alpha: float = CLIFF_ALPHA,
    tie: float = TIE,
    smoothing: float = SMOOTHING,
) -> Instance:
    step = torch.full((2, VOCAB), OFF)
    step[0, :RIGHT] = 0
    reward = torch.zeros(2, VOCAB, dtype=torch.float64)
    reward[0, :RIGHT] = torch.linspace(1, 1 - tie, RIGHT, dtype=torch.float64)
    shape = (horizon, 2, VOCAB)
    return _imitated(TokenMDP(step.expand(shape), reward.expand(shape), torch.tensor([0])), alpha, n, smoothing, rng)


def confident(horizon: int, n: int, rng: np.random.Generator) -> Instance:
    instance = cliff(horizon, n, rng)
    belief = torch.full((VOCAB,), (1 - SURE) / (VOCAB - 1), dtype=torch.float64)
    belief[0] = SURE
    instance.logits[:, OFF] = instance.alpha * belief.log()
    return instance


def random(horizon: int, n: int, rng: np.random.Generator, alpha: float = RANDOM_ALPHA) -> Instance:
    return _imitated(tabular.random_mdp(rng, horizon, 8, VOCAB), alpha, n, SMOOTHING, rng)


def walk(horizon: int, error: float = WALK_ERROR, alpha: float = 1.0) -> Instance:
    """Build `walk`. horizon / 2 must be odd, so that ups and downs differ. States: ups - downs + H / 2, from 0 to H."""
    half = horizon // 2
    if horizon % 4 != 2:
        raise ValueError(f"horizon={horizon}: expected twice an odd number")
    states = torch.arange(horizon + 1)
    step = states[None, :, None].repeat(horizon, 1, 2)
    step[:half, :, 0] = (states + 1).clamp(max=horizon)
    step[:half, :, 1] = (states - 1).clamp(min=0)
    reward = torch.zeros(horizon, horizon + 1, 2, dtype=torch.float64)
    earned = alpha * torch.tensor([2 * WALK_SURE, 2 * (1 - WALK_SURE)], dtype=torch.float64).log()
    reward[half:, half + 1 :] = earned
    mdp = TokenMDP(step, reward, torch.tensor([half]))
    q, _ = tabular.action_values(mdp, reward, alpha)
    logits = q.clone()
    up = torch.tensor(0.5, dtype=torch.float64).mul(np.exp(-error))
    logits[:half] = alpha * torch.stack([up, 1 - up]).log()
    return Instance(mdp, alpha, q, logits)


def _imitated(mdp: TokenMDP, alpha: float, n: int, smoothing: float, rng: np.random.Generator) -> Instance:
    q, _ = tabular.action_values(mdp, mdp.reward, alpha)
    counts = tabular.demonstrations(mdp, tabular.policy_of(q, alpha), n, rng)
    return Instance(mdp, alpha, q, tabular.fit(counts, alpha, smoothing))
