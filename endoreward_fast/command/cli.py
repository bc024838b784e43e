"""The `endoreward` command. Nothing here imports torch before a model is needed: --help answers at once."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import EndoRewardError
from ..model.checkpoint import weights_of
from .evaluate import plots, side_by_side
from .evaluate.report import FileResult, to_json, to_text
from .flags import guide
from .flags.options import LOCAL, EngineFlags, EvalFlags, ModelFlags, RowFlags
from .flags.parameters import of_input, of_output, takes
from .input.files import STDIN, open_source
from .input.formats import JSON, JSON_LINES, refuse_other_format
from .run import pipeline
from .run.going_on import end, going_on, kept_until_written
from .run.jobs import ANSWERS, Engine, Job, here, nothing_left
from .run.monitor import Monitor, one_line, say
from .run.ranks import Rank, help_out, lead
from .run.resume import (
    Done,
    beside,
    day_of,
    holds_rows,
    in_order,
    lines_done,
    recorded,
    rows_done,
    rows_left,
    settings_of,
)
from .run.sink import Sink
from .show import show as show_file

BAD_INPUT = 2  # exit code


class _Group(TyperGroup):
    """Says an EndoRewardError in one line, exit code 2; anything else is a defect and keeps its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`help COMMAND` is `COMMAND --help`."""
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context keeps the command line, as it was given, in `obj`."""
        given = tuple(args)
        ctx = super().make_context(info_name, args, parent, **extra)
        ctx.obj = given
        return ctx

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EndoRewardError as error:
            rank = os.environ.get("RANK", "0")
            who = "" if rank == "0" else f"rank {rank}: "
            print(f"endoreward: {who}{one_line(str(error))}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None


class _OneProcess(TyperCommand):
    """A command that ranks cannot share."""

    def invoke(self, ctx: Any) -> Any:
        rank = Rank.from_environment()
        if rank.alone:
            return super().invoke(ctx)
        if not rank.first:
            raise typer.Exit  # with another code the launcher might end rank 0 before it has said why
        raise EndoRewardError(
            f"{ctx.info_name} runs in one process: start it without a launcher ({' and '.join(ANSWERS)} share their "
            "rows)"
        )


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The reward inside every causal language model: r = Q(s, a) - V(s'), read from its own logits.",
    epilog=guide.ROOT,
)
File = Annotated[
    str, typer.Argument(metavar="FILE", help="JSON Lines, JSON, CSV, TSV, Parquet, or gzipped; - is standard input.")
]
Resume = Annotated[bool, of_output("--resume", help="Go on with --output where an earlier run was cut off.")]
PerToken = Annotated[bool, of_output("--per-token", help="Add token_rewards: one number for every scored token.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"endoreward {version('endoreward-fast')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Flags of the command itself."""


@app.command(epilog=guide.SCORE)
@takes(EngineFlags)
def score(
    context: typer.Context, file: File, flags: EngineFlags, per_token: PerToken = False, resume: Resume = False
) -> None:
    """Score every completion of FILE: JSON Lines out, every column kept, `score` added."""
    _rows_to_rows(Job("score", flags, per_token), flags, file, resume, context.find_root().obj)


@app.command(epilog=guide.RANK)
@takes(EngineFlags)
def rank(
    context: typer.Context, file: File, flags: EngineFlags, per_token: PerToken = False, resume: Resume = False
) -> None:
    """Rank the completions of every row of FILE: adds `scores`, `ranking` (best first) and `best`."""
    _rows_to_rows(Job("rank", flags, per_token), flags, file, resume, context.find_root().obj)


def _rows_to_rows(job: Job, flags: EngineFlags, file: str, resume: bool, arguments: tuple[str, ...]) -> None:
    if resume and flags.overwrite:
        raise EndoRewardError("--resume and --overwrite: name one of them")
    rank = Rank.from_environment()
    if flags.engine != LOCAL and not rank.alone:
        raise EndoRewardError("--engine ray starts processes of its own: start it without a launcher")
    if flags.engine != LOCAL and importlib.util.find_spec("ray") is None:
        raise EndoRewardError("--engine ray needs Ray Data: pip install 'ray[data]<2.64'")
    if not rank.first:
        return help_out(job, rank)
    if not rank.alone and (file == STDIN or Path(file).is_fifo()):
        # Rank 0 reads in a thread, which nothing could end while it waits for more.
        raise EndoRewardError("several processes do not read standard input or a pipe: name a file")
    output = str(flags.output)
    flags = replace(flags, date=flags.date or day_of(flags.output, resume=resume))
    job = replace(job, flags=flags)

    by_flags = settings_of(job.command, version("endoreward-fast"), flags.to_json(), job.per_token, weights="")

    @cache
    def settings() -> dict[str, Any]:
        return by_flags | {"weights": weights_of(flags.model, **flags.source)}

    ways = {"overwrite": flags.overwrite, "resume": resume}
    ways["beside"] = beside(flags.output)
    with Sink(flags.output, (file, *flags.inputs), **ways, emptying=lambda: recorded(output, settings())) as sink:
        note = refuse_other_format(flags.output, JSON_LINES)
        if resume and sink.is_stdout:
            raise EndoRewardError("--resume goes on with a file: name it by --output")
        source = open_source(file, flags.limit)
        # What the model's name stands for may be a question to the hub: it comes last.
        go_on = resume and holds_rows(output, by_flags)
        done = rows_done(output, settings(), flags.id) if go_on else Done()
        if done.failed:
            sink.append(lines_done(output, job.command))
        elif done.rows:
            sink.append()
        order: list[str] = []
        source = rows_left(source, flags, done.rows, order)
        first, windows = pipeline.peek(pipeline.windows(source, job.command, flags))
        if not first and not done.rows:
            raise EndoRewardError(f"{source.name} has no rows: there is nothing to score")
        if first and done == Done():  # what is left of a run may well be just what cannot be scored
            pipeline.check_usable(first, source.name)
        run = _engine(job, flags, rank, settings, idle=not first)
        monitor = Monitor(source.total, quiet=flags.quiet, bar=not sink.on_terminal, model=flags.model)
        with going_on(arguments, sink, monitor), monitor:
            if note:
                monitor.note(note)
            if done != Done():
                monitor.note(f"{output} holds {done.described}")
            run(windows, sink.write, monitor)
            if done.failed:
                sink.write("")  # those without a score go, also where this input has none of them to try again
            if done.rows and (lines := in_order(output, job.command, order, flags.id)) is not None:
                sink.rewrite(lines)
    if monitor.failed:
        raise typer.Exit(BAD_INPUT)


def _engine(job: Job, flags: EngineFlags, rank: Rank, settings: Callable[[], dict[str, Any]], *, idle: bool) -> Engine:
    """Where the rows are scored; what must be there for it is there, or an EndoRewardError. `idle`: there are none."""
    if not rank.alone:
        return lead(job, rank, settings()["weights"], idle=idle)
    if idle:
        return nothing_left
    pipeline.before_loading(flags)
    if flags.engine == LOCAL:
        return here(job)
    from .run.on_ray import on_ray

    return on_ray(job, flags)


@app.command("eval", cls=_OneProcess, epilog=guide.EVAL)
@takes(EvalFlags)
def evaluate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Preference files: RM-Bench, RewardBench, or your own.")
    ],
    flags: EvalFlags,
    as_json: Annotated[bool, of_output("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Accuracy on preference FILES, by subset; RM-Bench's matrix, RewardBench's sections. --output: JSON."""
    as_json = as_json or flags.output == STDIN
    flags = replace(flags, date=flags.date or date.today().isoformat())
    with Sink(flags.output, (*files, *flags.inputs), overwrite=flags.overwrite) as sink:
        refuse_other_format(flags.output, JSON)
        sources = [open_source(file, flags.limit) for file in files]
        readers = [pipeline.checked(pipeline.windows(s, "eval", flags), s.name) for s in sources]
        pipeline.before_loading(flags)
        panel = side_by_side.panel(flags)
        models = side_by_side.models(flags)
        totals = [source.total for source in sources]
        total = None if None in totals else panel.passes * sum(t for t in totals if t is not None)
        results = [FileResult.by_methods(source.name, panel.methods) for source in sources]
        monitor = Monitor(total, passes=panel.passes, quiet=flags.quiet, model=flags.model)
        with kept_until_written() as ended, monitor:
            if panel.readings:
                monitor.note(panel.readings)
            for result, reader in zip(results, readers, strict=True):
                for items in reader:
                    panel.judge(items, result, monitor, strict=flags.strict)
        if not monitor.rows:
            end(ended)
        about = {"version": version("endoreward-fast"), "complete": not ended} | models
        about |= {"flags": flags.to_json(), "tokens": monitor.tokens, "seconds": round(monitor.seconds, 3)}
        found = json.dumps(to_json(results, about), indent=1)
        try:
            if flags.output:
                sink.write(found + "\n")
        except EndoRewardError as error:
            ended.append(error)
        if not as_json:
            say(f"{side_by_side.heading(models, flags)}\n{to_text(results, flags.left_out)}")
        elif flags.output != STDIN:
            say(f"{found}\n")
        end(ended)
    if monitor.failed or monitor.missed:
        raise typer.Exit(BAD_INPUT)


@app.command(cls=_OneProcess, epilog=guide.SHOW)
@takes(RowFlags)
def show(
    flags: RowFlags,
    file: Annotated[Optional[str], typer.Argument(metavar="FILE", help="As for `score`; or --prompt.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], of_input(help="Instead of FILE.")] = None,  # noqa: UP045
    completion: Annotated[Optional[list[str]], of_input(help="Of --prompt; may be given again.")] = None,  # noqa: UP045
    html: Annotated[Optional[str], of_output(help="Write one self-contained page here.")] = None,  # noqa: UP045
) -> None:
    """Colour every token by its reward: on the terminal, or in a page (--html, or -o *.html) with tooltips."""
    if not show_file(file, prompt, completion or (), html, flags):
        raise typer.Exit(BAD_INPUT)


@app.command(cls=_OneProcess, epilog=guide.PLOT)
@takes(RowFlags)
def plot(file: File, flags: RowFlags) -> None:
    """Draw FILE's scores, their dependence on length, and reward by position, into --output (rewards.png)."""
    if not plots.plot(file, flags):
        raise typer.Exit(BAD_INPUT)


@app.command(cls=_OneProcess, epilog=guide.DEMO)
@takes(ModelFlags)
def demo(flags: ModelFlags) -> None:
    """A demonstration without a network: real text against corrupted, right answers against wrong."""
    from .demo import show

    show(flags)


def main() -> None:
    """Entry point."""
    app(prog_name="endoreward")
