"""The endogenous reward in verl (written against verl 0.9.1): a reward manager, and a scalar `compute_score`.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=EndoRewardManager
    reward.reward_manager.module.path=pkg://endoreward_fast.integrations.verl
    +reward.reward_kwargs.endo_reward.gamma=0.95        # any option of EndoRewardManager, and `model`

This module does not import verl, which passes everything needed as arguments and requires no base class.
"""

import asyncio
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import EndoRewardError
from ..scoring.sampled import UNSCORED, Own, Rewarded, generated_row
from .batched import BatchedReward

OPTIONS = ("model", "alpha", "reduction", "gamma", "floor", "max_tokens_per_batch", "unscored")
NEEDED = ("prompts", "responses", "attention_mask")
LOADING = threading.Lock()  # verl calls compute_score from a thread pool; without a lock each thread loads a model
ONE_ANSWER = 2  # turns: the prompt and the response
OTHERS_TOKENS = "other turns (tool results, say) are among the response's tokens, and no response_mask tells them apart"
NO_TOKENS = "response_mask leaves no token of the response that the policy chose"


class TokenScore(float):
    """A score with its token rewards: verl needs a number, and `assemble_rm_scores` the reward of each token."""

    tokens: tuple[float, ...] = ()
    """reward of each token of the response; 0 for tokens that the policy did not choose"""

    @classmethod
    def of(cls, rewarded: Rewarded, own: Own) -> "TokenScore":
        score, parts = cls(rewarded.score), iter(rewarded.tokens)
        score.tokens = tuple(next(parts) if chosen else 0.0 for chosen in own) if rewarded.tokens else ()
        return score


class EndoRewardManager:
    """verl's reward manager for endogenous rewards. It scores responses as the token ids that the policy sampled.

    Options, under `reward.reward_kwargs.endo_reward` of verl's configuration:
    model         default: `actor_rollout_ref.model.path`, the initial policy. Each reward worker loads a copy.
                  Or the URL of a server ("http://HOST:PORT")
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    unscored      the reward of a response that cannot be scored. Default: -1e6, which is never the best (BatchedReward)

    Tokens with a 0 in `response_mask` (a tool's answer, for example) are context. The policy's tokens are scored, each
    after all tokens before it. The last token of a turn that a tool answered does not end the episode: it keeps V(s'),
    where s' is the state before the answer. A response of several turns without a response_mask is unscored.

    A response that ends in an end-of-sequence token is complete; any other is bootstrapped with V(s').

    Where verl assembles scores itself, each token of a response gets its part of the score. verl does so with a
    colocated reward model; set `reward.custom_reward_function.path` too, else verl asks that model and not this class.
    Where verl streams rewards from the rollout, it asks for one number, and the last token gets the sum.

    Logs for each response: endo_reward/token (mean reward of a token), endo_reward/first_value (V of the prompt),
    endo_reward/length and endo_reward/unscored.

    Raises EndoRewardError: an unknown option, a tokenizer other than the reward model's, a verl version that passes
    other fields.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        given = dict((config.reward.get("reward_kwargs") or {}).get("endo_reward") or {})
        unknown = sorted(set(given) - set(OPTIONS))
        if unknown:
            raise EndoRewardError(
                f"reward.reward_kwargs.endo_reward.{unknown[0]}: expected one of {', '.join(OPTIONS)}"
            )
        model = given.pop("model", None) or config.actor_rollout_ref.model.path
        self.reward = BatchedReward(model, tokenizer, **given)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Return {"reward_score": TokenScore, "reward_extra_info": metrics} for a DataProto's last response."""
        missing = [name for name in NEEDED if name not in data.batch.keys()]  # noqa: SIM118
        if missing:
            raise EndoRewardError(
                f"this verl gives its reward managers no {', '.join(missing)}: install verl 0.9 or newer"
            )
        last = data[-1:]
        prompt, response, own = _ids(last)
        if own is None and any(turns > ONE_ANSWER for turns in last.non_tensor_batch.get("__num_turns__", ())):
            rewarded = self.reward.without(OTHERS_TOKENS)
        elif own is not None and response and not any(own):
            rewarded = self.reward.without(NO_TOKENS)
        else:
            asked = self.reward.submit(generated_row(prompt, response, self.reward.ends, own))
            rewarded = await asyncio.wrap_future(asked)
        score = TokenScore.of(rewarded, own or [1] * len(response))
        return {"reward_score": score, "reward_extra_info": _metrics(rewarded)}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Tensor:
        """Return (B, T) float32 token scores: 0 in the padding and on tokens that the policy did not choose.

        A score without token rewards goes to the policy's last token.
        """
        found = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        real = _response_mask(data)
        own = real & data.batch["response_mask"].bool() if "response_mask" in data.batch.keys() else real  # noqa: SIM118
        for row, score in enumerate(scores):
            places, chosen = (mask[row].nonzero()[:, 0] for mask in (real, own))
            if isinstance(score, TokenScore) and score.tokens:
                if len(score.tokens) != len(places):
                    raise EndoRewardError(
                        f"response {row} has {len(places)} tokens, and its score {len(score.tokens)}: verl assembles "
                        "scores for other responses than it asked for"
                    )
                found[row, places] = torch.tensor(score.tokens)
            elif len(chosen):
                found[row, chosen[-1]] = float(score)
        return found

    def __call__(self, *_: Any, **__: Any) -> None:
        raise EndoRewardError("this verl calls its reward manager as a function: install verl 0.9 or newer")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, *,
    model: str, alpha: float = 1.0, reduction: str = "sum", gamma: float = 1.0, floor: float = 0.0,
    unscored: float = UNSCORED, **_: Any,
) -> dict[str, float]:  # fmt: skip
    """Score a response's text: a `reward.custom_reward_function` for verl's own reward managers.

    verl passes neither token ids nor a prompt. The dataset must hold the prompt, as text or messages, in
    `extra_info["prompt"]`. The response is tokenized again and taken as complete. EndoRewardManager avoids both.
    `model` (a name or folder) and the options come from `reward.custom_reward_function.reward_kwargs`; data_source and
    ground_truth are ignored. A response that cannot be scored gets `unscored`, and endo_reward/unscored is 1.

    Returns {"score": the endogenous reward, ...metrics}. Raises EndoRewardError if there is no prompt.
    """
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise EndoRewardError(
            "extra_info has no 'prompt', and verl passes it to compute_score in no other way: add it to the dataset's "
            "extra_info, or use EndoRewardManager"
        )
    row = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "completion": solution_str}
    with LOADING:
        reward = _reward(model, alpha, reduction, gamma, floor, unscored)
    rewarded = reward.submit(row).result()
    return {"score": rewarded.score} | _metrics(rewarded)


@cache  # verl calls a plain function once for each response, so the model is kept here
def _reward(
    model: str, alpha: float, reduction: Literal["sum", "mean"], gamma: float, floor: float, unscored: float
) -> BatchedReward:  # fmt: skip
    return BatchedReward(model, alpha=alpha, reduction=reduction, gamma=gamma, floor=floor, unscored=unscored)


def _metrics(rewarded: Rewarded) -> dict[str, float]:
    return {f"endo_reward/{name}": value for name, value in rewarded.metrics().items()}


def _response_mask(data: Any) -> Tensor:
    """Return the (B, T) bool mask of a DataProto's responses without their padding."""
    return data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].bool()


def _ids(data: Any) -> tuple[list[int], list[int], list[int] | None]:
    """Return (prompt ids, response ids, mask of the policy's tokens) of a DataProto with one row, without padding.

    The attention mask marks the padding. If a turn has several outputs, verl pads prompt and response together and
    passes their lengths. The mask of the policy's tokens is None if verl passes no response_mask.
    """
    prompt, response, others = data.batch["prompts"][0], data.batch["responses"][0], data.non_tensor_batch
    own = data.batch["response_mask"][0].long() if "response_mask" in data.batch.keys() else None  # noqa: SIM118
    if "prompt_len" in others and "response_len" in others:
        prompt, kept = prompt[: int(others["prompt_len"][0])], slice(0, int(others["response_len"][0]))
    else:
        mask = data.batch["attention_mask"][0].bool()
        prompt, kept = prompt[mask[: len(prompt)]], mask[len(prompt) :]
    return prompt.tolist(), response[kept].tolist(), None if own is None else own[kept].tolist()
