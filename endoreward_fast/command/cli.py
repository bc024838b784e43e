"""The `endoreward` command. Torch is imported only when a model is needed, so that --help answers at once."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..data.files import STDIN, open_source
from ..data.formats import JSON, JSON_LINES, refuse_other_format
from ..errors import EndoRewardError
from .evaluate import plots, side_by_side
from .evaluate.report import FileResult, to_json, to_text
from .flags import help_text
from .flags.engine_flags import EngineFlags
from .flags.options import EvalFlags, ModelFlags, RowFlags
from .flags.panels import of_head, of_input, of_output, takes
from .flags.score_flags import ScoreFlags
from .flags.serve_flags import ServeFlags
from .flags.values import device_name
from .group import BAD_INPUT, Group, OneProcess
from .run import pipeline
from .run.engines import engine_of, model_of, refuse_without_means
from .run.interrupted import end, kept_until_written, resume_hint
from .run.jobs import Job, ask_server
from .run.monitor import Monitor, say
from .run.ranks import Rank, help_out
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
from .run.sink import Sink, plain
from .show import show as show_file

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Score text with the reward inside every causal language model: r = Q(s, a) - V(s'), from its logits.",
    epilog=help_text.ROOT,
)
File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="JSON Lines, JSON, CSV, TSV or Parquet, also gzipped; standard input is -."),
]
Resume = Annotated[bool, of_output("--resume", help="Continue an interrupted run that wrote --output.")]
PerToken = Annotated[bool, of_output("--per-token", help="Add token_rewards: one number per scored token.")]


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
    """Take the flags of `endoreward` without a command."""


@app.command(epilog=help_text.SCORE)
@takes(ScoreFlags)
def score(
    context: typer.Context, file: File, flags: ScoreFlags, per_token: PerToken = False, resume: Resume = False
) -> None:
    """Score every completion of FILE. Writes JSON Lines: the columns of FILE, and `score`."""
    _rows_to_rows(Job("score", flags, per_token), flags, file, resume, context.find_root().obj)


@app.command(epilog=help_text.RANK)
@takes(EngineFlags)
def rank(
    context: typer.Context, file: File, flags: EngineFlags, per_token: PerToken = False, resume: Resume = False
) -> None:
    """Rank the completions of every row of FILE. Adds `scores`, `ranking` (best first) and `best`."""
    _rows_to_rows(Job("rank", flags, per_token), flags, file, resume, context.find_root().obj)


def _rows_to_rows(job: Job, flags: EngineFlags, file: str, resume: bool, arguments: tuple[str, ...]) -> None:
    if resume and flags.overwrite:
        raise EndoRewardError("--resume and --overwrite exclude each other: use one of them")
    rank = Rank.from_environment()
    refuse_without_means(flags.engine, rank)
    if not rank.first:
        return help_out(job, rank)
    if not rank.alone and (file == STDIN or Path(file).is_fifo()):
        # Rank 0 reads in a thread. Nothing could end that thread while it waits for input.
        raise EndoRewardError("several processes cannot read standard input or a pipe: name a file")
    output = str(flags.output)
    flags = replace(flags, date=flags.date or day_of(flags.output, resume=resume))
    job = replace(job, flags=flags)

    by_flags = settings_of(job.command, version("endoreward-fast"), flags.to_json(), job.per_token, weights="")

    server = cache(partial(ask_server, flags))

    @cache
    def settings() -> dict[str, Any]:
        return by_flags | model_of(flags, server)

    ways = {"overwrite": flags.overwrite, "resume": resume}
    ways["beside"] = beside(flags.output)
    with Sink(flags.output, (file, *flags.inputs), **ways, emptying=lambda: recorded(output, settings())) as sink:
        note = refuse_other_format(flags.output, JSON_LINES)
        if resume and sink.is_stdout:
            raise EndoRewardError("--resume needs the file to continue: name it with --output")
        source = open_source(file, flags.limit)
        # Resolving the model's name may ask the Hub, so it comes after the other checks.
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
        if first and done == Done():  # the rest of a resumed run may consist of rows that cannot be scored
            pipeline.check_usable(first, source.name)
        run = engine_of(job, rank, settings, server, idle=not first, waits=file == STDIN or not Path(file).is_file())
        monitor = Monitor(source.total, quiet=flags.quiet, bar=not sink.on_terminal, model=flags.url or flags.model)
        with resume_hint(arguments, sink, monitor), monitor:
            if note:
                monitor.note(note)
            if done != Done():
                monitor.note(f"{output} holds {done.described}")
            run(windows, sink.write, monitor)
            if done.failed:
                sink.write("")  # drops the lines without a score, even if this input has none of those rows
            if done.rows and (lines := in_order(output, job.command, order, flags.id)) is not None:
                sink.rewrite(lines)
    if monitor.failed:
        raise typer.Exit(BAD_INPUT)


@app.command("eval", cls=OneProcess, epilog=help_text.EVAL)
@takes(EvalFlags)
def evaluate(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Preference files: of benchmarks or your own.")],
    flags: EvalFlags,
    as_json: Annotated[
        bool, of_output("--json", help="Print JSON instead of tables. --output is always JSON.")
    ] = False,
) -> None:
    """Compute accuracy on preference FILES, by subset, and the scores of the benchmarks whose columns they have."""
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
        left_out = side_by_side.leave_out(results, flags)
        about = {"version": version("endoreward-fast"), "complete": not ended} | models
        about |= {"flags": flags.to_json(), "tokens": monitor.tokens, "seconds": round(monitor.seconds, 3)}
        found = json.dumps(plain(to_json(results, about)), indent=1)
        try:
            if flags.output:
                sink.write(found + "\n")
        except EndoRewardError as error:
            ended.append(error)
        if not as_json:
            say(f"{side_by_side.heading(models, flags)}\n{to_text(results, left_out)}")
        elif flags.output != STDIN:
            say(f"{found}\n")
        end(ended)
    if monitor.failed or monitor.missed:
        raise typer.Exit(BAD_INPUT)


@app.command(cls=OneProcess, epilog=help_text.SHOW)
@takes(RowFlags)
def show(
    flags: RowFlags,
    file: Annotated[Optional[str], typer.Argument(metavar="FILE", help="The same files as `score` takes.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], of_input(help="One prompt, instead of FILE.")] = None,  # noqa: UP045
    completion: Annotated[Optional[list[str]], of_input(help="Completion of --prompt. Repeatable.")] = None,  # noqa: UP045
    html: Annotated[Optional[str], of_output(help="Write a self-contained HTML page to this file.")] = None,  # noqa: UP045
) -> None:
    """Colour every token by its reward, on the terminal or in a page (--html, or -o *.html)."""
    if not show_file(file, prompt, completion or (), html, flags):
        raise typer.Exit(BAD_INPUT)


@app.command(cls=OneProcess, epilog=help_text.PLOT)
@takes(RowFlags)
def plot(file: File, flags: RowFlags) -> None:
    """Plot the scores of FILE, scores against length, and rewards by position. Default --output: rewards.png."""
    if not plots.plot(file, flags):
        raise typer.Exit(BAD_INPUT)


@app.command(cls=OneProcess, epilog=help_text.DEMO)
@takes(ModelFlags)
def demo(flags: ModelFlags) -> None:
    """Show the reward at work: real text against corrupted text, right answers against wrong ones."""
    from .demo import show

    show(flags)


@app.command("serve", cls=OneProcess, epilog=help_text.SERVE)
@takes(ServeFlags)
def serve_model(flags: ServeFlags) -> None:
    """Answer requests for rewards over HTTP. Needs the extra `serve`."""
    from .serve import serve

    serve(flags)


@app.command("tune", cls=OneProcess, epilog=help_text.TUNE)
def tune_head(
    model: Annotated[Optional[str], of_head("--model", "-m", help="Tune the head of this model.")] = None,  # noqa: UP045
    shape: Annotated[Optional[str], of_head(metavar="D,V", help="Tune a head of this width and vocabulary.")] = None,  # noqa: UP045
    dtype: Annotated[
        str, of_head(help="float32, bfloat16 or float16. auto: the checkpoint's, or what is fastest here.")
    ] = "auto",
    device: Annotated[
        Optional[str], of_head(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.", callback=device_name)  # noqa: UP045
    ] = None,
    seconds: Annotated[
        float, of_head(help="Time to share among the candidates; their start takes about as much again.")
    ] = 30,
    show: Annotated[bool, of_output("--show", help="List what is stored, and whether auto uses it.")] = False,
) -> None:
    """Measure what computes a head fastest on this machine, and let impl="auto" take it."""
    from . import tune

    if show:
        if model is not None or shape is not None:
            raise EndoRewardError("--show lists every tuned head: leave --model and --shape out")
        return tune.show()
    tune.tune(model, shape, dtype, device, seconds)


@app.command(cls=OneProcess, epilog=help_text.DOCTOR)
def doctor(as_json: Annotated[bool, of_output("--json", help="Print JSON.")] = False) -> None:
    """Say what runs on this machine, whether its numbers are right, and how fast it is: for bug reports."""
    from .doctor import examine

    if not examine(as_json=as_json):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app(prog_name="endoreward")
