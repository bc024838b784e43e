"""Adapters as PEFT and TRL save them: weights that belong on top of a base model, which their folder only names."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import EndoRewardError, first_line
from .hub import OPTIONS, file_of

CONFIG = "adapter_config.json"


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
        found = PeftModel(model, config, adapter_name).load_adapter(adapter.place, adapter_name, **adapter.options)
    except EndoRewardError:
        raise
    except Exception as error:  # PEFT's and the base model's own, of any type
        raise EndoRewardError(f"{where} does not fit: {_what_differs(error)}") from error
    absent, unknown = sorted(found.missing_keys), sorted(found.unexpected_keys)
    if absent or unknown:
        fault = f"its file lacks {absent[0]!r}" if absent else f"the model has no {unknown[0]!r}"
        more = len(absent or unknown) - 1
        raise EndoRewardError(f"{where} does not fit: {fault}" + (f" and {more} more" if more else ""))


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
        raise EndoRewardError(
            f"model {adapter.name!r} is an adapter, and peft is not installed: pip install peft (the extra [peft])"
        )
