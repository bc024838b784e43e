"""TRL's GRPOTrainer with endogenous rewards, token by token (written against TRL 1.16).

class Trainer(EndoGRPOMixin, GRPOTrainer): ...

Trainer(model, reward_funcs=[EndoReward("Qwen/Qwen2.5-0.5B-Instruct")], ...)     an advantage for each token
Trainer(model, reward_funcs=[EndoReward()], args=GRPOConfig(beta=0.01), ...)     and one forward for two jobs: the
                                reward model is the trainer's reference model, whose log-probabilities it needs too
"""

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EndoRewardError
from ..model import EndoRewardModel
from ..returns import rewards_to_go
from ..scoring import evaluating
from ..vocabulary import refuse_other_vocabulary
from .generated import Ids
from .trl import EndoReward, Scored


class EndoGRPOMixin:
    """For a subclass of GRPOTrainer whose reward_funcs hold one EndoReward: class Trainer(EndoGRPOMixin, GRPOTrainer).

    token_level=True: every token gets the advantage of its own rewards-to-go (`token_advantages`), to which the other
    reward functions add theirs as GRPO does. False: GRPO's one advantage a completion.

    An EndoReward() without a model reads the trainer's reference model (beta above 0): rewards and reference
    log-probabilities are then one forward and one vocabulary pass, at alpha = the sampling temperature.

    Overridden: _calculate_rewards, _get_per_token_logps_and_entropies (of the reference model only) and
    _generate_and_score_completions (which replaces "advantages"). Raises EndoRewardError where they are not as in TRL
    1.16, or for a configuration that has no such rewards: it names what to change.
    """

    def __init__(self, *args: Any, token_level: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_interface(type(self))
        self.token_level = token_level
        self.endo_index, self.endo_reward = _the_endo_reward(self.reward_funcs)
        self.shares_forward = self.endo_reward.scorer is None
        self._from_reference: list[Scored] = []
        self._scored: Scored | None = None
        self._rewards_per_func: Tensor | None = None
        _check_configuration(self)
        if not self.shares_forward:
            refuse_other_vocabulary(self.endo_reward.scorer, self.processing_class)
        else:
            reference = EndoRewardModel(self.accelerator.unwrap_model(self.ref_model))
            self.endo_reward.attach(reference, self.processing_class)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if not self.shares_forward or model is not self.ref_model:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        batch_size = kwargs.get("batch_size") or len(input_ids)
        ids, attended = input_ids.split(batch_size), attention_mask.bool().split(batch_size)
        passes = [self._one_pass(*batch, logits_to_keep) for batch in zip(ids, attended, strict=True)]
        self._from_reference = [scored for scored, _ in passes]
        return torch.cat([logprob for _, logprob in passes]), None, None

    def _one_pass(self, input_ids: Tensor, attended: Tensor, width: int) -> tuple[Scored, Tensor]:
        """Rewards and log-probabilities (B, width) of the completions, from one forward as TRL's own would be."""
        scored = attended.clone()
        scored[:, :-width] = False
        last = scored & ~F.pad(scored[:, 1:], (0, 1))
        ends = torch.tensor(sorted(self.endo_reward.ends), device=input_ids.device)
        with evaluating(self.endo_reward.scorer), self.accelerator.autocast():
            found = self.endo_reward.scorer.rewards_of_padded(
                input_ids, scored, last & torch.isin(input_ids, ends), alpha=self.endo_reward.options.alpha,
                attention_mask=attended.to(input_ids.dtype),
            )  # fmt: skip
        # Cloned, as what comes out of inference mode cannot enter the loss.
        reward, value, logprob, mask = (
            x[:, -width:].clone() for x in (found.reward, found.value, found.logprob, scored)
        )
        return Scored.checked(reward.cpu(), value.cpu(), mask.cpu(), [None] * len(mask)), logprob

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.shares_forward:
            scored = self._take_shared(prompts, completion_ids_list)
        else:
            scored = self.endo_reward.score(self._tokenize_prompts(prompts)[0], completion_ids_list, completions)
        with self.endo_reward.given(scored):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored, self._rewards_per_func = scored, rewards
        return rewards

    def _take_shared(self, prompts: Sequence[Any], completions: Sequence[Ids]) -> Scored:
        """What the reference model's forward has found about these completions."""
        if not self._from_reference:
            raise EndoRewardError(f"TRL {version('trl')} asks for rewards before it has run the reference model")
        columns = list(zip(*self._from_reference, strict=True))
        self._from_reference = []
        scored = Scored(*(torch.cat(column) for column in columns[:3]), sum(columns[3], ()))
        # The trainer hides completions that it will not train on (mask_truncated_completions): they count in the
        # group's baseline all the same, so they are scored on their own.
        hidden = [i for i, on in enumerate(scored.mask.any(1).tolist()) if not on and scored.errors[i] is None]
        if not hidden:
            return scored
        ids = self._tokenize_prompts([prompts[i] for i in hidden])[0]
        own = self.endo_reward.score(ids, [completions[i] for i in hidden])
        return scored.with_rows(hidden, own)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.token_level:
            output["advantages"] = self._token_advantages(output["completion_ids"].shape[1])
        return output

    def _token_advantages(self, width: int) -> Tensor:
        """(B, width) advantages of this process's completions; groups may span processes."""
        scored, rewards = self._scored, self._rewards_per_func  # rewards: of all processes
        device, options = rewards.device, self.endo_reward.options
        to_go = rewards_to_go(scored.reward, scored.mask, gamma=options.gamma).masked_fill(~scored.mask, torch.nan)
        to_go = F.pad(to_go, (0, width - to_go.shape[1]), value=torch.nan).to(device)
        local = slice(self.accelerator.process_index * len(to_go), (self.accelerator.process_index + 1) * len(to_go))
        widest = self.accelerator.pad_across_processes(to_go, dim=1, pad_index=torch.nan)
        to_go = self.accelerator.gather(widest)
        group = self.num_generations if self.model.training else self.num_generations_eval
        advantages = token_advantages(
            to_go, rewards, endo=self.endo_index, weights=self.reward_weights.to(device), group=group,
            scale=self.scale_rewards,
        )  # fmt: skip
        return advantages[local, :width]


def token_advantages(
    to_go: Tensor, rewards: Tensor, *, endo: int, weights: Tensor, group: int, scale: Literal["group", "batch", "none"]
) -> Tensor:
    """Advantages of tokens, each group of `group` rows being completions of one prompt:

        A[i, h] = (w_e (G[i, h] - mean_j G[j, h]) + S_i - mean_j S_j) / (std + 1e-4)

    to_go    (N, C) G: rewards-to-go of the endogenous reward; NaN where there is no token. The mean is over the
             completions of the group that still go on at place h: of the last one, the rest is compared with nothing
    rewards  (N, K) every function's reward of each completion, NaN where it gave none; column `endo` is this one's
    weights  (K,) of the functions; S is the weighted sum of the others' rewards
    scale    std of the completions' total rewards: over the "group", the "batch", or 1 with "none"

    The baseline depends on the prompt and the place, never on the token chosen there, so the policy gradient keeps its
    expectation (up to the completion's own share in the mean, as in GRPO). For completions of one length whose whole
    reward comes with the last token, and for tokens that only the other functions reward, this is GRPO's advantage.
    Returns (N, C) float32; 0 for a row without any reward.
    """
    given = ~rewards.isnan()
    other = [k for k in range(rewards.shape[1]) if k != endo]
    weighted = rewards * weights
    others = weighted[:, other].nansum(1).masked_fill(~given[:, other].any(1), torch.nan)
    total = weighted.nansum(1).masked_fill(~given.any(1), torch.nan)
    own = centred(to_go.masked_fill(~given[:, [endo]], torch.nan), group) * weights[endo]
    advantages = own.nan_to_num(0.0) + centred(others, group).nan_to_num(0.0)[:, None]
    if scale != "none":
        size = group if scale == "group" else len(total)
        advantages = advantages / (_nanstd(total.view(-1, size)).repeat_interleave(size)[:, None] + 1e-4)
    return advantages.nan_to_num(0.0)  # one scored completion in a group has no spread, and nothing to be compared with


def centred(x: Tensor, group: int) -> Tensor:
    """x (N, ...) less the mean over each `group` of its rows; NaN entries stay NaN and do not count."""
    grouped = x.view(-1, group, *x.shape[1:])
    return (grouped - grouped.nanmean(1, keepdim=True)).view(x.shape)


def _nanstd(x: Tensor) -> Tensor:
    """(R, C) -> (R,): unbiased standard deviation of what is not NaN; NaN for fewer than two."""
    count = (~x.isnan()).sum(1)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum(1)
    return torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)


def _the_endo_reward(functions: Sequence[Any]) -> tuple[int, EndoReward]:
    """(index, function) of the one EndoReward."""
    found = [(i, f) for i, f in enumerate(functions) if isinstance(f, EndoReward)]
    if len(found) != 1:
        raise EndoRewardError(f"EndoGRPOMixin wants exactly one EndoReward in reward_funcs, found {len(found)}")
    return found[0]


EXPECTED = {
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep"],
    "_generate_and_score_completions": ["inputs"],
    "_tokenize_prompts": ["prompts"],
}


def _check_interface(trainer: type) -> None:
    """EndoRewardError unless the trainer below the mixin has the methods that it overrides and calls."""
    below = super(EndoGRPOMixin, trainer)  # type: ignore[misc]
    for name, wanted in EXPECTED.items():
        method = getattr(below, name, None)
        found = list(inspect.signature(method).parameters)[1 : len(wanted) + 1] if method else None
        if found != wanted:
            arguments = "is missing" if found is None else f"takes ({', '.join(found)})"
            raise EndoRewardError(
                f"TRL {version('trl')} has another GRPOTrainer than EndoGRPOMixin was written for (1.16): {name} "
                f"{arguments}; EndoReward as a plain reward function may still work"
            )


def _check_configuration(trainer: Any) -> None:
    """EndoRewardError, saying what to change, for what these rewards have no meaning in."""
    args, reward = trainer.args, trainer.endo_reward
    if trainer.tools:
        raise EndoRewardError("EndoGRPOMixin does not know which tokens are tool results: train without tools")
    if trainer.token_level and (reward.options.reduction != "sum" or reward.options.floor > 0):
        raise EndoRewardError(
            "rewards-to-go are sums: reduction='mean' and floor are for token_level=False (gamma works with both)"
        )
    if trainer.token_level and args.multi_objective_aggregation != "sum_then_normalize":
        raise EndoRewardError("token advantages need multi_objective_aggregation='sum_then_normalize'")
    if not trainer.shares_forward:
        if reward.scorer.model is trainer.accelerator.unwrap_model(trainer.model):
            raise EndoRewardError("the reward model is the module being trained: give EndoReward a copy, or no model")
        return
    if trainer.ref_model is None:
        raise EndoRewardError(
            "EndoReward() reads the trainer's reference model, and this trainer has none (beta=0, or PEFT): "
            "set beta above 0 without PEFT, or give EndoReward a model"
        )
    if getattr(trainer, "_is_vlm", False):
        raise EndoRewardError("one pass reads token ids, no images: give EndoReward a model, or train without images")
    if reward.options.alpha != args.temperature:
        raise EndoRewardError(
            f"one pass gives rewards and reference log-probabilities at one temperature: EndoReward's "
            f"alpha={reward.options.alpha} is not the trainer's temperature={args.temperature}; make them equal, or "
            "give EndoReward a model"
        )
    if args.sync_ref_model:
        raise EndoRewardError(
            "sync_ref_model moves the reward with the policy: turn it off, or give EndoReward a model"
        )
    if reward.system:
        raise EndoRewardError("a system prompt that only the reward sees needs a forward of its own: give it a model")
