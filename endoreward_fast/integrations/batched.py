"""Batch concurrent requests for single rewards, which verl and OpenRLHF make from many threads or tasks.

Requests that arrive while a forward runs are scored together in the next one. A server gets several requests at a time.
"""

import math
import os
import threading
import warnings
import weakref
from collections import Counter
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import EndoRewardError
from ..remote.client import RemoteModel
from ..scoring.options import ScoreOptions
from ..scoring.results import RowScore
from ..scoring.sampled import UNSCORED, Rewarded, ending_ids
from .generated import score_completions, scorer_of

# One lock for each model: a hook reads the head's input, so adapters that share a model must take turns.
_BUSY: "weakref.WeakKeyDictionary[torch.nn.Module, threading.Lock]" = weakref.WeakKeyDictionary()


@dataclass
class Queue:
    """What waits in one process, and the threads that score it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: list[tuple[dict[str, Any], "Future[Rewarded]"]] = field(default_factory=list)
    running: int = 0
    """threads that score; each ends when nothing waits"""


class BatchedReward:
    """Score sampled completions, submitted one at a time from any thread.

    model         the frozen initial policy: a name or folder, a loaded causal language model, or an EndoRewardModel. Or
                  the URL of a server ("http://HOST:PORT"), or a RemoteModel
    tokenizer     the policy's tokenizer. Default: the reward model's
    alpha, reduction, gamma, floor, max_tokens_per_batch      as in EndoRewardModel.score
    unscored      the reward of a completion that cannot be scored (empty, longer than the model's positions, not
                  finite). These trainers cannot represent a missing reward. `unscored` is never the best reward: a
                  completion that scores no higher counts as unscored too. The default, -1e6, is below the score of any
                  real completion (16,384 tokens of -61 nats), and its square is precise enough in float32

    Each reason for a missing score gives one warning. `reasons` counts all cases.

    Raises EndoRewardError: a tokenizer other than the reward model's, or an invalid option.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, alpha: float = 1.0, reduction: Literal["sum", "mean"] = "sum",
        gamma: float = 1.0, floor: float = 0.0, max_tokens_per_batch: int | None = None, unscored: float = UNSCORED,
    ) -> None:  # fmt: skip
        if not (isinstance(unscored, int | float) and math.isfinite(unscored) and unscored < 0):
            raise EndoRewardError(f"unscored={unscored!r}: expected a finite number below 0 and below every score")
        self.options = ScoreOptions(
            alpha=alpha, reduction=reduction, gamma=gamma, floor=floor, max_tokens_per_batch=max_tokens_per_batch
        )
        self.scorer = scorer_of(model, tokenizer, max_tokens_per_batch=max_tokens_per_batch)
        self.tokenizer = self.scorer.tokenizer if tokenizer is None else tokenizer
        self.ends = ending_ids(self.scorer, self.tokenizer)
        self.unscored = float(unscored)
        self.reasons: Counter[str] = Counter()
        self._of_process: dict[int, Queue] = {}
        self._turn: AbstractContextManager[Any] = nullcontext()
        self._at_a_time = 1
        if isinstance(self.scorer, RemoteModel):
            self._at_a_time = self.scorer.concurrency
        else:
            self._turn = _BUSY.setdefault(self.scorer.model, threading.Lock())

    def submit(self, row: dict[str, Any]) -> "Future[Rewarded]":
        """Queue a row of EndoRewardModel.score, such as one from `generated_row`, for the next batch."""
        asked: Future[Rewarded] = Future()
        queue = self._queue
        remote = isinstance(self.scorer, RemoteModel)
        with queue.lock:
            if queue.running < self._at_a_time:
                # The end of the process waits for a model of its own, but not for a server's answer.
                threading.Thread(target=self._run, args=(queue,), name="endo_reward", daemon=remote).start()
                queue.running += 1
            queue.waiting.append((row, asked))
        return asked

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_of_process": {}}

    @property
    def _queue(self) -> Queue:
        """The queue of this process: a forked one has no thread of the process that forked it."""
        return self._of_process.setdefault(os.getpid(), Queue())

    def _run(self, queue: Queue) -> None:
        """Score what waits, until nothing does."""
        while True:
            with queue.lock:
                batch, queue.waiting = queue.waiting, []
                if not batch:
                    queue.running -= 1
                    return
            self._score([(row, asked) for row, asked in batch if asked.set_running_or_notify_cancel()])

    def _score(self, batch: list[tuple[dict[str, Any], "Future[Rewarded]"]]) -> None:
        o = self.options
        options = {"alpha": o.alpha, "max_tokens_per_batch": o.max_tokens_per_batch}
        try:
            with self._turn:
                rows = score_completions(self.scorer, [row for row, _ in batch], per_token=True, texts=False, **options)
            found = [self._reduce(row) for row in rows]
        except Exception as error:  # raised again by each caller's Future
            for _, asked in batch:
                asked.set_exception(error)
            return
        for (_, asked), rewarded in zip(batch, found, strict=True):
            asked.set_result(rewarded)

    def _reduce(self, row: RowScore) -> Rewarded:
        found = Rewarded.of(row, self.options, self.unscored)
        return found if found.error is None else self.without(found.error)

    def without(self, reason: str) -> Rewarded:
        """Return the answer for a completion that cannot be scored. Count it, and warn once for each reason."""
        with self._queue.lock:
            known = reason in self.reasons
            self.reasons[reason] += 1
        if not known:
            warnings.warn(f"a completion gets reward {self.unscored:g}: {reason}", stacklevel=2)
        return Rewarded.without(reason, self.unscored)
