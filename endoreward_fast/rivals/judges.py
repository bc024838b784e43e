"""Judges: ask a language model to verify an answer, to rate it, or to compare it with another.

A judge has the methods of EndoRewardModel (`iter_scores(rows, **options)`, `score`), so `endoreward eval` accepts both.
It rewrites each row as questions about the answer, and an EndoRewardModel gives the log-probabilities of the replies
under pi = softmax(z / alpha). If the replies are one token each, the model reads the question alone, once for all.
The score of the row is computed from these. Of the options, alpha and those that say how text is encoded and batched
have an effect. Instructions are `str.format` templates, which a caller may replace.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Unpack

from ..errors import EndoRewardError
from ..scoring.arguments import ScoreKwargs, list_of_rows
from ..scoring.options import ScoreOptions
from ..scoring.results import OnTokens, RowScore, Scores, in_order
from ..scoring.score import encoder_for
from ..text.boundary import tokenize
from ..text.row_flags import NOTHING_TO_SCORE
from ..text.rows import Row, prompt_and_completion

if TYPE_CHECKING:
    from ..model.model import EndoRewardModel
from .questions import Questions, plain_text, question_and_answer

VERIFIER = """{question}

Proposed answer: {answer}

Is the proposed answer correct? Reply with Yes or No."""


POINTWISE = """{question}

Answer: {answer}

How good is this answer, from 1 (bad) to 5 (excellent)? Reply with the number alone."""


PAIRWISE = """{question}

Answer A: {first}

Answer B: {second}

Which answer is better? Reply with A or B."""


RATINGS = ("1", "2", "3", "4", "5")


NOT_A_JUDGES = ("signals", "reference", "per_token", "tools", "documents")
"""options that apply to the judged rows, but not to the questions about them"""


@dataclass(frozen=True)
class Judge:
    """Base class of the judges: a language model (an EndoRewardModel) that is asked about completions.

    A reply may be several tokens long. Raises EndoRewardError if the tokenizer has no token for a part of a reply: it
    would become the unknown token, whose log-probability does not depend on the answer.
    """

    scorer: "EndoRewardModel"
    method: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        if not hasattr(self.scorer, "tokenizer"):
            found = type(self.scorer).__name__
            raise EndoRewardError(f"scorer is a {found}: expected an EndoRewardModel")
        odd = [reply for reply in self.possible() if not isinstance(reply, str) or not reply.strip()]
        if odd or not self.possible():
            raise EndoRewardError(f"{self.method}: the replies are {self.possible()!r}: expected texts, at least one")
        tokenizer = self.scorer.tokenizer
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown is None:
            return
        lacking = [reply for reply in self.possible() if unknown in tokenize(tokenizer, reply)]
        if lacking:
            raise EndoRewardError(
                f"{self.method}: the model's tokenizer has no token for {', '.join(map(repr, lacking))}"
            )

    def possible(self) -> tuple[str, ...]:
        """Return the replies whose probabilities are read."""
        raise NotImplementedError

    def iter_scores(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """Yield (position in rows, score) as batches of questions finish. Options as in `EndoRewardModel.score`."""
        return self._scores(list_of_rows(rows), ScoreOptions.of(options), on_tokens, options)

    def _scores(self, rows: list[Row], chosen: ScoreOptions, on_tokens: OnTokens, options: ScoreKwargs) -> Scores:
        kept: Any = {name: value for name, value in options.items() if name not in NOT_A_JUDGES}
        asked = Questions(self.scorer.tokenizer, chosen.chat)
        needs: dict[int, list[int]] = {}
        for position, found in enumerate(self.ask(rows, asked)):
            unscored = self._unscored(found, rows[position], chosen)
            if unscored is not None:
                yield position, unscored
            elif not isinstance(found, EndoRewardError):
                needs[position] = found
        users: dict[int, list[int]] = {}
        for position, replies in needs.items():
            for reply in set(replies):
                users.setdefault(reply, []).append(position)
        missing = {position: len(set(replies)) for position, replies in needs.items()}
        results: dict[int, RowScore] = {}
        for i, result in self.scorer.iter_logprobs(asked.rows, on_tokens=on_tokens, **kept | {"append_eos": False}):
            results[i] = result
            for position in users.get(i, ()):  # empty if the row of the question has no score
                missing[position] -= 1
                if not missing[position]:
                    yield position, self._verdict([results[reply] for reply in needs[position]], chosen.alpha)

    def _unscored(self, asked: list[int] | EndoRewardError, row: Row, options: ScoreOptions) -> RowScore | None:
        """Return the result of a row without a score, else None.

        A row has none if its question failed. For every method it also has none if its completion is empty and no token
        ends it.
        """
        if isinstance(asked, EndoRewardError):
            return RowScore(None, 0, None, error=str(asked))
        if plain_text(prompt_and_completion(row)[1]):
            return None
        try:
            encoded = replace(encoder_for(self.scorer, options), max_length=None).encode(row)
        except EndoRewardError as error:
            return RowScore(None, 0, None, error=str(error))
        nothing = encoded.prompt_length == len(encoded.input_ids)
        return RowScore(None, 0, None, ("empty",), NOTHING_TO_SCORE) if nothing else None

    def score(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[RowScore]:  # fmt: skip
        """Return the scores of rows, in their order."""
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def ask(self, rows: Sequence[Row], asked: "Questions") -> list[list[int] | EndoRewardError]:
        """Add the questions of all rows to `asked`. Return for each row the positions of its replies, or its error."""
        raise NotImplementedError

    def decide(self, logprobs: list[float], alpha: float) -> float:
        """Return the score of a row from the log-probabilities of its replies (nats), or NaN if it has none."""
        raise NotImplementedError

    def _verdict(self, replies: list[RowScore], alpha: float) -> RowScore:
        count = sum(reply.num_tokens for reply in replies)
        flags = tuple(dict.fromkeys(flag for reply in replies for flag in reply.flags))
        error = next((reply.error for reply in replies if reply.error), None)
        if error is None:
            score = self.decide([reply.logprob for reply in replies if reply.logprob is not None], alpha)
            if not math.isnan(score):
                return RowScore(score, count, None, flags)
            error = "the model gives every reply probability 0"
        return RowScore(None, count, None, flags, error)


@dataclass(frozen=True)
class Verifier(Judge):
    """alpha log pi("Yes" | question, answer, instruction).

    This equals the endogenous reward of the reply "Yes" minus V of the state in which it is chosen, if the reply is one
    token and ends the episode.
    """

    instruction: str = VERIFIER
    """`str.format` template with {question} and {answer}"""
    reply: str = "Yes"
    method = "Generative verifier"
    formula = 'alpha log pi("Yes" | question, answer)'
    source = "GenRM, 2408.15240, untrained"

    def possible(self) -> tuple[str, ...]:
        return (self.reply,)

    def ask(self, rows: Sequence[Row], asked: "Questions") -> list[list[int] | EndoRewardError]:
        return [asked.about(row, self.instruction, (self.reply,)) for row in rows]

    def decide(self, logprobs: list[float], alpha: float) -> float:
        return alpha * logprobs[0]


@dataclass(frozen=True)
class Pointwise(Judge):
    """The mean rating under the model's probabilities of the ratings, normalised to sum to 1."""

    instruction: str = POINTWISE
    """`str.format` template with {question} and {answer}"""
    ratings: tuple[str, ...] = RATINGS
    """the replies, each a number"""
    method = "Judge, pointwise"
    formula = "sum k pi(k | question, answer) / sum pi(k | question, answer), k = 1 ... 5"
    source = "G-Eval, 2303.16634"

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = [rating for rating in self.ratings if not _is_number(rating)]
        if odd:
            raise EndoRewardError(f"{self.method}: {odd[0]!r} in ratings is not a number: expected texts such as '5'")

    def possible(self) -> tuple[str, ...]:
        return self.ratings

    def ask(self, rows: Sequence[Row], asked: "Questions") -> list[list[int] | EndoRewardError]:
        return [asked.about(row, self.instruction, self.ratings) for row in rows]

    def decide(self, logprobs: list[float], alpha: float) -> float:
        top = max(logprobs)
        weights = [math.exp(logprob - top) if top > -math.inf else math.nan for logprob in logprobs]
        return sum(w * float(k) for w, k in zip(weights, self.ratings, strict=True)) / sum(weights)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class Pairwise(Judge):
    """Mean over rivals of log pi(reply for the completion) - log pi(reply for the rival).

    Each pair is asked in both orders, and the two results are averaged. So a preference for A or for B cancels.
    Rivals are the rows with the same "group", or with the same prompt if a row has no such key. N rivals need N (N - 1)
    questions with two replies each.
    """

    instruction: str = PAIRWISE
    """`str.format` template with {question}, {first} and {second}"""
    replies: tuple[str, str] = ("A", "B")
    method = "Judge, pairwise"
    formula = 'mean over rivals, both orders, of log pi("A") - log pi("B")'
    source = "LLM-as-a-judge, 2306.05685"

    def possible(self) -> tuple[str, ...]:
        return self.replies

    def ask(self, rows: Sequence[Row], asked: "Questions") -> list[list[int] | EndoRewardError]:
        texts = [question_and_answer(row) for row in rows]
        groups: dict[Any, list[int]] = {}
        for position, (row, found) in enumerate(zip(rows, texts, strict=True)):
            if not isinstance(found, EndoRewardError):
                groups.setdefault(("group", row["group"]) if "group" in row else found[0], []).append(position)
        needs: list[list[int] | EndoRewardError] = [
            found
            if isinstance(found, EndoRewardError)
            else EndoRewardError("a pairwise judge needs a rival completion")
            for found in texts
        ]
        for members in groups.values():
            for i in members:
                pairs = [order for j in members if j != i for order in ((i, j), (j, i))]
                if pairs:
                    needs[i] = [reply for pair in pairs for reply in self._compare(rows, texts, pair, asked)]
        return needs

    def _compare(self, rows: Sequence[Row], texts: Any, pair: tuple[int, int], asked: "Questions") -> list[int]:
        (question, first), (_, second) = (texts[i] for i in pair)
        return asked.put(
            self.instruction.format(question=question, first=first, second=second), self.replies, rows[pair[0]]
        )

    def decide(self, logprobs: list[float], alpha: float) -> float:
        # four log-probabilities for each rival: A and B with the completion as A, then A and B with it as B
        fours = [logprobs[k : k + 4] for k in range(0, len(logprobs), 4)]
        return sum((a - b) - (c - d) for a, b, c, d in fours) / (2 * len(fours))


JUDGES: Mapping[str, type[Judge]] = MappingProxyType(
    {"verifier": Verifier, "pointwise": Pointwise, "pairwise": Pairwise}
)
