"""The arguments of the methods that take rows: their options by name, for type checkers and editors, and the refusal of
what is not a list of rows."""

from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ..errors import EndoRewardError
from ..text.encoding import Truncate
from ..text.rows import Row

if TYPE_CHECKING:
    import torch

    from .scorer import Scorer


class ScoreKwargs(TypedDict, total=False):
    """The fields of `ScoreOptions`, which says what each means, as keyword arguments."""

    alpha: float
    reduction: Literal["sum", "mean"]
    gamma: float
    floor: float
    system: str | None
    chat: bool | None
    max_length: int | None
    truncate: Truncate
    append_eos: bool
    max_tokens_per_batch: int
    per_token: bool
    texts: bool
    entropy: bool
    signals: str | Sequence[str]
    reference: "Scorer | None"
    tools: Sequence[Any] | None
    documents: Sequence[Mapping[str, str]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    date: str | None


class LoadKwargs(TypedDict, total=False):
    """What `from_pretrained` of transformers takes besides the name, dtype and device.

    Fields of the model's config can be set by name as well: a type checker does not know them, from_pretrained does.
    """

    revision: str
    subfolder: str
    variant: str | None
    gguf_file: str | None
    trust_remote_code: bool
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    use_safetensors: bool | None
    config: Any
    attn_implementation: str | None
    device_map: "str | int | torch.device | Mapping[str, int | str | torch.device] | None"
    max_memory: Mapping[int | str, int | str] | None
    offload_folder: str | Path | None
    offload_buffers: bool
    offload_state_dict: bool
    low_cpu_mem_usage: bool
    quantization_config: Any
    tp_plan: str | None
    tp_size: str | None
    device_mesh: Any
    distributed_config: Any
    adapter_kwargs: dict[str, Any] | None


ROWS = 'a list of rows such as {"prompt": ..., "completion": ...}'
TO_ROWS = (("to_dicts", "to_dicts()"), ("to_pylist", "to_pylist()"), ("to_records", 'to_dict("records")'))
"""a table's method, and the call that makes rows of it: polars, pyarrow, pandas"""


OTHERWISE_CALLED = MappingProxyType(
    {"temperature": "alpha", "discount": "gamma", "system_prompt": "system", "batch_size": "max_tokens_per_batch"}
)
"""what options of scoring are called elsewhere"""


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """EndoRewardError for an option that no one reads, with the nearest that there is."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name, [*known, *OTHERWISE_CALLED], 1)
            hint = (
                f"did you mean {OTHERWISE_CALLED.get(near[0], near[0])!r}?"
                if near
                else f"expected some of {', '.join(known)}"
            )
            raise EndoRewardError(f"no option {name!r}: {hint}")


def refuse_misspelt(given: Iterable[str], known: Iterable[str]) -> None:
    """As `refuse_unknown`, but an unknown option passes unless a known one is nearly it."""
    known = list(known)
    refuse_unknown((name for name in given if get_close_matches(name, known, 1, cutoff=0.8)), known)


def list_of_rows(rows: Iterable[Row]) -> list[Row]:
    """`rows` as a list. EndoRewardError for a text, one row by itself, a table, or a list that holds no row at all.

    One bad row among others passes: it becomes an error of that row.
    """
    call = next((call for method, call in TO_ROWS if hasattr(rows, method) and hasattr(rows, "shape")), None)
    if call is not None:
        raise EndoRewardError(f"rows is a {type(rows).__name__}: expected {ROWS}; rows.{call} makes one")
    if isinstance(rows, Mapping):
        raise EndoRewardError(f"rows is one {type(rows).__name__}: expected {ROWS}; [row] for a single one")
    listed: list[Row] = _listed("rows", rows, ROWS)
    if listed and not any(isinstance(row, Mapping) for row in listed):
        raise EndoRewardError(f"rows holds {type(listed[0]).__name__}, not rows: expected {ROWS}")
    return listed


def list_of_completions(completions: Iterable[Any]) -> list[Any]:
    """`completions` as a list. EndoRewardError for a text, whose letters would be ranked, and for none at all."""
    expected = 'a list of completions such as ["5", "6"]'
    if isinstance(completions, Mapping):
        raise EndoRewardError(f"completions is one {type(completions).__name__}: expected {expected}")
    if isinstance(completions, Set):
        raise EndoRewardError(f"completions is a {type(completions).__name__}, which has no order: expected {expected}")
    listed = _listed("completions", completions, expected)
    if not listed:
        raise EndoRewardError(f"completions is empty: expected {expected}")
    return listed


def refuse_no_name(owner: type, name: Any) -> None:
    """EndoRewardError where something else stands for a model's name: a loaded model, a configuration, None."""
    from torch import nn

    if isinstance(name, str | PathLike):
        return
    loaded = f"; {owner.__name__}(model, tokenizer) takes a loaded model" if isinstance(name, nn.Module) else ""
    raise EndoRewardError(f"name_or_path is a {_kind(name)}: expected a folder, a Hub name or a GGUF file{loaded}")


def refuse_name(owner: type, model: Any, tokenizer: Any) -> None:
    """EndoRewardError where a name stands for a loaded model or tokenizer, or something else for either."""
    from torch import nn

    name = owner.__name__
    if isinstance(model, str | Path):
        raise EndoRewardError(f"{name} takes a loaded model, not its name: {name}.from_pretrained({str(model)!r})")
    if not isinstance(model, nn.Module) or isinstance(model, owner):
        is_ours = "already is one" if isinstance(model, owner) else "expected a loaded model (a torch.nn.Module)"
        raise EndoRewardError(f"model is a {_kind(model)}: {is_ours}; {name}.from_pretrained(NAME) loads one")
    if isinstance(tokenizer, str | Path):
        load = f"transformers.AutoTokenizer.from_pretrained({str(tokenizer)!r})"
        raise EndoRewardError(f"{name} takes a loaded tokenizer, not its name: {load}")
    if getattr(tokenizer, "tokenizer", None) is not None:
        raise EndoRewardError(
            f"tokenizer is a {_kind(tokenizer)}: give its .tokenizer, with the chat_template that it has"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise EndoRewardError(f"tokenizer is a {_kind(tokenizer)}: expected a tokenizer of transformers")


def _kind(x: Any) -> str:
    return f"class {x.__name__}" if isinstance(x, type) else type(x).__name__


def _listed(name: str, given: Any, expected: str) -> list[Any]:
    if isinstance(given, str | bytes | bytearray) or not isinstance(given, Iterable):
        raise EndoRewardError(f"{name} is a {type(given).__name__}: expected {expected}")
    return list(given)
