"""The endogenous reward as a reward function of TRL's trainers (written against TRL 1.16).

    GRPOTrainer(model, reward_funcs=[EndoReward("Qwen/Qwen2.5-0.5B-Instruct")], ...)

`grpo.py` goes further: an advantage for each token, and one forward for reward and reference.
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

from ..chat import with_system
from ..errors import EndoRewardError
from ..model import EndoRewardModel
from ..returns import sequence_score
from ..scoring import ScoreOptions
from ..vocabulary import refuse_other_vocabulary
from .generated import NOT_FINITE, Ids, ending_ids, generated_row, score_completions, scorer_of

METRICS = "endo_reward"


class Scored(NamedTuple):
    """The tokens of B completions, padded on the right to the longest."""

    reward: Tensor
    """(B, C) float32, 0 off the mask"""
    value: Tensor
    """(B, C) V(s), 0 off the mask"""
    mask: Tensor
    """(B, C) bool; off throughout a completion that could not be scored"""
    errors: tuple[str | None, ...]
    """why not, one line each"""

    @classmethod
    def checked(cls, reward: Tensor, value: Tensor, mask: Tensor, errors: Sequence[str | None]) -> "Scored":
        """Without the completions whose rewards are not finite: one would make a whole group's mean NaN or -inf."""
        odd = ~(reward.isfinite() | ~mask).all(1)
        keep = mask & ~odd[:, None]
        errors = [NOT_FINITE if bad and not e else e for e, bad in zip(errors, odd.tolist(), strict=True)]
        return cls(torch.where(keep, reward, 0.0), torch.where(keep, value, 0.0), keep, tuple(errors))

    def with_rows(self, rows: Sequence[int], other: "Scored") -> "Scored":
        """Rows of `self` replaced by those of `other`, one for each."""
        width, place = max(self.mask.shape[1], other.mask.shape[1]), torch.tensor(rows)
        fields = [
            F.pad(mine, (0, width - mine.shape[1])).index_copy(0, place, F.pad(theirs, (0, width - theirs.shape[1])))
            for mine, theirs in zip(self[:3], other[:3], strict=True)
        ]
        errors = dict(enumerate(self.errors)) | dict(zip(rows, other.errors, strict=True))
        return Scored(*fields, tuple(errors.values()))


class EndoReward:
    """A reward function for `GRPOTrainer(reward_funcs=[...])`: the endogenous reward of each completion.

    model         the reward model: a name or folder, a loaded causal language model or an EndoRewardModel; it is never
                  trained, so give it the initial policy, not the module that the trainer trains. None: the trainer's
                  reference model (EndoGRPOMixin fills it in)
    tokenizer     the policy's. Default: the reward model's own
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    system        a system prompt that only the reward model sees: it steers the reward
    chat_template, chat_template_kwargs      what the trainer renders its prompts with (GRPOConfig.chat_template_kwargs)

    Completions are scored as the token ids that the policy sampled, after the prompt as the trainer tokenizes it. One
    that ends in an end-of-sequence token is whole; one that was cut off is bootstrapped with V(s'). A completion that
    cannot be scored (empty, beyond the model's positions, NaN, tool results in it) gets None, which TRL leaves out of
    the group; the reasons are counted in `unscored`. Logged: endo_reward/token (mean reward of a token),
    endo_reward/first_value (V of the prompt), endo_reward/length, endo_reward/unscored.

    Raises EndoRewardError: a tokenizer other than the reward model's, prompts that cannot be tokenized.
    """

    __name__ = METRICS  # TRL's name for the column

    def __init__(
        self, model: Any = None, tokenizer: Any = None, *, alpha: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum", gamma: float = 1.0, floor: float = 0.0, system: str | None = None,
        chat_template: str | None = None, chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        max_tokens_per_batch: int = 8192,
    ) -> None:  # fmt: skip
        self.options = ScoreOptions(
            alpha=alpha, reduction=reduction, gamma=gamma, floor=floor, max_tokens_per_batch=max_tokens_per_batch
        )
        self.system = system
        self.chat_template, self.chat_template_kwargs = chat_template, dict(chat_template_kwargs or {})
        self.tokenizer = tokenizer
        self.scorer: EndoRewardModel | None = None
        self.unscored: Counter[str] = Counter()
        self._given: Scored | None = None
        self._ids_are_known = False
        if model is not None:
            self.attach(scorer_of(model, tokenizer), tokenizer)

    def attach(self, scorer: EndoRewardModel, tokenizer: Any) -> None:
        """Use this reward model from now on, for a policy with this tokenizer."""
        refuse_other_vocabulary(scorer, tokenizer)
        self.scorer = scorer
        self.tokenizer = scorer.tokenizer if tokenizer is None else tokenizer
        self.ends = ending_ids(scorer, self.tokenizer)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Ids] | None = None,
        log_metric: Callable[[str, float], None] | None = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """One reward a completion, or None. `columns`, the dataset's own, play no part."""
        if completion_ids is None:
            raise EndoRewardError("this trainer gives its reward functions no completion_ids: TRL 1.16 or newer does")
        if self._given is None:
            self._refuse_foreign_ids(completions, completion_ids)
            scored = self.score(self.prompt_ids(prompts), completion_ids, completions)
        else:
            scored = self._given
        found = self.reduce(scored)
        self._count(scored, log_metric)
        return [None if error else r for r, error in zip(found.tolist(), scored.errors, strict=True)]

    def _refuse_foreign_ids(self, completions: Sequence[Any], completion_ids: Sequence[Ids]) -> None:
        """EndoRewardError if most completions' ids do not spell their texts: TRL gives both, and no tokenizer."""
        if self.scorer is None or self.tokenizer is None or self._ids_are_known:
            return
        texts = [c if isinstance(c, str) else c[0].get("content") if len(c) == 1 else None for c in completions]
        pairs = [(t.strip(), ids) for t, ids in zip(texts, completion_ids, strict=True) if isinstance(t, str)]
        pairs = [(text, list(ids)) for text, ids in pairs if text and len(ids)]
        if not pairs:
            return
        try:
            read = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in pairs]
        except (OverflowError, TypeError, ValueError, IndexError):  # ids beyond its vocabulary
            read = [""] * len(pairs)
        spelt = sum(text in found for (text, _), found in zip(pairs, read, strict=True))
        if 2 * spelt < len(pairs):  # some may be cut within a character, or be parsed
            raise EndoRewardError(
                f"the policy's tokens are not the reward model's: {pairs[0][0][:40]!r} was generated, but its ids "
                f"spell {read[0][:40]!r} to {getattr(self.tokenizer, 'name_or_path', '')!r}; take a reward model of "
                "the same tokenizer, and give EndoReward the policy's: EndoReward(model, tokenizer)"
            )
        self._ids_are_known = True

    def score(self, prompts: Sequence[Ids], completions: Sequence[Ids], texts: Sequence[Any] = ()) -> Scored:
        """Token rewards of sampled completions after tokenized prompts, in a forward of the reward model's own."""
        if self.scorer is None:
            raise EndoRewardError(
                "EndoReward() has no model: give it one, or train with EndoGRPOMixin and beta above 0, whose "
                "reference model it then reads"
            )
        options = {"alpha": self.options.alpha, "max_tokens_per_batch": self.options.max_tokens_per_batch}
        asked = [generated_row(p, c, self.ends) for p, c in zip(prompts, completions, strict=True)]
        rows = score_completions(self.scorer, asked, per_token=True, texts=False, **options)
        errors = [row.error for row in rows]
        for i, messages in enumerate(texts):
            if not isinstance(messages, str) and any(m.get("role") == "tool" for m in messages):
                errors[i] = "tool results are among the completion's tokens, and the policy did not choose those"
        tables = [None if error else row.tokens for row, error in zip(rows, errors, strict=True)]
        width = max((len(table.ids) for table in tables if table), default=0)

        def padded(name: str) -> Tensor:
            lists = [getattr(table, name) if table else () for table in tables]
            return torch.tensor([[*values, *[0.0] * (width - len(values))] for values in lists]).view(len(rows), width)

        lengths = torch.tensor([[len(table.ids) if table else 0] for table in tables])
        return Scored.checked(padded("rewards"), padded("values"), torch.arange(width) < lengths, errors)

    def reduce(self, scored: Scored) -> Tensor:
        """(B,) scores, by the reduction asked for; 0 where there is none."""
        o = self.options
        return sequence_score(scored.reward, scored.mask, reduction=o.reduction, gamma=o.gamma, floor=o.floor)

    def prompt_ids(self, prompts: Sequence[Any]) -> list[Ids]:
        """Prompts as the trainer tokenizes them: text with special tokens in front, messages by the chat template."""
        if self.tokenizer is None:
            raise EndoRewardError("prompts need a tokenizer: EndoReward(model, tokenizer)")
        if all(isinstance(p, str) for p in prompts):
            texts = [f"{self.system}\n\n{p}" for p in prompts] if self.system else list(prompts)
            ids: list[Ids] = self.tokenizer(text=texts)["input_ids"]
            return ids
        try:
            ids = self.tokenizer.apply_chat_template(
                conversation=[with_system(p, self.system) for p in prompts], chat_template=self.chat_template,
                add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs,
            )["input_ids"]  # fmt: skip
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EndoRewardError(f"the prompts cannot go through the chat template: {reason}") from error
        return ids

    @contextmanager
    def given(self, scored: Scored) -> Iterator[None]:
        """Inside, a call answers from these token rewards instead of running the model."""
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
            log_metric(f"{METRICS}/first_value", scored.value[rows, 0].mean().item())
            log_metric(f"{METRICS}/length", scored.mask[rows].sum(1).float().mean().item())
