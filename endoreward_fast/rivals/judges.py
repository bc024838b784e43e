"""The same language model asked for its judgement: as a verifier, for a rating, or to compare.

A judge is a scorer as EndoRewardModel is one (`iter_scores(rows, **options)`, of rows as encoding.py has them), so that
`endoreward eval` takes either. It works through an EndoRewardModel, on rows rewritten as questions about the answer;
its score is made of the log-probabilities of the replies, under pi = softmax(z / alpha). Of the options those count
that say how text is encoded and batched, and alpha. Instructions are `str.format` texts: pass another to ask otherwise.
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
from ..text.flags import NOTHING_TO_SCORE
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
"""options of the rows that are judged, not of the questions about them"""


@dataclass(frozen=True)
class Judge:
    """A language model (an EndoRewardModel) that is asked about completions. The base of the three below.

    Raises EndoRewardError if the tokenizer has no token for a reply: it would be read as the unknown token, whose
    log-probability says nothing of the answer. A reply may be several tokens long.
    """

    scorer: "EndoRewardModel"
    method: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        if not hasattr(self.scorer, "tokenizer"):
            found = type(self.scorer).__name__
            raise EndoRewardError(f"scorer is a {found}: expected an EndoRewardModel, which the judge asks")
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
        """The replies that are weighed."""
        raise NotImplementedError

    def iter_scores(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Scores:  # fmt: skip
        """(position in rows, score) as the model's replies come in. Options as in `EndoRewardModel.score`."""
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
        for i, result in self.scorer.iter_scores(asked.rows, on_tokens=on_tokens, **kept | {"append_eos": False}):
            results[i] = result
            for position in users.get(i, ()):  # none, if the row that it was for has no score
                missing[position] -= 1
                if not missing[position]:
                    yield position, self._verdict([results[reply] for reply in needs[position]], chosen.alpha)

    def _unscored(self, asked: list[int] | EndoRewardError, row: Row, options: ScoreOptions) -> RowScore | None:
        """Why a row has no score, if it has none: one that is empty and that nothing ends has none by any method."""
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
        """Scores of rows, in their order."""
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def ask(self, rows: Sequence[Row], asked: "Questions") -> list[list[int] | EndoRewardError]:
        """For each row the replies, as `asked` numbers them, whose log-probabilities its score is made of."""
        raise NotImplementedError

    def decide(self, logprobs: list[float], alpha: float) -> float:
        """The score of a row from those log-probabilities, nats; NaN if they leave none."""
        raise NotImplementedError

    def _verdict(self, replies: list[RowScore], alpha: float) -> RowScore:
        count = sum(reply.num_tokens for reply in replies)
        flags = tuple(dict.fromkeys(flag for reply in replies for flag in reply.flags))
        error = next((reply.error for reply in replies if reply.error), None)
        if error is None:
            score = self.decide([reply.logprob for reply in replies if reply.logprob is not None], alpha)
            if not math.isnan(score):
                return RowScore(score, count, None, flags)
            error = "the model rules every reply out"
        return RowScore(None, count, None, flags, error)


@dataclass(frozen=True)
class Verifier(Judge):
    """alpha log pi("Yes" | question, answer, instruction).

    A special case of the endogenous reward: that of the reply "Yes", of one token after which the episode ends, less
    V of the state it is chosen in.
    """

    instruction: str = VERIFIER
    """with {question} and {answer}"""
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
    """The mean rating under the model's probabilities of the ratings, which are made to sum to 1."""

    instruction: str = POINTWISE
    """with {question} and {answer}"""
    ratings: tuple[str, ...] = RATINGS
    """replies, each a number; one question to the model for each of them"""
    method = "Judge, pointwise"
    formula = "sum k pi(k | question, answer) / sum pi(k | question, answer), k = 1 ... 5"
    source = "G-Eval, 2303.16634"

    def possible(self) -> tuple[str, ...]:
        return self.ratings

    def ask(self, rows: Sequence[Row], asked: "Questions") -> list[list[int] | EndoRewardError]:
        return [asked.about(row, self.instruction, self.ratings) for row in rows]

    def decide(self, logprobs: list[float], alpha: float) -> float:
        top = max(logprobs)
        weights = [math.exp(logprob - top) if top > -math.inf else math.nan for logprob in logprobs]
        return sum(w * float(k) for w, k in zip(weights, self.ratings, strict=True)) / sum(weights)


@dataclass(frozen=True)
class Pairwise(Judge):
    """log pi("A") - log pi("B"), with the completion as A and as B, so that a liking for a place cancels; the mean over
    its rivals.

    Rivals are the rows of one "group"; without that key, those of an equal prompt. N of them are N (N - 1) questions
    of two replies each.
    """

    instruction: str = PAIRWISE
    """with {question}, {first} and {second}"""
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
        # as A: A, B; then as B: A, B
        fours = [logprobs[k : k + 4] for k in range(0, len(logprobs), 4)]
        return sum((a - b) - (c - d) for a, b, c, d in fours) / (2 * len(fours))


JUDGES: Mapping[str, type[Judge]] = MappingProxyType(
    {"verifier": Verifier, "pointwise": Pointwise, "pairwise": Pairwise}
)
