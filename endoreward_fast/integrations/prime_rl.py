"""Token-level endogenous advantages in prime-rl (written against prime-rl 0.8.0, commit 559b447).

prime-rl names its algorithms in its own code and has no hook for others. Two additions to its source make one:

    # src/prime_rl/orchestrator/algo/endo.py, registered in ALGORITHM_CLASSES as "endo"
    class EndoAlgorithm(EndoScoring, Algorithm):
        pass

    # packages/prime-rl-configs/src/prime_rl/configs/algorithm.py, added to the union AlgoConfig
    class EndoAlgoConfig(BaseAlgoConfig):
        type: Literal["endo"] = "endo"
        model: str

This module does not import prime-rl: it reads and annotates the graphs of messages that prime-rl hands over.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import EndoRewardError
from ..scoring.sampled import Rewarded, generated_row
from .batched import BatchedReward
from .token_level import group_advantages, mean_of, weight_of


class Branch(NamedTuple):
    """One path through a trace, from its root to a leaf: a training sample of prime-rl's."""

    trace: Any
    nodes: tuple[Any, ...]
    """the nodes whose sampled tokens this branch trains; others that it shares with earlier branches are context"""
    token_ids: list[int]
    own: list[int]
    """1 for the sampled tokens of `nodes`"""
    images: bool


class EndoScoring:
    """Mixin for prime-rl's Algorithm: class EndoAlgorithm(EndoScoring, Algorithm).

    The fields of its configuration are read, with these defaults where one is missing:
    model         the frozen initial policy: a name or folder, or the URL of a server ("http://HOST:PORT"). It has to
                  have the policy's vocabulary
    alpha         1.0, temperature of the rewards
    gamma         1.0, discount of the rewards-to-go
    scale         "group": divide by the group's largest spread (`token_advantages`). "none": do not divide
    environment   0.0, weight of the environment's reward (trace.reward), added as GRPO adds it
    max_tokens_per_batch      as in EndoRewardModel.score

    Every sampled token gets the advantage of its endogenous reward-to-go within its group. A branch is a sample: its
    tokens are scored after all tokens before them. Tokens that the policy did not sample (tools, users) are context.
    A node that several branches share is scored once, in the first one, which is the one that trains it. A branch that
    ends in an end-of-sequence token of the policy's is complete; any other is bootstrapped with V(s').

    A branch that cannot be scored (too long, not finite, with images) is no part of its group's baseline. Without an
    environment's weight its advantages are 0, and prime-rl drops such tokens. `reward.reasons` counts the reasons.
    Each trace's metrics get endo_reward/token (mean reward of a token), endo_reward/first_value (V of the prompt),
    endo_reward/length and endo_reward/unscored (a number of branches).

    Traces with an error, and agents that are not trained, are left alone.

    Raises EndoRewardError: a configuration without a model, an option outside of its range, a node whose mask does not
    fit its tokens.
    """

    def __init__(self, config: Any, policy_pool: Any) -> None:
        super().__init__(config, policy_pool)  # type: ignore[call-arg]
        self.model = getattr(config, "model", None)
        if not self.model:
            raise EndoRewardError(
                "this algorithm's configuration has no model: add model: str to it, and set it to the initial policy"
            )
        self.gamma, self.scale = getattr(config, "gamma", 1.0), getattr(config, "scale", "group")
        if self.scale not in ("group", "none"):
            raise EndoRewardError(f"scale={self.scale!r}: expected 'group' or 'none'")
        self.environment = weight_of(getattr(config, "environment", 0.0))
        names = ("alpha", "gamma", "max_tokens_per_batch")  # BatchedReward checks them
        self.options = {name: getattr(config, name) for name in names if hasattr(config, name)}

    async def setup(self) -> None:
        """Load the reward model."""
        await super().setup()  # type: ignore[misc]
        self.reward = await asyncio.to_thread(BatchedReward, self.model, **self.options)

    async def score_group(self, episodes: Sequence[Any]) -> None:
        """Set the advantages of every sampled token of a group's traces."""
        branches = [branch for trace in _trained(episodes) for branch in _branches(trace)]
        if not branches:
            return
        found = await asyncio.gather(*map(self._score, branches))
        others = [branch.trace.reward for branch in branches] if self.environment else None
        advantages = group_advantages(
            [None if rewarded.error else rewarded.rewards for rewarded in found],
            [sum(branch.own) for branch in branches], gamma=self.gamma, scale=self.scale, others=others,
            weight=self.environment,
        )  # fmt: skip
        for trace in _trained(episodes):  # a node of no branch, such as an abandoned attempt, gets 0
            _assign(trace.nodes, [0.0] * sum(sum(map(bool, node.mask)) for node in trace.nodes))
            mine = [one.metrics() for branch, one in zip(branches, found, strict=True) if branch.trace is trace]
            trace.metrics.update(mean_of(mine))
        for branch, values in zip(branches, advantages, strict=True):
            _assign(branch.nodes, values)

    async def _score(self, branch: Branch) -> Rewarded:
        if branch.images:
            return self.reward.without("it has images, and one pass reads token ids")
        first = branch.own.index(1)
        ids, own = branch.token_ids, branch.own
        row = generated_row(ids[:first], ids[first:], self.reward.ends, own[first:])
        return await asyncio.wrap_future(self.reward.submit(row))


def _trained(episodes: Sequence[Any]) -> Iterator[Any]:
    """Yield the traces that prime-rl trains on: without an error, of a trained agent, with sampled tokens."""
    for episode in episodes:
        for trace in episode.traces:
            if not trace.has_error and trace.agent.trainable and any(any(node.mask) for node in trace.nodes):
                yield trace


def _branches(trace: Any) -> Iterator[Branch]:
    """Yield the branches that train a token. A shared node is trained in the first branch that contains it."""
    seen: set[int] = set()
    for branch in trace.branches:
        ids: list[int] = []
        own: list[int] = []
        new = []
        for node in branch.nodes:
            if any(node.mask) and len(node.mask) != len(node.token_ids):
                raise EndoRewardError(
                    f"a node of trace {trace.id!r} has {len(node.mask)} mask entries for {len(node.token_ids)} tokens: "
                    "install prime-rl 0.8"
                )
            mine = any(node.mask) and id(node) not in seen
            ids += node.token_ids
            own += [int(sampled) for sampled in node.mask] if mine else [0] * len(node.token_ids)
            if mine:
                seen.add(id(node))
                new.append(node)
        if new:
            yield Branch(trace, tuple(new), ids, own, getattr(branch, "multi_modal_data", None) is not None)


def _assign(nodes: Sequence[Any], values: Sequence[float]) -> None:
    """Store one advantage for each sampled token, node by node, as prime-rl's `assign_advantages` does."""
    start = 0
    for node in nodes:
        if not any(node.mask):
            continue
        end = start + sum(map(bool, node.mask))
        node.advantages = list(values[start:end])
        start = end
