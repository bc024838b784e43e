"""`endoreward show`: score rows and colour their tokens, on the terminal or in a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data.files import Record, Source, open_source
from ..data.formats import PAGE, TEXT, format_of, refuse_other_format
from ..data.items import Item
from ..errors import EndoRewardError
from ..text.messages import spoken
from ..text.row_flags import in_words
from ..view.heatmap import Card, Row, Token, best_of, clipped, counted, limit_of_rows, number, page, visible
from ..view.notebook import tokens_of
from ..view.palette import DARK, LEVELS, level_of, terminal_256
from .flags.options import RowFlags
from .run import pipeline
from .run.interrupted import end, kept_until_written
from .run.monitor import Monitor
from .run.sink import Sink

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 20
"""rows to show without --limit"""


def show(file: str | None, prompt: str | None, completions: Sequence[str], html: str | None, flags: RowFlags) -> bool:
    """Score and draw. Returns whether every completion got a score.

    Raises EndoRewardError for arguments that cannot work.
    """
    if html is not None and flags.output is not None:
        raise EndoRewardError("--html and --output exclude each other: use one of them")
    if html == "":
        raise EndoRewardError("--html is empty: name a file")
    if format_of(flags.output) == PAGE:
        html = flags.output
    source = _source(file, prompt, completions, flags.limit or SHOWN)
    with Sink(html or flags.output, (*((file,) if file else ()), *flags.inputs), overwrite=flags.overwrite) as sink:
        refuse_other_format(html or flags.output, PAGE if html else TEXT, "--html" if html else "--output")
        batches = pipeline.checked(pipeline.windows(source, "score", flags), source.name)
        pipeline.before_loading(flags)
        scorer = pipeline.load_scorer(flags)
        options = {**flags.scoring(), "per_token": True, "entropy": True}
        rows: list[Row] = []
        monitor = Monitor(source.total, quiet=flags.quiet, model=flags.model)
        with kept_until_written() as ended, monitor:
            for items in batches:
                pipeline.score_items(
                    items, scorer, options, lambda item: rows.append(row_of(item)), monitor, strict=flags.strict
                )
            if file and flags.limit is None and len(rows) == SHOWN:
                monitor.note(f"only the first {SHOWN} rows are shown: --limit shows more or fewer")
        if not rows:
            end(ended)
        sink.write(page(rows, flags.described()) if html else _text(rows, sink, flags.described()))
        end(ended)
    return not monitor.failed


def _source(file: str | None, prompt: str | None, completions: Sequence[str], limit: int) -> Source:
    if file is not None:
        if prompt is not None or completions:
            raise EndoRewardError("FILE excludes --prompt and --completion: use one of them")
        return open_source(file, limit)
    if prompt is None or not completions:
        raise EndoRewardError("nothing to show: name a FILE, or --prompt and at least one --completion")
    record = Record("command line", {"prompt": prompt, "completions": list(completions)})
    return Source("command line", iter([record]), 1)


def row_of(item: Item) -> Row:
    """Turn a scored item into a row of the heatmap."""
    if item.task is None:
        return Row(item.record.where, "", [Card("no completion", None, (), item.error)])
    labels = dict(_labels(item.task.layout))
    cards = []
    for i in range(len(item.task.samples)):
        table = item.results[i].tokens
        tokens = () if table is None else tokens_of(table)
        notes = (in_words(item.task.flags), item.results[i].note)
        note = item.problem(i) or "; ".join(note for note in notes if note) or None
        cards.append(Card(labels[i], item.score(i), tokens, note))
    if not cards:
        return Row(item.record.where, "", [Card("no completion", None)])
    return Row(item.record.where, _prompt(item.task.samples[0]), cards)


def _labels(layout: Any, name: str = "completion") -> Iterator[tuple[int, str]]:
    """Yield (position, label) of every completion."""
    if isinstance(layout, dict):
        for side, part in layout.items():
            yield from _labels(part, side)
    elif isinstance(layout, list):
        yield from ((position, f"{name} {n}") for n, position in enumerate(layout, start=1))
    else:
        yield layout, name


def _prompt(sample: dict[str, Any]) -> str:
    """Return the prompt as readable text."""
    prompt = sample.get("prompt", sample.get("messages", [])[:-1])
    if "prompt_ids" in sample:
        return f"{len(sample['prompt_ids'])} token ids"
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {spoken(m)}" for m in prompt)


def _text(rows: Sequence[Row], sink: Sink, title: str) -> str:
    """Return text for a terminal, in colour if possible. Without colour, each token is followed by its reward."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=False, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(Text(visible(title), "bold"), soft_wrap=True)
        print_rows(rows, console, _colours(console) if sink.is_stdout else None)
    return capture.get()


def _colours(console: Console) -> str | None:
    """Return "256", "truecolor" or None. Sixteen colours are too few: white is unreadable on their yellow."""
    return console.color_system if not console.no_color and console.color_system in ("256", "truecolor") else None


def print_rows(rows: Sequence[Row], console: Console, colours: str | None) -> None:
    """Print `rows` on a rich console. Without `colours`, each token is followed by its reward."""
    from rich.text import Text

    limit = limit_of_rows(rows)
    for row in rows:
        best = best_of(row.cards)
        console.print(Text(visible(row.title), "dim"))
        if row.prompt:
            console.print(Text(visible(row.prompt), "dim"), soft_wrap=True)
        for i, card in enumerate(row.cards):
            score = "no score" if card.score is None else number(card.score)
            console.print(Text(f"\n{card.label}  {score}  {counted(card.tokens)}{'  best' * (i == best)}", "bold"))
            if card.note:
                console.print(Text(visible(card.note)), soft_wrap=True)
            line = Text()
            for token in card.tokens:
                _append(line, token, limit, colours)
            console.print(line, soft_wrap=True)  # rich's own wrapping drops spaces at the ends of lines
        console.print()
    if any(token.terminal for row in rows for card in row.cards for token in card.tokens):
        console.print("After the last token of an episode, nothing is subtracted.", soft_wrap=True)
    if colours:
        console.print(_scale(limit, colours, clipped(rows, limit)), soft_wrap=True)
    else:
        console.print("[...] is the reward of the token before it.", soft_wrap=True)


def _append(line: Any, token: Token, limit: float, colours: str | None) -> None:
    text = visible(token.text).replace("\n", "↵\n") or f"[{token.name}]"
    if colours:
        line.append(text, style_of(level_of(token.reward, limit), colours))
    else:
        line.append(f"{text}[{number(token.reward)}]")


def style_of(level: int | None, colours: str) -> str:
    """Return a rich style: both colours set, for legibility on any terminal, and underlined below 0."""
    if level is None:
        return "reverse"
    background = DARK.background(level) if colours == "truecolor" else f"color({terminal_256(level)})"
    return f"{'underline ' if level < 0 else ''}{DARK.ink} on {background}"


def _scale(limit: float, colours: str, note: str | None) -> Any:
    from rich.text import Text

    line = Text(f"≤ {number(-limit)} ")
    for level in range(-LEVELS, LEVELS + 1):
        line.append(" ", style_of(level, colours))
    return line.append(f" ≥ {number(limit)}  reward of a token{f'; {note}' if note else ''}")
