"""Token rewards in SkyRL (written against skyrl 0.3.0): a generator that replaces the rewards of another one.

    class Exp(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            inner = super().get_generator(cfg, tokenizer, inference_engine_client)
            return EndoGenerator(inner, cfg.trainer.policy.model.path, tokenizer)

This module does not import SkyRL, which passes dictionaries and requires no base class.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import EndoRewardError
from ..returns import rewards_to_go
from ..scoring.sampled import Own, Rewarded, generated_row
from .advantages import token_advantages
from .batched import BatchedReward
from .token_level import mean_of, spread, weight_of


class EndoGenerator:
    """A SkyRL generator: `generator`'s trajectories, with a reward for every token (`rewards: List[List[float]]`).

    generator     the generator whose output is scored: SkyRLGymGenerator or any other GeneratorInterface
    model         the frozen initial policy: a name or folder, a loaded causal language model, or an EndoRewardModel. Or
                  the URL of a server ("http://HOST:PORT"), or a RemoteModel
    tokenizer     the policy's tokenizer. Default: the reward model's
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score. A token's reward is its part
                  of the score. Leave gamma at 1 for an estimator that discounts by itself (trainer.algorithm.gamma)
    environment   weight of the environment's own rewards, added where they are. Default: 0

    Trajectories are scored as `response_ids` after `prompt_token_ids`. Tokens with a 0 in `loss_masks` (observations,
    an end token that SkyRL appended) are context and have no reward. A response whose last token is an end-of-sequence
    token of the policy's is complete; any other is bootstrapped with V(s').

    A trajectory that cannot be scored (too long, not finite, all masked) leaves the loss: its loss mask becomes 0. It
    gets the mean score of its prompt's other trajectories, so that it does not move their baseline.

    Evaluation keeps the environment's rewards. `rollout_metrics` gets endo_reward/token (mean reward of a token),
    endo_reward/first_value (V of the prompt), endo_reward/length and endo_reward/unscored.

    Raises EndoRewardError: a tokenizer other than the reward model's, an invalid option, step-wise trajectories (SkyRL
    reads the rewards of each last step only), images.
    """

    def __init__(
        self, generator: Any, model: Any, tokenizer: Any = None, *, alpha: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum", gamma: float = 1.0, floor: float = 0.0,
        max_tokens_per_batch: int | None = None, environment: float = 0.0,
    ) -> None:  # fmt: skip
        self.generator, self.environment = generator, weight_of(environment)
        self.reward = BatchedReward(
            model, tokenizer, alpha=alpha, reduction=reduction, gamma=gamma, floor=floor,
            max_tokens_per_batch=max_tokens_per_batch,
        )  # fmt: skip

    async def generate(self, input_batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inner generator's output with token rewards, in its order."""
        output = dict(await self.generator.generate(input_batch))
        if getattr(input_batch.get("batch_metadata"), "training_phase", "train") == "eval":
            return output
        _check_kind(output)
        masks, responses = output["loss_masks"], output["response_ids"]
        rows = zip(output["prompt_token_ids"], responses, masks, strict=True)
        found = await asyncio.gather(*(self._score(*row) for row in rows))
        own = output["rewards"] if self.environment else [0.0] * len(found)
        rewards = [
            None if rewarded.error else self._with_environment(spread(rewarded.tokens, mask), mask, theirs)
            for rewarded, mask, theirs in zip(found, masks, own, strict=True)
        ]
        groups = [getattr(i, "instance_id", None) for i in input_batch.get("trajectory_ids") or [None] * len(found)]
        output["loss_masks"] = [
            [0] * len(mask) if row is None else mask for row, mask in zip(rewards, masks, strict=True)
        ]
        output["rewards"] = _filled(rewards, groups, [len(ids) for ids in responses])
        output["rollout_metrics"] = (output.get("rollout_metrics") or {}) | mean_of([r.metrics() for r in found])
        return output

    async def _score(self, prompt: Sequence[int], response: Sequence[int], mask: Own) -> Rewarded:
        if len(mask) != len(response):
            return self.reward.without(f"its loss mask has {len(mask)} entries for {len(response)} tokens")
        asked = generated_row(list(prompt), list(response), self.reward.ends, [int(chosen) for chosen in mask])
        return await asyncio.wrap_future(self.reward.submit(asked))

    def _with_environment(self, rewards: list[float], mask: Own, theirs: float | Sequence[float]) -> list[float]:
        """Add the environment's rewards: those of tokens where they are, one of a whole response to its last token."""
        if not self.environment:
            return rewards
        if not isinstance(theirs, Sequence):
            theirs = [0.0] * (len(mask) - 1) + [theirs]
        return [mine + self.environment * value for mine, value in zip(rewards, theirs, strict=True)]


def _check_kind(output: Mapping[str, Any]) -> None:
    if not all(output.get("is_last_step") or [True]):
        raise EndoRewardError(
            "SkyRL reads the rewards of each trajectory's last step only, and these trajectories have several: set "
            "generator.step_wise_trajectories=false"
        )
    if any(images is not None for images in output.get("pixel_values") or ()):
        raise EndoRewardError("one pass reads token ids, no images: train without images")


def _filled(rewards: Sequence[list[float] | None], groups: Sequence[Any], lengths: Sequence[int]) -> list[list[float]]:
    """Give each trajectory without rewards its group's mean score, on its last token."""
    found = []
    for row, group, length in zip(rewards, groups, lengths, strict=True):
        if row is None:
            scores = [sum(r) for r, g in zip(rewards, groups, strict=True) if g == group and r is not None]
            row = [0.0] * (length - 1) + [sum(scores) / len(scores) if scores else 0.0][:length]
        found.append(row)
    return found


def token_level_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any], gamma: float = 1.0,
    grpo_norm_by_std: bool = True, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the advantage of each token within its group: an advantage estimator for SkyRL's registry.

        AdvantageEstimatorRegistry.register("endo_token_level", token_level_advantages)

    token_level_rewards, response_mask      (B, T). index: (B,) the prompt of each response
    Returns (advantages, returns): `token_advantages` of the rewards-to-go, and the rewards-to-go, both (B, T), 0 off
    the mask. SkyRL's own "grpo" sums a response's rewards and gives all of its tokens one advantage.
    """
    on = response_mask.bool()
    rewards = token_level_rewards.float().masked_fill(~on, 0.0)
    to_go = rewards_to_go(rewards, on, gamma=gamma)
    advantages = torch.zeros_like(to_go)
    totals = rewards.sum(1, keepdim=True).double()
    places: dict[Any, list[int]] = {}
    for row, prompt in enumerate(index):
        places.setdefault(prompt, []).append(row)
    for rows in places.values():
        found = token_advantages(
            to_go[rows].masked_fill(~on[rows], torch.nan), totals[rows], endo=0,
            weights=torch.ones(1, device=to_go.device), group=len(rows), scale="group" if grpo_norm_by_std else "none",
        )  # fmt: skip
        advantages[rows] = found
    return advantages, to_go * on
