"""Check the arguments of the methods that take rows, and type their options for type checkers and editors."""

from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ..errors import EndoRewardError
from ..text.encoding import Encoded, Truncate
from ..text.rows import Row

if TYPE_CHECKING:
    import torch

    from .scorer import Scorer


class ScoreKwargs(TypedDict, total=False):
    """The fields of `ScoreOptions` as keyword arguments. `ScoreOptions` documents them."""

    alpha: float
    reduction: Literal["sum", "mean"]
    gamma: float
    floor: float
    system: str | None
    chat: bool | None
    max_length: int | None
    truncate: Truncate
    append_eos: bool
    max_tokens_per_batch: int | None
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
    """The keyword arguments of transformers' `from_pretrained`, besides the name, dtype and device.

    from_pretrained also accepts any field of the model's config. A type checker does not know those.
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
"""(method that identifies a table, call that converts it to rows): polars, pyarrow, pandas"""


OTHER_NAMES = MappingProxyType(
    {"temperature": "alpha", "discount": "gamma", "system_prompt": "system", "batch_size": "max_tokens_per_batch"}
)
"""{another library's name for a scoring option: our name}"""


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise EndoRewardError for a name in `given` that is not `known`, with the most similar known name."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name, [*known, *OTHER_NAMES], 1)
            hint = (
                f"did you mean {OTHER_NAMES.get(near[0], near[0])!r}?"
                if near
                else f"expected one of {', '.join(known)}"
            )
            raise EndoRewardError(f"no option {name!r}: {hint}")


def refuse_misspelt(given: Iterable[str], known: Iterable[str]) -> None:
    """Do as `refuse_unknown` for names that are similar to a known one. Other unknown names pass."""
    known = list(known)
    refuse_unknown((name for name in given if get_close_matches(name, known, 1, cutoff=0.8)), known)


def list_of_rows(rows: Iterable[Row]) -> list[Row]:
    """Return `rows` as a list.

    Raises EndoRewardError for a string, a single row, a table, or a list without any row. A bad entry among rows
    passes, and becomes an error of that entry when it is scored.
    """
    call = next((call for method, call in TO_ROWS if hasattr(rows, method) and hasattr(rows, "shape")), None)
    if call is not None:
        raise EndoRewardError(f"rows is a {type(rows).__name__}: expected {ROWS}; rows.{call} converts it")
    if isinstance(rows, Mapping):
        raise EndoRewardError(f"rows is one {type(rows).__name__}: expected {ROWS}; for a single row, give [row]")
    listed: list[Row] = _listed("rows", rows, ROWS)
    if listed and not any(isinstance(row, Mapping | Encoded) or hasattr(row, "error") for row in listed):
        raise EndoRewardError(f"rows holds {type(listed[0]).__name__}, not rows: expected {ROWS}")
    return listed


def list_of_completions(completions: Iterable[Any]) -> list[Any]:
    """Return `completions` as a list.

    Raises EndoRewardError for a string (its letters would be ranked), a mapping, a set and an empty list.
    """
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
    """Raise EndoRewardError unless `name` is a string or path: a loaded model, a config or None, for example."""
    from torch import nn

    if isinstance(name, str | PathLike):
        return
    loaded = f"; {owner.__name__}(model, tokenizer) takes a loaded model" if isinstance(name, nn.Module) else ""
    raise EndoRewardError(f"name_or_path is a {_kind(name)}: expected a folder, a Hub name or a GGUF file{loaded}")


def refuse_name(owner: type, model: Any, tokenizer: Any) -> None:
    """Raise EndoRewardError unless `model` is a loaded model, and `tokenizer` a loaded tokenizer or None."""
    from torch import nn

    name = owner.__name__
    if isinstance(model, str | Path):
        raise EndoRewardError(f"{name} takes a loaded model, not its name: use {name}.from_pretrained({str(model)!r})")
    if not isinstance(model, nn.Module) or isinstance(model, owner):
        is_ours = "already is one" if isinstance(model, owner) else "expected a loaded model (a torch.nn.Module)"
        raise EndoRewardError(f"model is a {_kind(model)}: {is_ours}; {name}.from_pretrained(NAME) loads one")
    if isinstance(tokenizer, str | Path):
        load = f"transformers.AutoTokenizer.from_pretrained({str(tokenizer)!r})"
        raise EndoRewardError(f"{name} takes a loaded tokenizer, not its name: load it with {load}")
    if getattr(tokenizer, "tokenizer", None) is not None:
        raise EndoRewardError(
            f"tokenizer is a {_kind(tokenizer)}: give its .tokenizer, and copy its chat_template there"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise EndoRewardError(f"tokenizer is a {_kind(tokenizer)}: expected a tokenizer from transformers")


def _kind(x: Any) -> str:
    return f"class {x.__name__}" if isinstance(x, type) else type(x).__name__


def _listed(name: str, given: Any, expected: str) -> list[Any]:
    if isinstance(given, str | bytes | bytearray) or not isinstance(given, Iterable):
        raise EndoRewardError(f"{name} is a {type(given).__name__}: expected {expected}")
    return list(given)
