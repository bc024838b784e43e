r"""Tabular token MDPs with exact values. A language model is a table of logits.

A completion has H tokens from a vocabulary of size A. A finite automaton with S states reads its prefix, so a state of
the MDP is (h, s): the number of tokens written and the state of the automaton. Transitions are deterministic, as in
text: s' = next_state[h, s, a]. After H tokens the episode ends and V = 0. A *model* is a table of logits z (H, S, A).

All tensors are float64. alpha is the soft-RL temperature, in the unit of the rewards; alpha = 0 means the hard maximum.

    Q(s, a) = r(s, a) + V(s')    V(s) = alpha log sum_a exp(Q(s, a) / alpha)    pi(a|s) = exp((Q(s, a) - V(s)) / alpha)

This is soft value iteration (Ziebart 2010; Haarnoja et al., arXiv 1702.08165). The endogenous reward inverts it (Li et
al., arXiv 2506.23235). `endogenous` and `completion_rewards` compute it with endoreward_fast.token_rewards, which reads
the table like the logits of a language model.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from endoreward_fast import token_rewards
from endoreward_fast.vocab import reference


@dataclass(frozen=True)
class TokenMDP:
    next_state: Tensor  # (H, S, A) int64
    reward: Tensor  # (H, S, A) float64: the true reward
    starts: Tensor  # (P,) int64: state of the automaton after each prompt; prompts are drawn uniformly

    @property
    def horizon(self) -> int:
        return self.reward.shape[0]

    @property
    def states(self) -> int:
        return self.reward.shape[1]

    @property
    def vocab(self) -> int:
        return self.reward.shape[2]


def random_mdp(rng: np.random.Generator, horizon: int, states: int, vocab: int, prompts: int = 1) -> TokenMDP:
    """Draw a random automaton, the same at every step, and rewards from N(0, 1) for every (step, state, token)."""
    step = torch.from_numpy(rng.integers(states, size=(states, vocab)))
    reward = torch.from_numpy(rng.normal(size=(horizon, states, vocab)))
    return TokenMDP(step.expand(horizon, states, vocab), reward, torch.arange(prompts))


def action_values(mdp: TokenMDP, reward: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return Q (H, S, A) and V (H + 1, S) of the soft-optimal policy for `reward` (H, S, A), or, at alpha = 0, of the
    optimal policy."""
    q, v = torch.empty_like(reward), reward.new_zeros(mdp.horizon + 1, mdp.states)
    for h in reversed(range(mdp.horizon)):
        q[h] = reward[h] + v[h + 1][mdp.next_state[h]]
        v[h] = alpha * torch.logsumexp(q[h] / alpha, -1) if alpha else q[h].amax(-1)
    return q, v


def policy_of(logits: Tensor, alpha: float) -> Tensor:
    """Return softmax(z / alpha) (H, S, A). alpha = 0 gives the greedy policy, which takes the first of equal logits."""
    if alpha:
        return torch.softmax(logits / alpha, -1)
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


def expected_return(mdp: TokenMDP, policy: Tensor, reward: Tensor | None = None) -> float:
    """Return the expected sum of `reward` (default: the true reward) under `policy`, averaged over the prompts."""
    reward = mdp.reward if reward is None else reward
    v = reward.new_zeros(mdp.states)
    for h in reversed(range(mdp.horizon)):
        v = (policy[h] * (reward[h] + v[mdp.next_state[h]])).sum(-1)
    return float(v[mdp.starts].mean())


def visits(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """Return the probability (H, S) that a prefix of h tokens leads to state s under `policy`."""
    d = policy.new_zeros(mdp.horizon, mdp.states)
    d[0].index_add_(0, mdp.starts, policy.new_full(mdp.starts.shape, 1 / len(mdp.starts)))
    for h in range(mdp.horizon - 1):
        d[h + 1].index_add_(0, mdp.next_state[h].flatten(), (d[h, :, None] * policy[h]).flatten())
    return d


def demonstrations(mdp: TokenMDP, policy: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Return counts (H, S, A) of (step, state, token) in n completions sampled from `policy`.

    One multinomial draws the tokens of all completions in a state. The counts have the same distribution as those of n
    separate completions, at a cost independent of n.
    """
    counts = np.zeros(policy.shape, dtype=np.int64)
    there = np.zeros(mdp.states, dtype=np.int64)
    np.add.at(there, mdp.starts.numpy(), rng.multinomial(n, np.full(len(mdp.starts), 1 / len(mdp.starts))))
    for h, p in enumerate(policy.numpy()):
        counts[h] = rng.multinomial(there, p / p.sum(-1, keepdims=True))
        there = np.zeros_like(there)
        np.add.at(there, mdp.next_state[h].numpy().ravel(), counts[h].ravel())
    return torch.from_numpy(counts)


def fit(counts: Tensor, alpha: float, smoothing: float = 0.5) -> Tensor:
    """Return logits (H, S, A) of the language model that maximises the likelihood of `counts` with pseudo-counts.

        pi(a|s) = (N(s, a) + c) / (N(s) + c A)        z = alpha (log pi - its mean over a)

    c = `smoothing` must be positive, else an unseen token has logit -inf. c = 1/2 is Krichevsky and Trofimov's. An
    unseen state gets the uniform distribution. The likelihood does not determine one constant per state. Here, each
    state's logits have mean 0, as after gradient descent from z = 0: the gradient of the cross-entropy sums to 0 over
    the vocabulary.
    """
    log_policy = torch.log(counts.double() + smoothing)
    return alpha * (log_policy - log_policy.mean(-1, keepdim=True))


def endogenous(mdp: TokenMDP, logits: Tensor, alpha: float, exact: bool = False) -> Tensor:
    """Return the endogenous reward (H, S, A) of every token in every state, by endoreward_fast.token_rewards.

    Each (state, token) is a row of two tokens with the logits of the state and of its successor. token_rewards computes
    in float32. `exact` uses the package's float64 oracle (endoreward_fast.vocab.reference), for comparisons below 1e-6.
    """
    h, s, a = logits.shape
    after = torch.zeros(h, s, a, a, dtype=logits.dtype)
    after[:-1] = logits[1:][torch.arange(h - 1)[:, None, None], mdp.next_state[:-1]]
    both = torch.stack([logits[:, :, None].expand_as(after), after], -2)  # (H, S, A, 2, A)
    tokens = torch.stack([torch.zeros(a, dtype=torch.int64), torch.arange(a)], -1).expand(h, s, a, 2)
    ends = torch.zeros(h, s, a, 2, dtype=torch.bool)
    ends[-1, ..., 1] = True
    score = _exact if exact else token_rewards
    out = score(both.reshape(-1, 2, a), tokens.reshape(-1, 2), terminal=ends.reshape(-1, 2), alpha=alpha)
    return out.reward[:, 1].double().view(h, s, a)


def _exact(logits: Tensor, tokens: Tensor, **options):
    return reference.token_rewards(logits, tokens, dtype=torch.float64, **options)


def all_completions(mdp: TokenMDP) -> Tensor:
    """Return every completion (A^H, H) int64, in the order of base-A numbers."""
    digits = mdp.vocab ** torch.arange(mdp.horizon).flip(0)
    return torch.arange(mdp.vocab**mdp.horizon)[:, None] // digits % mdp.vocab


def along(mdp: TokenMDP, start: int, completions: Tensor, table: Tensor) -> Tensor:
    """Return the rows (B, H, A) of `table` (H, S, A) at the states along each completion (B, H)."""
    state, rows = torch.full((len(completions),), start), []
    for h in range(mdp.horizon):
        rows.append(table[h, state])
        state = mdp.next_state[h, state, completions[:, h]]
    return torch.stack(rows, 1)


def per_token(mdp: TokenMDP, start: int, completions: Tensor, table: Tensor) -> Tensor:
    """Return table[h, s_h, a_h] (B, H) along each completion (B, H)."""
    return along(mdp, start, completions, table).gather(-1, completions[..., None]).squeeze(-1)


def completion_rewards(mdp: TokenMDP, start: int, completions: Tensor, logits: Tensor, alpha: float) -> Tensor:
    """Return the endogenous reward (B, H) of each token, scored like text: a prompt token and H tokens with logits."""
    rows = along(mdp, start, completions, logits)
    rows = torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)  # the state after the last token is terminal
    tokens = torch.cat([torch.zeros_like(completions[:, :1]), completions], 1)
    return token_rewards(rows, tokens, alpha=alpha).reward[:, 1:].double()
