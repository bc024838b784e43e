r"""Four instances for the claim about horizons (bench/paper/policy.py): an expert, and a model that imitates it.

Each expert is soft-optimal for its true reward at temperature alpha. H is the horizon.

cliff      One mistake costs the rest (Ross & Bagnell 2010). On the track two tokens of 8 are right, and earn 1 and
           1 - TIE; any other leaves it for good, and off the track every token earns 0. The model: maximum likelihood
           on n demonstrations, half a pseudo-count per token. At every step it leaves the track with the same
           probability, whatever H: 6 tokens * 1/2 / (n + 4), about 3 / n. Off the track it knows nothing: uniform.
confident  The same, but off the track the model is sure of itself (0.99 on one token), as a language model that repeats
           itself is. In the expert's states it is the same model, with the same error.
random     A random automaton of 8 states, 8 tokens, rewards N(0, 1); the model as in `cliff`. Nothing is final.
walk       The model's log-probabilities are within WALK_ERROR of the expert's in *every* state. For H/2 steps the
           expert writes "up" or "down" with equal probability, for no reward. If ups prevail, it then earns per step
           alpha log(2 * 0.95) by the token it takes with probability 0.95 and alpha log(2 * 0.05) by the other; else
           nothing, by either token. Both ways have the soft value (H/2) alpha log 2, so soft-optimality is content with
           a coin, though the first earns more. The model takes "up" a little too seldom, always.
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
    values: Tensor  # Q (H, S, A), soft-optimal for mdp.reward at alpha: the expert's logits
    logits: Tensor  # the model's (H, S, A)


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
    """horizon = 2 * an odd number, so that ups or downs prevail. States: ups - downs + H / 2, from 0 to H."""
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
