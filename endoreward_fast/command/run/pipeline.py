"""Pass rows through the model: read windows, score batches of similar length, write in the order of the input."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from ...data.benchmarks import plan_eval, plan_plot
from ...data.columns import MissingColumns, plan
from ...data.files import Record, Source
from ...data.items import Item
from ...errors import EndoRewardError
from ...model.checkpoint import POCKET
from .monitor import Aside, Monitor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...scoring.arguments import ScoreKwargs
    from ...scoring.results import OnTokens, RowScore
    from ..flags.options import EvalFlags, ModelFlags, RowFlags

WINDOW = 32
"""Characters of a window per token of a batch. At four characters per token, a window fills eight batches: enough to
sort rows by length, and few enough to write results early"""
BATCH = 8192
"""tokens that a batch holds if --max-tokens-per-batch is not given"""
NO_MODEL = (
    f"no --model: using {POCKET}, the embedded demonstration model with 3 million weights; name yours with --model"
)


class Scorer(Protocol):
    """The part of EndoRewardModel that the command uses. Only the model itself encodes; judges read text."""

    def iter_scores(
        self, rows: list[dict[str, Any]], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> Iterator[tuple[int, RowScore]]:
        """Yield (position in rows, score) as batches finish, in any order."""


class Encoder(Scorer, Protocol):
    """A Scorer whose rows can be encoded before they are scored."""

    def encode(self, rows: list[dict[str, Any]], **options: Unpack[ScoreKwargs]) -> list[Any]:
        """Return what `iter_scores` takes in place of rows."""


def load_scorer(flags: ModelFlags) -> Encoder:
    """Load the model that `flags` name. Imports torch and transformers: call this after the cheap checks."""
    from ...model.model import EndoRewardModel

    _quieten(flags)
    return EndoRewardModel.from_pretrained(flags.model, dtype=flags.dtype, device=flags.device, **flags.source)


def load_reward_model(flags: ModelFlags, name: str) -> Scorer:
    """Load the trained reward model `name`, with the dtype and device of `flags`."""
    from ...rivals.reward_model import RewardModel

    _quieten(flags)
    return RewardModel.from_pretrained(name, dtype=flags.dtype, device=flags.device)


def refuse_other_models(flags: EvalFlags) -> None:
    """Raise EndoRewardError if --reference-model or --reward-model is the wrong kind of model. Loads no weights."""
    from ...model.loading import refuse_other_models

    _quieten(flags)
    refuse_other_models(flags.reference_model, flags.reward_model)


def load_judges(names: Iterable[str], scorer: Scorer) -> dict[str, Any]:
    """Return judges of the kinds named; each asks the model of `scorer`."""
    from ...rivals.judges import JUDGES

    return {name: JUDGES[name](scorer) for name in names}


def before_loading(flags: ModelFlags) -> None:
    """Print which model scores if the command line named none. Call this after the cheap checks, before loading."""
    if flags.model_by_default and not flags.quiet:
        print(f"endoreward: {NO_MODEL}", file=sys.stderr, flush=True)


def _quieten(flags: ModelFlags) -> None:
    from transformers.utils import logging

    if flags.quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
    if flags.quiet:
        logging.set_verbosity_error()


def windows(source: Source, command: str, flags: RowFlags) -> Iterator[list[Item]]:
    """Yield the rows of `source` in windows of about WINDOW characters per token of a batch.

    If reading fails, or a row is unusable in strict mode, the rows before it are yielded first. Then EndoRewardError is
    raised.
    """
    items: list[Item] = []
    size, full = 0, WINDOW * (flags.max_tokens_per_batch or BATCH)
    try:
        for record in source.records:
            item = _item(record, command)
            if flags.strict and item.error:
                raise EndoRewardError(f"{record.where}: {item.error} (--strict: stopped here)")
            items.append(item)
            size += sum(len(str(sample)) for sample in item.task.samples) if item.task else 1
            if size >= full:
                yield items
                items, size = [], 0
    except EndoRewardError:
        if items:
            yield items
        raise
    if items:
        yield items


def _item(record: Record, command: str) -> Item:
    if record.row is None or record.error:
        return Item(record, None, record.error)
    try:
        of_benchmarks = {"eval": plan_eval, "plot": plan_plot}.get(command)
        return Item(record, of_benchmarks(record.row) if of_benchmarks else plan(record.row, command))
    except EndoRewardError as error:
        return Item(record, None, str(error), unusable=isinstance(error, MissingColumns))


def check_usable(items: list[Item], name: str) -> None:
    """Raise EndoRewardError if none of the first rows can be scored. Call this before a model is loaded."""
    if all(item.task is None for item in items):
        worst = next((item for item in items if item.unusable), items[0])
        raise EndoRewardError(f"{name}: {worst.record.where}: {worst.error}")


def peek(batches: Iterator[list[Item]]) -> tuple[list[Item], Iterator[list[Item]]]:
    """Read the first batch. Returns that batch, or [] if there is none, and an iterator over all batches."""
    first = next(batches, [])
    return first, itertools.chain([first] if first else (), batches)


def checked(batches: Iterator[list[Item]], name: str) -> Iterator[list[Item]]:
    """Read and check the first batch now, before a model is loaded. Returns an iterator over all batches."""
    first, batches = peek(batches)
    check_usable(first, name)
    return batches


def samples_of(items: list[Item]) -> list[dict[str, Any]]:
    """Return the rows to score. Scorers that compare completions compare those of one group: an item, or its prompt."""
    samples = ((n, sample) for n, item in enumerate(items) if item.task for sample in item.task.samples)
    return [{**sample, "group": (n, sample["group"]) if "group" in sample else n} for n, sample in samples]


def encoded(
    windows: Iterator[list[Item]], scorer: Encoder, options: Mapping[str, Any], *, ahead: bool
) -> Iterator[tuple[list[Item], list[Any]]]:
    """Yield windows with their encoded samples.

    ahead   read and encode the next window in a thread while the caller scores this one. Reading must not wait, as a
            pipe does: an interrupt then waits for it
    """

    def read() -> tuple[list[Item], list[Any]] | None:
        items = next(windows, None)
        samples = samples_of(items) if items else []
        return None if items is None else (items, scorer.encode(samples, **options) if samples else [])

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as thread:
        following: Callable[[], tuple[list[Item], list[Any]] | None] = read
        while (window := following()) is not None:
            following = thread.submit(read).result if ahead else read
            yield window


def score_items(
    items: list[Item],
    scorer: Scorer,
    options: Mapping[str, Any],
    write: Callable[[Item], None],
    monitor: Monitor | Aside,
    *,
    strict: bool = False,
    samples: list[Any] | None = None,
) -> None:
    """Score one window and `write` its rows in order, each as soon as all before it are done.

    samples   `samples_of(items)`, which may be encoded

    If Ctrl-C or an error stops it, every row that is completely scored is written first.
    """
    owners = [(item, i) for item in items if item.task for i in range(len(item.task.samples))]
    samples = samples_of(items) if samples is None else samples
    waiting = deque(items)
    monitor.advance(sum(item.done for item in items))

    def hand_on(item: Item) -> None:
        try:
            write(item)
        except EndoRewardError:
            waiting.clear()  # the rows behind it would raise the next error, which would hide this one
            raise
        monitor.on_row(item.record.where, item.first_problem)

    try:
        for position, result in scorer.iter_scores(samples, on_tokens=monitor.on_tokens, **options) if samples else ():
            item, i = owners[position]
            item.results[i] = result
            unmet = (f"{name}: {why}" for name, why in (result.signal_errors or {}).items())
            if strict and (problem := item.problem(i) or next(unmet, None)):
                del item.results[i]  # the row stays incomplete, so it is not written and --resume repeats it
                raise EndoRewardError(f"{item.record.where}: {problem} (--strict: stopped here)")
            monitor.advance(item.done)
            while waiting and waiting[0].done:
                hand_on(waiting.popleft())
    finally:
        while waiting:
            if (item := waiting.popleft()).done:
                hand_on(item)
