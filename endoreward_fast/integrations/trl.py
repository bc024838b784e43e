"""The endogenous reward as a reward function of TRL's trainers (written against TRL 1.16).

    GRPOTrainer(model, reward_funcs=[EndoReward("Qwen/Qwen2.5-0.5B-Instruct")], ...)

`grpo.py` adds token-level advantages, and one forward that gives both rewards and reference log-probabilities.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EndoRewardError
from ..returns import sequence_score
from ..scoring.options import ScoreOptions
from ..scoring.sampled import NOT_FINITE, Ids, Own, ending_ids, generated_row
from ..text.chat import with_system
from .generated import RewardScorer, refuse_other_tokenizer, score_completions, scorer_of
from .prompts import Rendering, answered_by_tools

METRICS = "endo_reward"
WHAT_TO_GIVE = (
    "give EndoReward what the trainer has (tools, chat_template, chat_template_kwargs), or train with EndoGRPOMixin, "
    "which reads the trainer's prompts"
)
UNKNOWN = "tool results are among the completion's tokens, and nothing says which tokens they are"


class Scored(NamedTuple):
    """Token rewards of B completions, padded on the right to the longest."""

    reward: Tensor
    """(B, C) float32, 0 off the mask"""
    value: Tensor
    """(B, C) V(s), 0 off the mask"""
    mask: Tensor
    """(B, C) bool; all False for a completion that could not be scored"""
    errors: tuple[str | None, ...]
    """the reason for each missing score, in one line"""

    @classmethod
    def checked(cls, reward: Tensor, value: Tensor, mask: Tensor, errors: Sequence[str | None]) -> "Scored":
        """Mask out completions with rewards that are not finite: one would make its group's mean NaN or -inf."""
        odd = ~(reward.isfinite() | ~mask).all(1)
        keep = mask & ~odd[:, None]
        errors = [NOT_FINITE if bad and not e else e for e, bad in zip(errors, odd.tolist(), strict=True)]
        return cls(torch.where(keep, reward, 0.0), torch.where(keep, value, 0.0), keep, tuple(errors))

    def with_rows(self, rows: Sequence[int], other: "Scored") -> "Scored":
        """Return a copy in which the rows of `other` replace `rows`."""
        width, place = max(self.mask.shape[1], other.mask.shape[1]), torch.tensor(rows)
        fields = [
            F.pad(mine, (0, width - mine.shape[1])).index_copy(0, place, F.pad(theirs, (0, width - theirs.shape[1])))
            for mine, theirs in zip(self[:3], other[:3], strict=True)
        ]
        errors = dict(enumerate(self.errors)) | dict(zip(rows, other.errors, strict=True))
        return Scored(*fields, tuple(errors.values()))


class EndoReward:
    """A reward function for `GRPOTrainer(reward_funcs=[...])`: returns the endogenous reward of each completion.

    model         the frozen reward model: a name or folder, a loaded causal language model, or an EndoRewardModel. Use
                  the initial policy, not the module being trained. None: EndoGRPOMixin supplies the trainer's reference
                  model. Or the URL of a server ("http://HOST:PORT"), or a RemoteModel
    tokenizer     the policy's tokenizer. Default: the reward model's. A server's model needs it here
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    system        a system prompt that only the reward model reads; it steers the reward
    tools         the tools given to GRPOTrainer(tools=[...]), which are part of the prompt. Tools of environments are
                  found without it
    chat_template, chat_template_kwargs      as the trainer renders its prompts (GRPOConfig.chat_template_kwargs)

    Completions are scored as the token ids that the policy sampled, after the prompt as the trainer tokenizes it. A
    completion that ends in an end-of-sequence token is complete; any other is bootstrapped with V(s'). Answers of tools
    are context: only the policy's tokens are scored. A completion that cannot be scored (empty, longer than the model's
    positions, NaN) gets None, which TRL leaves out of the group. `unscored` counts the reasons.

    Logs endo_reward/token (mean reward of a token), endo_reward/first_value (V of the prompt), endo_reward/length and
    endo_reward/unscored.

    TRL passes the messages of its prompts, not their ids, so the prompts are rendered again. At every training step,
    their number of tokens must agree with the trainer's count (num_input_tokens_seen of its state).

    Raises EndoRewardError: a tokenizer other than the reward model's, prompts that cannot be tokenized, or prompts that
    differ from the trainer's.
    """

    __name__ = METRICS  # TRL names the column after it

    def __init__(
        self, model: Any = None, tokenizer: Any = None, *, alpha: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum", gamma: float = 1.0, floor: float = 0.0, system: str | None = None,
        chat_template: str | None = None, chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        max_tokens_per_batch: int | None = None, tools: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        self.options = ScoreOptions(
            alpha=alpha, reduction=reduction, gamma=gamma, floor=floor, max_tokens_per_batch=max_tokens_per_batch
        )
        self.system = system
        self.rendering = Rendering(chat_template, dict(chat_template_kwargs or {}), tuple(tools or ()))
        self.tokenizer = tokenizer
        self.scorer: RewardScorer | None = None
        self.unscored: Counter[str] = Counter()
        self._given: Scored | None = None
        self._ids_are_known = False
        self._counted: tuple[Any, int] | None = None
        if model is not None:
            self.attach(scorer_of(model, tokenizer, max_tokens_per_batch=max_tokens_per_batch), tokenizer)

    def attach(self, scorer: RewardScorer, tokenizer: Any) -> None:
        """Set the reward model and the policy's tokenizer."""
        refuse_other_tokenizer(scorer, tokenizer)
        self.scorer = scorer
        self.tokenizer = scorer.tokenizer if tokenizer is None else tokenizer
        self.ends = ending_ids(scorer, self.tokenizer)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Ids] | None = None,
        log_metric: Callable[[str, float], None] | None = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """Return one reward for each completion, or None.

        These `columns` are read: `environments`; `completion_mask`, 0 for tokens that the policy did not choose;
        `trainer_state`, whose token count must agree; and, unless a trainer calls, `tools` and `chat_template_kwargs`
        (TRL 1.16 does not use a data set's in the policy's prompts).
        """
        if completion_ids is None:
            raise EndoRewardError(
                "this trainer gives its reward functions no completion_ids: install TRL 1.16 or newer"
            )
        if self._given is None:
            self._refuse_foreign_ids(completions, completion_ids)
            own = self._own_tokens(completions, completion_ids, columns)
            ids = self.prompt_ids(prompts, **columns)
            self._check_count(prompts, ids, completion_ids, own, columns)
            scored = self.score(ids, completion_ids, own)
        else:
            scored = self._given
        found = self.reduce(scored)
        self._count(scored, log_metric)
        return [None if error else r for r, error in zip(found.tolist(), scored.errors, strict=True)]

    def _refuse_foreign_ids(self, completions: Sequence[Any], completion_ids: Sequence[Ids]) -> None:
        """Raise EndoRewardError if most ids do not decode to their texts. TRL does not pass the policy's tokenizer."""
        if self.scorer is None or self.tokenizer is None or self._ids_are_known:
            return
        texts = [c if isinstance(c, str) else c[0].get("content") if len(c) == 1 else None for c in completions]
        pairs = [(t.strip(), ids) for t, ids in zip(texts, completion_ids, strict=True) if isinstance(t, str)]
        pairs = [(text, list(ids)) for text, ids in pairs if text and len(ids)]
        if not pairs:
            return
        try:
            read = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in pairs]
        except (OverflowError, TypeError, ValueError, IndexError):  # ids outside the vocabulary
            read = [""] * len(pairs)
        spelt = sum(text in found for (text, _), found in zip(pairs, read, strict=True))
        if 2 * spelt < len(pairs):  # a few may differ: cut inside a character, or parsed by TRL
            raise EndoRewardError(
                f"the policy's tokens are not the reward model's: {pairs[0][0][:40]!r} was generated, but its ids "
                f"decode to {read[0][:40]!r} with {getattr(self.tokenizer, 'name_or_path', '')!r}; use a reward model "
                "with the policy's tokenizer, and pass that tokenizer: EndoReward(model, tokenizer)"
            )
        self._ids_are_known = True

    def _own_tokens(
        self, completions: Sequence[Any], completion_ids: Sequence[Ids], columns: Mapping[str, Any]
    ) -> list[Own | None]:
        """Mark the policy's tokens of each completion. () for a completion where they are unknown."""
        if columns.get("completion_mask") is not None:
            return list(columns["completion_mask"])
        answered = [answered_by_tools(completion) for completion in completions]
        if not any(answered):
            return [[1] * len(ids) for ids in completion_ids]
        known = self.rendering.tools or any(columns.get(name) for name in ("tools", "environments"))
        if not known and columns.get("trainer_state") is not None:
            raise EndoRewardError(
                f"the completions contain answers of tools, and EndoReward has no tools: {WHAT_TO_GIVE}"
            )
        rendering = self._rendering(columns)
        return [
            ((rendering.own_tokens(self.tokenizer, turns, ids) or ()) if known else ()) if asked else [1] * len(ids)
            for asked, turns, ids in zip(answered, completions, completion_ids, strict=True)
        ]

    def _check_count(
        self, prompts: Sequence[Any], ids: Sequence[Ids], completion_ids: Sequence[Ids], own: Sequence[Own],
        columns: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Raise EndoRewardError if the trainer's token count of this batch differs: then its prompts differ too."""
        state = columns.get("trainer_state")
        seen = getattr(state, "num_input_tokens_seen", None)
        if seen is None:
            return
        first = 0 if state.global_step == 0 else seen  # a resumed training starts with the count of earlier steps
        before = self._counted[1] if self._counted is not None and self._counted[0] is state else first
        self._counted = state, seen
        if seen == before:  # TRL does not count during evaluation
            return
        from accelerate import PartialState
        from accelerate.utils import gather

        if self.system:
            ids = self._rendering(columns).prompt_ids(self.tokenizer, prompts, _of_trainer(columns))
        unknown = sum(not mask and len(tokens) > 0 for mask, tokens in zip(own, completion_ids, strict=True))
        counts = torch.tensor([[sum(map(len, ids)) + sum(map(sum, own)), unknown]], device=PartialState().device)
        counted, unknown = gather(counts).sum(0).tolist()
        if not unknown and counted != seen - before:
            raise EndoRewardError(
                f"the trainer counted {seen - before} tokens in this batch, and EndoReward reads {counted}: "
                f"{WHAT_TO_GIVE}"
            )

    def score(self, prompts: Sequence[Ids], completions: Sequence[Ids], own: Sequence[Own] | None = None) -> Scored:
        """Compute token rewards of sampled completions after tokenized prompts, with the reward model's forward.

        `own` marks the tokens that the policy chose in each completion; () if they are unknown.
        """
        if self.scorer is None:
            raise EndoRewardError(
                "EndoReward() has no model: give it one, or train with EndoGRPOMixin and beta above 0 to use the "
                "trainer's reference model"
            )
        options = {"alpha": self.options.alpha, "max_tokens_per_batch": self.options.max_tokens_per_batch}
        masks = [[1] * len(c) for c in completions] if own is None else own
        asked = [generated_row(p, c, self.ends, m or None) for p, c, m in zip(prompts, completions, masks, strict=True)]
        rows = score_completions(self.scorer, asked, per_token=True, texts=False, **options)
        unknown = [len(c) > 0 and not len(m) for c, m in zip(completions, masks, strict=True)]
        errors = [UNKNOWN if odd else row.error for row, odd in zip(rows, unknown, strict=True)]
        shape = len(rows), max(map(len, completions), default=0)
        reward, value, mask = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for i, (row, error, chosen) in enumerate(zip(rows, errors, masks, strict=True)):
            if error is None and row.tokens is not None:
                mask[i, : len(chosen)] = torch.tensor(chosen, dtype=torch.bool)
                reward[i, mask[i]] = torch.tensor(row.tokens.rewards)
                value[i, mask[i]] = torch.tensor(row.tokens.values)
        return Scored.checked(reward, value, mask, errors)

    def reduce(self, scored: Scored) -> Tensor:
        """Return (B,) scores by the given reduction; 0 for an unscored completion."""
        o = self.options
        return sequence_score(scored.reward, scored.mask, reduction=o.reduction, gamma=o.gamma, floor=o.floor)

    def prompt_ids(self, prompts: Sequence[Any], **columns: Any) -> list[Ids]:
        """Tokenize prompts as the trainer does, after the system prompt `system`. `columns` as in a call."""
        rendering = self._rendering(columns)
        return rendering.prompt_ids(self.tokenizer, self.steered(prompts), _of_trainer(columns))

    def steered(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """Put the system prompt that only the reward model reads before each prompt."""
        if not self.system:
            return prompts
        return [f"{self.system}\n\n{p}" if isinstance(p, str) else with_system(p, self.system) for p in prompts]

    def _rendering(self, columns: Mapping[str, Any]) -> Rendering:
        tools = self.rendering.tools or columns.get("environments")
        by_trainer = tools and columns.get("trainer_state") is not None
        return self.rendering.with_trainers_template(self.tokenizer) if by_trainer else self.rendering

    @contextmanager
    def given(self, scored: Scored) -> Iterator[None]:
        """Within this context, calls use these token rewards instead of running the model."""
        self._given = scored
        try:
            yield
        finally:
            self._given = None

    def _count(self, scored: Scored, log_metric: Callable[[str, float], None] | None) -> None:
        reasons = [error for error in scored.errors if error]
        for reason in set(reasons) - set(self.unscored):
            warnings.warn(f"EndoReward gives a completion no reward: {reason}", stacklevel=3)
        self.unscored.update(reasons)
        if log_metric is None:
            return
        log_metric(f"{METRICS}/unscored", float(len(reasons)))
        if scored.mask.any():
            rows = scored.mask.any(1)
            log_metric(f"{METRICS}/token", scored.reward[scored.mask].mean().item())
            first = scored.mask[rows].int().argmax(1, keepdim=True)
            log_metric(f"{METRICS}/first_value", scored.value[rows].gather(1, first).mean().item())
            log_metric(f"{METRICS}/length", scored.mask[rows].sum(1).float().mean().item())


def _of_trainer(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Select the columns that are part of the policy's prompts."""
    names = (
        ("environments",)
        if columns.get("trainer_state") is not None
        else ("environments", "tools", "chat_template_kwargs")
    )
    return {name: columns[name] for name in names if columns.get(name) is not None}
