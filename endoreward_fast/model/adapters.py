"""Load adapters as PEFT and TRL save them: a folder of weights that names the base model they belong to."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import EndoRewardError, first_line
from .hub import OPTIONS, file_of

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""prefix of module names in an adapter's file"""
PARTS = (".weight", ".base_layer.weight", ".original_module.weight")
"""suffixes of an embedding table that is saved whole with an adapter"""


@dataclass(frozen=True)
class Adapter:
    """The place of an adapter, its config and its base model."""

    name: str
    place: str
    """a folder, or a name on the Hub"""
    options: dict[str, Any]
    """options of from_pretrained that locate it in that place (hub.OPTIONS)"""
    config: dict[str, Any]
    """the content of adapter_config.json"""
    base: str | None
    """folder or Hub name of the base model; None: a whole model is in the same place as the adapter"""

    @property
    def of_classifier(self) -> bool:
        """Whether the adapter was trained on a sequence classifier."""
        return self.config.get("task_type") == "SEQ_CLS"

    def base_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options for the base model: without the adapter's subfolder, and with the base's own revision."""
        if self.base is None:
            return options
        kept = {key: value for key, value in options.items() if key not in ("subfolder", "revision")}
        revision = self.config.get("revision")
        if "revision" in (options.get("adapter_kwargs") or {}):  # so transformers is given two revisions
            revision = options.get("revision", revision)
        return kept | ({"revision": revision} if revision else {})


def adapter_at(name: str, place: str, options: dict[str, Any]) -> Adapter | None:
    """Return the adapter in `place`, or None. Raises EndoRewardError if it is damaged or names no base model."""
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
        raise EndoRewardError(f"model {name!r} is an adapter whose {CONFIG} names no base_model_name_or_path: add it")
    return Adapter(name, place, where, config, _base(name, base, path.parent))


def _base(name: str, base: str, folder: Path) -> str:
    """Return the place of the base model.

    A folder is relative to the working directory, as in PEFT, or else to the adapter's folder.
    """
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
    """Put the adapter into its base model. Raises EndoRewardError if its weights do not fit or some are missing.

    PEFT does it, because `load_adapter` of transformers 5.23 leaves DoRA's magnitudes at random values.
    """
    from peft import PeftConfig, PeftModel

    where = f"adapter {adapter.name!r}" + (f" of {adapter.base!r}" if adapter.base else "")
    try:
        config = PeftConfig.from_pretrained(adapter.place, **adapter.options)
        if config.is_prompt_learning:
            raise EndoRewardError(
                f"{where} is a {config.peft_type.value}, which changes no weights: give a LoRA adapter, say"
            )
        config.inference_mode = True
        shapes = _shapes(adapter)
        _fit_vocabulary(model, adapter, shapes)
        found = PeftModel(model, config, adapter_name).load_adapter(adapter.place, adapter_name, **adapter.options)
    except EndoRewardError as error:
        said = str(error)
        raise (error if said.startswith(where) else EndoRewardError(f"{where} does not fit: {said}")) from None
    except Exception as error:  # PEFT and the base model's own code raise any type
        raise EndoRewardError(f"{where} does not fit: {_what_differs(error)}") from error
    absent = sorted(found.missing_keys)
    # PEFT saves a table that was trained and resized twice, once with modules_to_save in its name.
    unknown = sorted(
        key for key in found.unexpected_keys if key.replace(".modules_to_save.", ".") not in {*shapes} - {key}
    )
    if absent or unknown:
        fault = f"its file lacks {absent[0]!r}" if absent else f"the model has no {unknown[0]!r}"
        more = len(absent or unknown) - 1
        raise EndoRewardError(f"{where} does not fit: {fault}" + (f" and {more} more" if more else ""))


def _fit_vocabulary(model: Any, adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Resize the base model's vocabulary for an adapter that was trained after `resize_token_embeddings`.

    Raises EndoRewardError if the adapter holds the resized rows of one table but not of the other.
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
            f"it holds {held}, but the base has {size} of each of {', '.join(sorted(tables))}: save the adapter with "
            "save_embedding_layers=True, which keeps both tables"
        )
    model.resize_token_embeddings(others.pop(), mean_resizing=False)  # the adapter's rows replace the new ones


def _tables(model: Any) -> list[Any]:
    return [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the adapter's tensors, without reading them."""
    path = file_of(adapter.place, "adapter_model.safetensors", adapter.options)
    if path is not None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  not a dict
    path = file_of(adapter.place, "adapter_model.bin", adapter.options)
    if path is None:
        return {}  # PEFT reports the missing file
    import torch

    return {key: tuple(x.shape) for key, x in torch.load(path, map_location="meta", weights_only=True).items()}


def _what_differs(error: BaseException) -> str:
    """Return the line of a torch error that names a size mismatch, or else its first line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line.startswith("size mismatch")), first_line(error))


def replaced_by_adapter(model: Any, parameter: str) -> bool:
    """Return whether an adapter has its own copy of this parameter (PEFT's modules_to_save)."""
    owner = parameter.rpartition(".")[0]
    return any(name == owner and hasattr(module, "original_module") for name, module in model.named_modules())


def refuse_without_peft(adapter: Adapter) -> None:
    """Raise EndoRewardError if PEFT is not installed."""
    if find_spec("peft") is None:
        raise EndoRewardError(f"model {adapter.name!r} is an adapter, and peft is not installed: pip install peft")
