"""Adapters as PEFT and TRL save them: weights that belong on top of a base model, which their folder only names."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import EndoRewardError, first_line
from .hub import OPTIONS, file_of

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""before the name of a module, in an adapter's file"""
PARTS = (".weight", ".base_layer.weight", ".original_module.weight")
"""of a table that is saved whole with an adapter"""


@dataclass(frozen=True)
class Adapter:
    """Where an adapter is, and what it belongs to."""

    name: str
    place: str
    """a folder, or a name on the Hub"""
    options: dict[str, Any]
    """where in it: those of hub.OPTIONS"""
    config: dict[str, Any]
    """what adapter_config.json says"""
    base: str | None
    """another place; None: a whole model lies in the same place"""

    @property
    def of_classifier(self) -> bool:
        return self.config.get("task_type") == "SEQ_CLS"

    def base_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of `options` that are meant for the base: it has a revision of its own, and no subfolder."""
        if self.base is None:
            return options
        kept = {key: value for key, value in options.items() if key not in ("subfolder", "revision")}
        revision = self.config.get("revision")
        if "revision" in (options.get("adapter_kwargs") or {}):  # transformers' way to name two revisions
            revision = options.get("revision", revision)
        return kept | ({"revision": revision} if revision else {})


def adapter_at(name: str, place: str, options: dict[str, Any]) -> Adapter | None:
    """The adapter that lies in `place`, or None. EndoRewardError: it names no base model, or is damaged."""
    if options.get("gguf_file"):
        return None
    where = {key: options[key] for key in OPTIONS if key in options} | dict(options.get("adapter_kwargs") or {})
    path = file_of(place, CONFIG, where)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise EndoRewardError(f"model {name!r}: its {CONFIG} cannot be read: {first_line(error)}") from error
    if file_of(place, "config.json", where) is not None:
        return Adapter(name, place, where, config, None)
    if not isinstance(base, str) or not base:
        raise EndoRewardError(f"model {name!r} is an adapter whose {CONFIG} names no base_model_name_or_path")
    return Adapter(name, place, where, config, _base(name, base, path.parent))


def _base(name: str, base: str, folder: Path) -> str:
    """The place of the base model: relative to the working directory, as PEFT takes it, or to the adapter's folder."""
    wanted = Path(base).expanduser()
    for path in (wanted, folder / base):
        if path.is_dir():
            if (path / CONFIG).is_file() and not (path / "config.json").is_file():
                raise EndoRewardError(
                    f"model {name!r} is an adapter of {base!r}, which is an adapter itself: merge that one into its "
                    "base first (PEFT's merge_and_unload)"
                )
            return str(path)
    if wanted.is_absolute() or base.startswith(".") or base.count("/") > 1:
        raise EndoRewardError(
            f"model {name!r} is an adapter of {base!r}, and there is no such folder: put the base model there, or "
            f"name it in {folder / CONFIG} as base_model_name_or_path"
        )
    return base


def attach(model: Any, adapter: Adapter, adapter_name: str) -> None:
    """Put the adapter into its base model. EndoRewardError: its weights do not fit, or some are absent.

    By PEFT itself: `load_adapter` of transformers 5.23 leaves DoRA's magnitudes at random.
    """
    from peft import PeftConfig, PeftModel

    where = f"adapter {adapter.name!r}" + (f" of {adapter.base!r}" if adapter.base else "")
    try:
        config = PeftConfig.from_pretrained(adapter.place, **adapter.options)
        if config.is_prompt_learning:
            raise EndoRewardError(
                f"{where} is a {config.peft_type.value}: it puts states before every row, not weights"
            )
        config.inference_mode = True
        shapes = _shapes(adapter)
        _fit_vocabulary(model, adapter, shapes)
        found = PeftModel(model, config, adapter_name).load_adapter(adapter.place, adapter_name, **adapter.options)
    except EndoRewardError as error:
        said = str(error)
        raise (error if said.startswith(where) else EndoRewardError(f"{where} does not fit: {said}")) from None
    except Exception as error:  # PEFT's and the base model's own, of any type
        raise EndoRewardError(f"{where} does not fit: {_what_differs(error)}") from error
    absent = sorted(found.missing_keys)
    # A table that was trained and resized is saved a second time, with modules_to_save in its name.
    unknown = sorted(
        key for key in found.unexpected_keys if key.replace(".modules_to_save.", ".") not in {*shapes} - {key}
    )
    if absent or unknown:
        fault = f"its file lacks {absent[0]!r}" if absent else f"the model has no {unknown[0]!r}"
        more = len(absent or unknown) - 1
        raise EndoRewardError(f"{where} does not fit: {fault}" + (f" and {more} more" if more else ""))


def _fit_vocabulary(model: Any, adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the base the vocabulary of an adapter that was trained after `resize_token_embeddings`.

    EndoRewardError: the adapter holds the new rows of one table, and not those of the other.
    """
    tables = {name: table for name, table in model.named_modules() if table in _tables(model)}
    rows = {name: shapes[key][0] for name in tables for part in PARTS if (key := f"{PREFIX}{name}{part}") in shapes}
    others = {count for name, count in rows.items() if count != tables[name].weight.shape[0]}
    if not others:
        return
    tied = len({id(table.weight) for table in tables.values()}) < len(tables)
    copied = {name.rpartition(".")[2] for name in rows} & set(adapter.config.get("modules_to_save") or ())
    if len(others) > 1 or (len(rows) < len(tables) and (copied or not tied)):
        held = ", ".join(f"{count} rows of {name!r}" for name, count in sorted(rows.items()))
        size = tables[min(rows)].weight.shape[0]
        raise EndoRewardError(
            f"it holds {held}, and the base has {size} of each of {', '.join(sorted(tables))}: save the adapter with "
            "save_embedding_layers=True, which keeps all of them"
        )
    model.resize_token_embeddings(others.pop(), mean_resizing=False)  # the adapter's rows are put over them


def _tables(model: Any) -> list[Any]:
    return [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Of the adapter's tensors, which are not read."""
    path = file_of(adapter.place, "adapter_model.safetensors", adapter.options)
    if path is not None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  it is no dict
    path = file_of(adapter.place, "adapter_model.bin", adapter.options)
    if path is None:
        return {}  # PEFT says so
    import torch

    return {key: tuple(x.shape) for key, x in torch.load(path, map_location="meta", weights_only=True).items()}


def _what_differs(error: BaseException) -> str:
    """torch names the weights whose shapes differ after a first line that says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line.startswith("size mismatch")), first_line(error))


def replaced_by_adapter(model: Any, parameter: str) -> bool:
    """Whether an adapter has its own copy of this parameter of the checkpoint: modules_to_save."""
    owner = parameter.rpartition(".")[0]
    return any(name == owner and hasattr(module, "original_module") for name, module in model.named_modules())


def refuse_without_peft(adapter: Adapter) -> None:
    """EndoRewardError if PEFT is not installed."""
    if find_spec("peft") is None:
        raise EndoRewardError(f"model {adapter.name!r} is an adapter, and peft is not installed: pip install peft")
