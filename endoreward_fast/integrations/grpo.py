"""Token-level endogenous rewards in TRL's GRPOTrainer (written against TRL 1.16).

Combine the mixin with the trainer, and pass one EndoReward:

    class Trainer(EndoGRPOMixin, GRPOTrainer): ...

    # One advantage for each token:
    Trainer(model, reward_funcs=[EndoReward("Qwen/Qwen2.5-0.5B-Instruct")], ...)
    # The trainer's reference model is the reward model; one forward gives rewards and reference log-probabilities:
    Trainer(model, reward_funcs=[EndoReward()], args=GRPOConfig(beta=0.01), ...)
"""

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EndoRewardError
from ..model.batch_layout import PaddingLast
from ..model.model import EndoRewardModel
from ..returns import rewards_to_go
from ..scoring.evaluating import evaluating
from ..scoring.sampled import Ids, Own
from .advantages import token_advantages
from .generated import refuse_other_tokenizer
from .trl import EndoReward, Scored


class Generated(NamedTuple):
    """The token ids that the trainer generated for a batch of prompts."""

    prompts: Sequence[Ids]
    completions: Sequence[Ids]
    own: Sequence[Own] | None
    """0 for tokens of a tool or an environment (TRL's tool_mask, a rollout's env_mask); None: all are the policy's"""


class EndoGRPOMixin:
    """Mixin for GRPOTrainer with one EndoReward in reward_funcs: class Trainer(EndoGRPOMixin, GRPOTrainer).

    token_level=True gives every token the advantage of its rewards-to-go (`token_advantages`). Other reward functions
    add one advantage per completion, as in GRPO. token_level=False gives GRPO's one advantage per completion.

    An EndoReward() without a model reads the trainer's reference model, which needs beta above 0. One forward and one
    vocabulary pass then give rewards and reference log-probabilities. alpha must equal the sampling temperature.

    Completions are scored after the prompt ids that the policy read, tools and environments included. Tokens from a
    tool or an environment are context and have no reward.

    The mixin overrides _generate (only to read its result), _calculate_rewards, _generate_and_score_completions (to
    replace "advantages") and _get_per_token_logps_and_entropies. The last one is overridden for the reference model,
    and for a policy without position_ids (GPT-2 counts TRL's left padding as positions).

    Raises EndoRewardError if the trainer's methods differ from TRL 1.16's, or if its configuration does not allow such
    rewards. The message says what to change.
    """

    def __init__(self, *args: Any, token_level: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_interface(type(self))
        self.token_level = token_level
        self.endo_index, self.endo_reward = _find_endo_reward(self.reward_funcs)
        self.shares_forward = self.endo_reward.scorer is None
        self.counts_from_padding = False
        self._generated = Generated((), (), None)
        self._from_reference: list[Scored] = []
        self._scored: Scored | None = None
        self._rewards_per_func: Tensor | None = None
        _check_configuration(self)
        if not self.shares_forward:
            refuse_other_tokenizer(self.endo_reward.scorer, self.processing_class)
        else:
            reference = EndoRewardModel(self.accelerator.unwrap_model(self.ref_model))
            self.endo_reward.attach(reference, self.processing_class)
            self.counts_from_padding = reference.layouts.counts_from_padding(self.args.per_device_train_batch_size)

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        self._generated = Generated(*generated[:3])
        return generated

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        theirs = super()._get_per_token_logps_and_entropies
        if self.shares_forward and model is self.ref_model:
            return self._reference_logprobs(input_ids, attention_mask, logits_to_keep, kwargs.get("batch_size"))
        if not self.counts_from_padding:
            return theirs(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        # TRL passes no position_ids. With the padding on the right, positions are the same as during generation.
        rows = PaddingLast(attention_mask)
        moved = rows.move(input_ids), rows.move(attention_mask)
        *per_token, aux_loss = theirs(model, *moved, moved[0].shape[1] - 1, *args, **kwargs)
        logprob, entropy = (
            None if x is None else rows.back(F.pad(x, (1, 0)))[:, -logits_to_keep:] for x in per_token
        )  # fmt: skip
        return logprob, entropy, aux_loss

    def _reference_logprobs(self, input_ids: Tensor, attention_mask: Tensor, width: int, batch_size: int | None):
        """Return what _get_per_token_logps_and_entropies does, and keep the rewards of the same pass."""
        own = torch.ones(len(input_ids), width, dtype=torch.bool, device=input_ids.device)
        for row, mask in zip(own, self._generated.own or (), strict=self._generated.own is not None):
            row[: len(mask)] = torch.tensor(mask, dtype=torch.bool)
        batches = (x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask.bool(), own))
        passes = [self._one_pass(*batch) for batch in zip(*batches, strict=True)]
        self._from_reference = [scored for scored, _ in passes]
        return torch.cat([logprob for _, logprob in passes]), None, None

    def _one_pass(self, input_ids: Tensor, attended: Tensor, own: Tensor) -> tuple[Scored, Tensor]:
        """Return rewards of the `own` tokens and log-probabilities of all tokens, both (B, width), from one forward."""
        width = own.shape[1]
        read = attended.clone()
        read[:, :-width] = False
        last = read & ~F.pad(read[:, 1:], (0, 1))
        last[:, -width:] &= own
        ends = torch.tensor(sorted(self.endo_reward.ends), device=input_ids.device)
        with evaluating(self.endo_reward.scorer), self.accelerator.autocast():
            found = self.endo_reward.scorer.rewards_of_padded(
                input_ids, read, last & torch.isin(input_ids, ends), alpha=self.endo_reward.options.alpha,
                attention_mask=attended,
            )  # fmt: skip
        # Cloned, because autograd cannot use inference tensors in the loss.
        reward, value, logprob, mask = (x[:, -width:].clone() for x in (found.reward, found.value, found.logprob, read))
        return Scored.checked(reward.cpu(), value.cpu(), (mask & own).cpu(), [None] * len(mask)), logprob

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        generated = self._generated
        if list(generated.completions) != list(completion_ids_list):
            raise EndoRewardError(
                f"TRL {version('trl')} asks for rewards of completions that it did not generate: install TRL 1.16, or "
                "use EndoReward as a plain reward function"
            )
        if self.shares_forward:
            scored = self._take_shared()
        else:
            steered = self.endo_reward.steered(prompts)
            ids = generated.prompts if steered is prompts else self._tokenize_prompts(steered)[0]
            scored = self.endo_reward.score(ids, generated.completions, generated.own)
        with self.endo_reward.given(scored):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored, self._rewards_per_func = scored, rewards
        return rewards

    def _take_shared(self) -> Scored:
        """Return the rewards that the reference model's forward computed, and forget them."""
        if not self._from_reference:
            raise EndoRewardError(
                f"TRL {version('trl')} asks for rewards before it runs the reference model: set beta above 0 with TRL "
                "1.16, or give EndoReward a model"
            )
        columns = list(zip(*self._from_reference, strict=True))
        self._from_reference = []
        scored = Scored(*(torch.cat(column) for column in columns[:3]), sum(columns[3], ()))
        # mask_truncated_completions hides completions from the forward. They count in the group's baseline, so a
        # second forward scores them.
        hidden = [i for i, on in enumerate(scored.mask.any(1).tolist()) if not on and scored.errors[i] is None]
        if not hidden:
            return scored
        asked = (None if column is None else [column[i] for i in hidden] for column in self._generated)
        return scored.with_rows(hidden, self.endo_reward.score(*asked))

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.token_level:
            output["advantages"] = self._token_advantages(output["completion_ids"].shape[1])
        return output

    def _token_advantages(self, width: int) -> Tensor:
        """Return (B, width) advantages of this process's completions. Groups may span processes."""
        scored, rewards = self._scored, self._rewards_per_func  # rewards are those of all processes
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


def _find_endo_reward(functions: Sequence[Any]) -> tuple[int, EndoReward]:
    """Return (index, function) of the one EndoReward. A CollapseMonitor may watch it."""
    inner = [getattr(function, "watched", function) for function in functions]
    found = [(i, f) for i, f in enumerate(inner) if isinstance(f, EndoReward)]
    if len(found) != 1:
        raise EndoRewardError(f"EndoGRPOMixin wants exactly one EndoReward in reward_funcs, found {len(found)}")
    return found[0]


EXPECTED = {
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep"],
    "_generate": ["prompts"],
    "_generate_and_score_completions": ["inputs"],
    "_tokenize_prompts": ["prompts"],
}


def _check_interface(trainer: type) -> None:
    """Raise EndoRewardError if the trainer's methods that the mixin overrides or calls differ from TRL 1.16's."""
    below = super(EndoGRPOMixin, trainer)  # type: ignore[misc]
    for name, wanted in EXPECTED.items():
        method = getattr(below, name, None)
        found = list(inspect.signature(method).parameters)[1 : len(wanted) + 1] if method else None
        if found != wanted:
            arguments = "is missing" if found is None else f"takes ({', '.join(found)})"
            raise EndoRewardError(
                f"TRL {version('trl')} has another GRPOTrainer than EndoGRPOMixin was written for (1.16): {name} "
                f"{arguments}; install TRL 1.16, or use EndoReward as a plain reward function"
            )


def _check_configuration(trainer: Any) -> None:
    """Raise EndoRewardError for a configuration in which these rewards are undefined."""
    args, reward = trainer.args, trainer.endo_reward
    if trainer.token_level and (reward.options.reduction != "sum" or reward.options.floor > 0):
        raise EndoRewardError(
            "token_level=True needs reduction='sum' and no floor, because rewards-to-go are sums: change them, or set "
            "token_level=False"
        )
    if trainer.token_level and args.multi_objective_aggregation != "sum_then_normalize":
        raise EndoRewardError(
            "token_level=True needs multi_objective_aggregation='sum_then_normalize': set it, or set token_level=False"
        )
    if not trainer.shares_forward:
        if getattr(reward.scorer, "model", None) is trainer.accelerator.unwrap_model(trainer.model):
            raise EndoRewardError(
                "EndoReward's model is the module being trained: give EndoReward a copy of it, or no model"
            )
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
            f"EndoReward's alpha={reward.options.alpha} is not the trainer's temperature={args.temperature}, and one "
            "pass gives rewards and reference log-probabilities at one temperature: make them equal, or give "
            "EndoReward a model"
        )
    if args.sync_ref_model:
        raise EndoRewardError(
            "sync_ref_model changes the reward model during training: turn it off, or give EndoReward a model"
        )
    if reward.system:
        raise EndoRewardError(
            "a system prompt that only the reward model reads needs a separate forward: give EndoReward a model"
        )
