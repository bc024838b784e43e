"""The command line's flags, each declared once: a dataclass of them becomes parameters of every command."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, Optional, TypeVar, get_type_hints

import typer

from ..errors import EndoRewardError

REDUCTIONS = ("sum", "mean")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
TRUNCATE = ("prompt", "completion")
# The names of signals.SIGNALS and judges.JUDGES, here once more so that --help does not wait for torch.
LOG_RATIO = "log-ratio"
SIGNALS = (*("endogenous", "centred", "logprob", "mean-logprob", "entropy", "self-certainty", "probability"), LOG_RATIO)
JUDGES = ("verifier", "pointwise", "pairwise")
ALL = "all"
ENGINES = LOCAL, RAY = ("local", "ray")

Text = Optional[str]  # noqa: UP045  typer reads these at run time, in Python 3.10 too
Count = Optional[int]  # noqa: UP045
Switch = Optional[bool]  # noqa: UP045
Share = Optional[float]  # noqa: UP045


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how its rewards become a score."""

    model: Annotated[str, typer.Option(help="Name or folder of a causal language model; pocket is built in.")] = (
        "pocket"
    )
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16 or float64.")] = "auto"
    device: Annotated[Text, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")] = None
    alpha: Annotated[float, typer.Option(help="Soft-RL temperature.")] = 1.0
    reduction: Annotated[str, typer.Option(help="Token rewards to a score: sum or mean.")] = "sum"
    gamma: Annotated[float, typer.Option(help="Discount per token, at most 1.")] = 1.0
    floor: Annotated[float, typer.Option(help="Least weight that the discount leaves a token.")] = 0.0
    system: Annotated[Text, typer.Option(help="System prompt put before every row: it steers the reward.")] = None
    max_tokens_per_batch: Annotated[int, typer.Option(help="Tokens in a batch, padding included.")] = 8192
    chat: Annotated[
        Switch,
        typer.Option(
            "--chat/--no-chat", help="Insist on the chat template, or never use it; default: if there is one."
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; errors only.")] = False

    def check(self) -> None:
        """Raise EndoRewardError naming the flag whose value cannot work."""
        _one_of("--reduction", self.reduction, REDUCTIONS)
        _one_of("--dtype", self.dtype, DTYPES)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise EndoRewardError(f"--alpha must be above 0, got {self.alpha}")
        if not 0 < self.gamma <= 1:
            raise EndoRewardError(f"--gamma must be above 0 and at most 1, got {self.gamma}")
        if not (self.floor >= 0 and math.isfinite(self.floor)):
            raise EndoRewardError(f"--floor must be 0 or more, got {self.floor}")
        _at_least_one("--max-tokens-per-batch", self.max_tokens_per_batch)

    def described(self) -> str:
        """The model and what a score of it is: a title for what is drawn of them."""
        parts = [f"{self.model}: {self.reduction} of token rewards"]
        parts += [f"{name} {getattr(self, name):g}" for name in ("alpha", "gamma") if getattr(self, name) != 1]
        if self.floor:
            parts.append(f"floor {self.floor:g}")
        if self.system is not None:
            parts.append(f"system prompt {textwrap.shorten(self.system, 60, placeholder=' …')!r}")
        return ", ".join(parts)

    def scoring(self) -> dict[str, Any]:
        """What EndoRewardModel.iter_scores takes."""
        names = ("alpha", "reduction", "gamma", "floor", "system", "max_tokens_per_batch", "chat")
        return {name: getattr(self, name) for name in names}


UNSAID = ("output", "overwrite", "quiet", "strict")
"""fields that no number of a run depends on"""


@dataclass(frozen=True)
class RowFlags(ModelFlags):
    """And how files are read and results written."""

    max_length: Annotated[Count, typer.Option(help="Most tokens of prompt and completion; default: the model's.")] = (
        None
    )
    truncate: Annotated[Text, typer.Option(help="Cut over-long rows at the prompt or the completion.")] = None
    limit: Annotated[Count, typer.Option(help="Only the first so many rows of each file.")] = None
    output: Annotated[Text, typer.Option("--output", "-o", help="Write results here, not to standard output.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --output holds.")] = False
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be scored.")] = False

    def check(self) -> None:
        super().check()
        if self.truncate is not None:
            _one_of("--truncate", self.truncate, TRUNCATE)
        if self.max_length is not None:
            _at_least_one("--max-length", self.max_length)
        if self.limit is not None:
            _at_least_one("--limit", self.limit)

    def scoring(self) -> dict[str, Any]:
        return {**super().scoring(), "max_length": self.max_length, "truncate": self.truncate}

    def to_json(self) -> dict[str, Any]:
        """What the numbers of a run depend on: how it spoke and where it wrote is left out."""
        return {name: value for name, value in asdict(self).items() if name not in UNSAID}


@dataclass(frozen=True)
class EngineFlags(RowFlags):
    """And where rows are scored, and how they are known again. Scores do not depend on it."""

    engine: Annotated[str, typer.Option(help="local: this process, or the ranks of torchrun; ray: a Ray cluster.")] = (
        LOCAL
    )
    actors: Annotated[Count, typer.Option(help="Ray: models at work; default: one a GPU, else one a machine.")] = None
    gpus_per_actor: Annotated[Share, typer.Option(help="Ray: 0.5 puts two models on a GPU; default: 1, if any.")] = None
    cpus_per_actor: Annotated[float, typer.Option(help="Ray: cores of each.")] = 1.0
    id: Annotated[Text, typer.Option(help="Column by which --resume knows a row again; default: all of them.")] = None

    def check(self) -> None:
        super().check()
        _one_of("--engine", self.engine, ENGINES)
        if self.actors is not None:
            _at_least_one("--actors", self.actors)
        for flag, value in (("--gpus-per-actor", self.gpus_per_actor), ("--cpus-per-actor", self.cpus_per_actor)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise EndoRewardError(f"{flag} must be 0 or more, got {value}")
            if value is not None and value > 1 and value % 1:
                raise EndoRewardError(f"{flag} must be a whole number where it is above 1, got {value}")
        if self.engine == LOCAL and (self.actors is not None or self.gpus_per_actor is not None):
            raise EndoRewardError("--actors and --gpus-per-actor are for --engine ray")

    def to_json(self) -> dict[str, Any]:
        engine = {f.name for f in fields(EngineFlags)} - {f.name for f in fields(RowFlags)}
        return {name: value for name, value in super().to_json().items() if name not in engine}


@dataclass(frozen=True)
class EvalFlags(RowFlags):
    """And what the score is compared with."""

    signals: Annotated[
        Text, typer.Option(help=f"Compare intrinsic rewards of the same pass: all, or some of {', '.join(SIGNALS)}.")
    ] = None
    reference_model: Annotated[Text, typer.Option(help=f"Second model of the same tokenizer, for {LOG_RATIO}.")] = None
    reward_model: Annotated[Text, typer.Option(help="Compare a trained reward model: a sequence classifier.")] = None
    judge: Annotated[
        Text, typer.Option(help=f"Compare the model as its own judge: all, or some of {', '.join(JUDGES)}.")
    ] = None

    def check(self) -> None:
        super().check()
        wanted = _names("--signals", self.signals, SIGNALS)
        _names("--judge", self.judge, JUDGES)
        if LOG_RATIO in wanted and self.signals != ALL and not self.reference_model:
            raise EndoRewardError(f"--signals {LOG_RATIO} compares two models: name the second by --reference-model")
        if self.reference_model and LOG_RATIO not in wanted:
            raise EndoRewardError(f"--reference-model is for --signals {LOG_RATIO} (or {ALL})")

    @property
    def judges(self) -> tuple[str, ...]:
        return _names("--judge", self.judge, JUDGES)

    @property
    def compared(self) -> tuple[str, ...]:
        """Signals to compare; the endogenous reward beside rivals, if nothing else is asked for."""
        wanted = _names("--signals", self.signals, SIGNALS)
        if not wanted and (self.judge or self.reward_model):
            return SIGNALS[:1]
        return wanted if self.reference_model else tuple(name for name in wanted if name != LOG_RATIO)

    @property
    def left_out(self) -> str | None:
        """Why a signal that --signals all means is not there."""
        if self.signals == ALL and not self.reference_model:
            return f"{LOG_RATIO} is left out: it compares two models, and there is no --reference-model"
        return None

    def to_json(self) -> dict[str, Any]:
        new = [f.name for f in fields(EvalFlags) if f.name not in {g.name for g in fields(RowFlags)}]
        return {name: value for name, value in super().to_json().items() if name not in new or value is not None}


def _names(flag: str, text: str | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a text with commas; all of them for "all", none for None. EndoRewardError for any other."""
    if text is None or text == ALL:
        return allowed if text else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in allowed:
            raise EndoRewardError(f"{flag} must be {ALL}, or some of {', '.join(allowed)}, got {name!r}")
    return names


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise EndoRewardError(f"{flag} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise EndoRewardError(f"{flag} must be 1 or more, got {value}")


F = TypeVar("F", bound=ModelFlags)


def takes(flags: type[F]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with a parameter `flags`: on the command line it is the dataclass's fields."""
    hints = get_type_hints(flags, include_extras=True)
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=f.default)
        for f in fields(flags)
        if f.default is not MISSING
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(command, include_extras=True)
        before = [
            p.replace(annotation=own[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.name != "flags"
        ]

        def run(**values: Any) -> None:
            given = flags(**{p.name: values.pop(p.name) for p in parameters})
            given.check()
            command(**values, flags=given)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__signature__ = inspect.Signature([*before, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*before, *parameters)}
        return run

    return decorate
