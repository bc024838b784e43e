"""The endogenous reward in slime (written against slime 0.3.1), as functions that its options name.

    --custom-rm-path endoreward_fast.integrations.slime.custom_rm
    --custom-config-path endo.yaml      # endo_reward: {model: Qwen/Qwen2.5-0.5B-Instruct, alpha: 1.0}

One advantage for every token:

    --custom-reward-post-process-path endoreward_fast.integrations.slime.post_process_rewards
    --custom-advantage-function-path endoreward_fast.integrations.slime.advantages

This module imports slime only if the trainer splits sequences over GPUs (context parallelism).
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import EndoRewardError
from ..scoring.sampled import Rewarded, generated_row
from .batched import BatchedReward
from .token_level import group_advantages, mean_of, spread

KEY = "endo_reward"
OPTIONS = ("model", "alpha", "reduction", "gamma", "floor", "max_tokens_per_batch", "unscored", "scale")
SCALES = ("group", "none")
ABORTED = "aborted"
LOADING = threading.Lock()  # slime asks for many samples at once; without a lock, each request loads a model


async def custom_rm(args: Any, samples: Any, **_: Any) -> Any:
    """Return the reward of a Sample, or of each Sample in a list: for `--custom-rm-path`, with `--group-rm` or without.

    A sample's last `response_length` tokens are scored after its other ones. Tokens with a 0 in `loss_mask` (a tool's
    answer, an older policy's part of a partial rollout) are context and have no reward. A response that ends in an
    end-of-sequence token is complete; any other is bootstrapped with V(s').

    The options are in `args.endo_reward`, which slime reads from the YAML file of `--custom-config-path`:
    model      default: `--hf-checkpoint`, the initial policy. Or the URL of a server ("http://HOST:PORT")
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    unscored   the reward of a response that cannot be scored. Default: -1e6, which is never the best (BatchedReward)
    scale      of `post_process_rewards`: "group" (default) or "none" (`token_advantages`)

    slime asks this function in evaluation too, unless the data set of `--eval-config` names its own `custom_rm_path`.

    A sample that is empty, too long, not finite or has images is unscored. An aborted sample gets None, as slime leaves
    it: its response goes on later. With `--reward-key`, a reward is a dictionary with that key.

    `sample.metadata["endo_reward"]` holds "rewards" (of each token of the response), "token", "first_value", "length",
    "unscored" and "error".

    Raises EndoRewardError: an unknown option, or one outside of its range.
    """
    reward = await asyncio.to_thread(_loaded, args)
    if not isinstance(samples, Sequence):
        return await _rewarded(args, reward, samples)
    return list(await asyncio.gather(*(_rewarded(args, reward, sample) for sample in samples)))


def post_process_rewards(args: Any, samples: Sequence[Any], **_: Any) -> tuple[list[Any], list[Tensor]]:
    """Return (scores, advantages of each response's tokens): for `--custom-reward-post-process-path`.

    The advantages are `token_advantages` within each `group_index`: (response_length,) float32 each, 0 on tokens that
    the policy did not choose. slime sends them to the trainers in place of one reward for each sample, and `advantages`
    takes them there. A sample without a reward is no part of its group's mean, and its advantages are 0.

    Raises EndoRewardError: samples that `custom_rm` has not scored, samples without a group_index, no
    `--custom-advantage-function-path`.
    """
    if getattr(args, "custom_advantage_function_path", None) is None:
        raise EndoRewardError(
            f"slime's own estimators take one reward for each sample: set --custom-advantage-function-path "
            f"{__name__}.advantages"
        )
    unknown = next((sample for sample in samples if KEY not in (sample.metadata or {})), None)
    if unknown is not None:
        raise EndoRewardError(
            f"sample {unknown.index} has no endogenous reward: set --custom-rm-path {__name__}.custom_rm"
        )
    alone = next((sample for sample in samples if sample.group_index is None), None)
    if alone is not None:
        raise EndoRewardError(
            f"sample {alone.index} has no group_index, so the other samples of its prompt are unknown: let the data "
            "source set it"
        )
    options = _options(args)
    places: dict[Any, list[int]] = {}
    for row, sample in enumerate(samples):
        places.setdefault(sample.group_index, []).append(row)
    found: dict[int, Tensor] = {}
    for rows in places.values():
        masks = [samples[row].loss_mask or [1] * samples[row].response_length for row in rows]
        mine = [_chosen(samples[row].metadata[KEY], mask) for row, mask in zip(rows, masks, strict=True)]
        computed = group_advantages(
            mine, [sum(map(bool, mask)) for mask in masks], gamma=options.get("gamma", 1.0),
            scale=options.get("scale", "group"),
        )  # fmt: skip
        for row, values, mask in zip(rows, computed, masks, strict=True):
            found[row] = torch.tensor(spread(values, mask))
    return [sample.get_reward_value(args) for sample in samples], [found[row] for row in range(len(samples))]


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Set `rollout_data["advantages"]` and ["returns"] to the rewards' tokens: for `--custom-advantage-function-path`.

    With context parallelism, each process takes its part of a sequence, by slime's own rule.
    """
    found = []
    fields = ("rewards", "kl", "total_lengths", "response_lengths")
    for values, like, total, length in zip(*(rollout_data[name] for name in fields), strict=True):
        if not isinstance(values, Tensor):
            raise EndoRewardError(
                f"these rewards are numbers, one for each sample: set --custom-reward-post-process-path "
                f"{__name__}.post_process_rewards"
            )
        if len(like) != len(values):
            from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp

            values = slice_log_prob_with_cp(values, total, length)
            if len(like) != len(values):
                raise EndoRewardError(
                    f"{len(values)} advantages for {len(like)} log-probabilities of a response of {length} tokens: "
                    "this slime splits sequences in another way, so install slime 0.3.1"
                )
        found.append(values.to(like.device))
    rollout_data["advantages"], rollout_data["returns"] = found, list(found)


def log_rollout(rollout_id: int, args: Any, samples: Sequence[Any], metrics: dict[str, Any] | None, *_: Any) -> bool:
    """Add the rewards' metrics to a rollout's: for `--custom-rollout-log-function-path`.

    They are endo_reward/token (mean reward of a token), endo_reward/first_value (V of the prompt), endo_reward/length
    and endo_reward/unscored (a number of samples). Returns False: slime then logs as it does without this function. A
    rollout function without metrics (None) leaves no place for them.
    """
    kept = [sample.metadata[KEY] for sample in samples if KEY in (sample.metadata or {})]
    if metrics is not None and kept:
        metrics.update(mean_of(kept))
    return False


async def _rewarded(args: Any, reward: BatchedReward, sample: Any) -> Any:
    """Return a sample's reward, and keep its tokens' rewards in its metadata."""
    if getattr(sample.status, "value", sample.status) == ABORTED:
        return None
    ids, length = [int(i) for i in sample.tokens], int(sample.response_length)
    prompt, response = ids[: len(ids) - length], ids[len(ids) - length :]
    own = [1] * length if sample.loss_mask is None else [int(chosen) for chosen in sample.loss_mask]
    if sample.multimodal_inputs:
        found = reward.without("it has images, and one pass reads token ids")
    elif len(own) != length:
        found = reward.without(f"its loss mask has {len(own)} entries for {length} tokens")
    else:
        found = await asyncio.wrap_future(reward.submit(generated_row(prompt, response, reward.ends, own)))
    sample.metadata = (sample.metadata or {}) | {KEY: _kept(found, own)}
    return {args.reward_key: found.score} if getattr(args, "reward_key", None) else found.score


def _kept(found: Rewarded, own: Sequence[int]) -> dict[str, Any]:
    rewards = [0.0] * len(own) if found.error else spread(found.rewards, own)
    return {"rewards": rewards, "error": found.error} | found.metrics()


def _chosen(kept: dict[str, Any], mask: Sequence[int]) -> list[float] | None:
    """Return the rewards of the tokens that the policy chose; None for a sample without a reward."""
    return None if kept["error"] else [r for r, own in zip(kept["rewards"], mask, strict=True) if own]


def _options(args: Any) -> dict[str, Any]:
    given = getattr(args, KEY, None) or {}
    if not isinstance(given, Mapping):
        raise EndoRewardError(
            f"endo_reward is a {type(given).__name__}: expected options, as in endo_reward: {{model: NAME}}"
        )
    options = dict(given)
    unknown = next((name for name in options if name not in OPTIONS), None)
    if unknown is not None:
        raise EndoRewardError(f"endo_reward.{unknown}: expected one of {', '.join(OPTIONS)}")
    if not isinstance(options.get("model", ""), str):
        raise EndoRewardError(f"endo_reward.model is a {type(options['model']).__name__}: expected a name or folder")
    if options.get("scale", "group") not in SCALES:
        raise EndoRewardError(f"endo_reward.scale={options['scale']!r}: expected one of {', '.join(SCALES)}")
    return options


def _loaded(args: Any) -> BatchedReward:
    options = _options(args)
    options.pop("scale", None)
    options.setdefault("model", args.hf_checkpoint)
    with LOADING:
        return _reward(tuple(sorted(options.items())))


@cache  # slime calls a plain function for each sample, so the model is kept here
def _reward(options: tuple[tuple[str, Any], ...]) -> BatchedReward:
    return BatchedReward(**dict(options))
