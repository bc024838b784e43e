"""Load a model and its tokenizer by name. Every error is one line that names the model."""

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import EndoRewardError, first_line
from .adapters import CONFIG, Adapter, adapter_at, attach, refuse_without_peft, replaced_by_adapter
from .checkpoint import located
from .devices import device_of, fastest_dtype
from .dtypes import DTYPES, FASTEST, dtype_name
from .gguf_files import refuse_without_readers, with_split
from .hub import OPTIONS, file_of
from .integrity import fault_of, refuse_misread, refuse_unknown_quantisation, why_no_tokenizer
from .kinds import CAUSAL, CLASSIFIER, Kind
from .processor import with_template_of_processor

SHARED = (*OPTIONS, "trust_remote_code", "code_revision", "gguf_file")
"""options that are also passed to the tokenizer"""


SPREAD = ("device_map", "tp_plan", "distributed_config")
"""options that place the parts of a model on devices"""


Dtype: TypeAlias = torch.dtype | str | None


Device: TypeAlias = torch.device | str | None


Loaded: TypeAlias = tuple[nn.Module, Any, str | None]


def load(name: str | PathLike[str], *, dtype: Dtype, device: Device, options: dict[str, Any]) -> Loaded:
    """Return (model, tokenizer or None, why there is no tokenizer). See `EndoRewardModel.from_pretrained`."""
    return _load(CAUSAL, str(name), dtype, device, options)


def load_classifier(name: str | PathLike[str], *, dtype: Dtype, device: Device, options: dict[str, Any]) -> Loaded:
    """Do the same as `load` for a sequence classifier with one output. See `RewardModel.from_pretrained`."""
    return _load(CLASSIFIER, str(name), dtype, device, options)


def refuse_other_models(causal: str | None, classifier: str | None) -> None:
    """Raise EndoRewardError unless the names stand for one model of each kind. Only configs are read, no weights."""
    for kind, name in ((CAUSAL, causal), (CLASSIFIER, classifier)):
        if name is not None:
            _find(kind, name, {"trust_remote_code": False})


def config_of(name: str) -> Any:
    """Return the config of a causal model, without reading its weights. Raises EndoRewardError as `load`."""
    return _find(CAUSAL, name, {"trust_remote_code": False}).config


@contextmanager
def naming(name: str | PathLike[str]) -> Iterator[None]:
    """Add the model's name to an EndoRewardError that is raised in the block."""
    try:
        yield
    except EndoRewardError as error:
        raise EndoRewardError(f"model {str(name)!r}: {error}") from error


@dataclass(frozen=True)
class _Found:
    """The place, config and base of a model, found before any weights are read."""

    place: str
    options: dict[str, Any]
    adapter: Adapter | None
    base: str
    base_options: dict[str, Any]
    config: Any


def _find(kind: Kind, name: str, options: dict[str, Any]) -> _Found:
    """Find the model that a name stands for. Raises EndoRewardError if it is not of this kind."""
    _refuse_gone(name, options)
    place, options = located(name, options)
    adapter = adapter_at(name, place, options)
    base, base_options = place, options
    if adapter is not None:
        refuse_without_peft(adapter)
        base, base_options = _base_of(adapter, kind, options)
    if "gguf_file" in base_options:
        refuse_without_readers(name)
    with _explained(name, adapter, Path(base, base_options.get("subfolder", ""))), _quiet():
        config = _config(base, base_options)
        refuse_unknown_quantisation(config)
        kind.refuse_other(config, name, adapter)
    return _Found(place, options, adapter, base, base_options, config)


def _load(kind: Kind, name: str, dtype: Dtype, device: Device, options: dict[str, Any]) -> Loaded:
    # If trust_remote_code is not set, transformers asks at the terminal whether to run the model's own code.
    wanted, options = _dtype(dtype, {"trust_remote_code": False} | options)
    spread = any(options.get(key) is not None for key in SPREAD)
    target = device_of(None if spread else device)  # raises before anything is read
    if wanted == FASTEST:
        wanted = fastest_dtype(target)
    found = _find(kind, name, options)
    options, adapter, base, base_options = found.options, found.adapter, found.base, found.base_options
    config = found.config
    with _explained(name, adapter, Path(base, base_options.get("subfolder", ""))), _quiet():
        model, absent = _weights(kind, base, base_options, config, wanted, device)
        if adapter is not None:
            attach(model, adapter, options.get("adapter_name", "default"))
            absent = [key for key in absent if not replaced_by_adapter(model, key)]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise EndoRewardError(f"{name!r} is not {kind.words}: its checkpoint lacks {absent[0]!r}{more}")
    model.eval()
    return model, *_tokenizer(adapter, found.place, options, base, base_options, config)


def _base_of(adapter: Adapter, kind: Kind, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the place and options of an adapter's base model."""
    if adapter.of_classifier and kind.auto == "AutoModelForCausalLM":
        raise EndoRewardError(f"model {adapter.name!r} is the adapter of a classifier, not of a causal language model")
    found = adapter.base_options(options)
    found = {key: value for key, value in found.items() if key not in ("adapter_kwargs", "adapter_name")}
    if adapter.of_classifier:
        found = {"num_labels": 1} | found  # the trained head has one output; a causal model's config does not say so
    if adapter.base is None:
        # Hide the adapter: transformers would load it with the model, and not report what the checkpoint lacks.
        return adapter.place, found | {"adapter_kwargs": {"subfolder": "no adapter here"}}
    try:
        return located(adapter.base, found)
    except EndoRewardError as error:
        raise EndoRewardError(
            f"model {adapter.name!r} is an adapter of {adapter.base!r}, and {error}; set base_model_name_or_path in "
            f"its {CONFIG} to the folder or the Hub name of the base model"
        ) from error


def _weights(
    kind: Kind, place: str, options: dict[str, Any], config: Any, dtype: torch.dtype | str, device: Device
) -> tuple[Any, list[str]]:
    """Return the model, and the names of the parameters that its checkpoint lacks."""
    import transformers

    options = dict(options) | {"ignore_mismatched_sizes": True}  # refuse_misread raises, and names them
    target = None if any(options.get(name) is not None for name in SPREAD) else device_of(device)
    quantised = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if target is not None and quantised:
        options["device_map"], target = {"": target}, None  # quantised weights are created on their device
    loaded: Any = getattr(transformers, kind.auto).from_pretrained(
        place, dtype=dtype, output_loading_info=True, **options
    )
    model, info = loaded
    refuse_misread(model, info, quantised=bool(quantised))
    absent = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    return model if target is None else model.to(target), absent


@contextmanager
def _explained(name: str, adapter: Adapter | None, folder: Path) -> Iterator[None]:
    """Turn any error that is raised in the block into an EndoRewardError of one line.

    File readers, quantisers and a model's own code may raise any type. `folder` is where the weights should be. It does
    not exist if they come from the Hub.
    """
    model = f"model {name!r}" if adapter is None or adapter.base is None else f"model {name!r} on {adapter.base!r}"
    try:
        yield
    except EndoRewardError as error:
        said = str(error)
        raise (error if name in said else EndoRewardError(f"{model} cannot be loaded: {said}")) from None
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and unknown:
            raise EndoRewardError(f"{model}: from_pretrained takes no option {unknown[1]!r} here") from error
        if "trust_remote_code=True" in str(error):
            raise EndoRewardError(
                f"{model} comes with its own code, which is not run by default: read it, then load the model with "
                "trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise EndoRewardError(f"{model} cannot be loaded: {fault_of(folder) or _said(error)}") from error


def _said(error: Exception) -> str:
    """Return the first line of another library's error, or a plainer line that says what to do."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"it needs the package {package!r}: pip install {package}"
    odd = re.search(r"Float8_(\w+)Storage", str(error))  # from torch.set_default_dtype
    if odd:
        return f"its weights are float8_{odd[1]}, which no model computes in: give dtype='bfloat16' (--dtype bf16)"
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bar for copying weights, and its table of missing weights, inside the block.

    Missing weights raise an error, or are not needed. Bars of downloads stay.
    """
    from transformers.utils import logging

    def without(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **kwargs | {"disable": True})

    def no_report(record: Any) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.get_logger("transformers.modeling_utils")
    logger.addFilter(no_report)
    before = logging.set_tqdm_hook(without)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # from PEFT
            yield
    finally:
        logging.set_tqdm_hook(before)
        logger.removeFilter(no_report)


def _refuse_gone(name: str, options: dict[str, Any]) -> None:
    """Raise EndoRewardError for options that transformers 5 has removed, with their replacement."""
    for option in ("load_in_8bit", "load_in_4bit"):
        if options.get(option) is not None:
            raise EndoRewardError(
                f"model {name!r}: transformers 5 has removed {option}: give "
                f"quantization_config=BitsAndBytesConfig({option}={options[option]})"
            )


def _config(place: str, options: dict[str, Any]) -> Any:
    """Return the model's config, with changes by options, as the auto classes read it."""
    from transformers import AutoConfig, PreTrainedConfig

    given = options.get("config")
    if isinstance(given, PreTrainedConfig):
        return given
    if given is not None:
        raise EndoRewardError(f"config is a {type(given).__name__}: expected a config of transformers")
    plain = {key: value for key, value in options.items() if key not in ("quantization_config", *SPREAD)}
    return AutoConfig.from_pretrained(place, return_unused_kwargs=True, **plain)[0]


def _tokenizer(
    adapter: Adapter | None, place: str, options: dict[str, Any], base: str, base_options: dict[str, Any], config: Any
) -> tuple[Any, str | None]:
    """Return (tokenizer or None, why there is none). It is an adapter's own, or else its base's."""
    from transformers import AutoTokenizer

    places: list[tuple[str, dict[str, Any]]] = [(base, base_options)]
    if adapter is not None and adapter.base is not None:
        places.insert(0, (place, options | adapter.options | {"config": config}))
    reason = None
    for where, asked in places:
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **_shared(asked))
            if "gguf_file" in asked and (path := file_of(where, asked["gguf_file"], _only(OPTIONS, asked))):
                tokenizer = with_split(tokenizer, path)
        except Exception as error:  # tokenizers raises plain Exception
            # Token ids can be scored without a tokenizer.
            reason = why_no_tokenizer(Path(where, asked.get("subfolder", ""))) or first_line(error)
        else:
            return with_template_of_processor(tokenizer, where, asked), None
    return None, reason


def _shared(options: dict[str, Any]) -> dict[str, Any]:
    return _only((*SHARED, "config"), options)


def _only(names: Collection[str], options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _dtype(dtype: Dtype, options: dict[str, Any]) -> tuple[torch.dtype | str, dict[str, Any]]:
    """Return (dtype, options without torch_dtype). torch_dtype is the older name of dtype."""
    older = options.get("torch_dtype")
    if older is not None and dtype is not None and _of(older) != _of(dtype):
        raise EndoRewardError(f"dtype {dtype!r} and torch_dtype {older!r}: give one of them")
    rest = {key: value for key, value in options.items() if key != "torch_dtype"}
    return _of(older if dtype is None else dtype), rest


def _of(dtype: Dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        if str(dtype).removeprefix("torch.") not in DTYPES:
            raise EndoRewardError(f"dtype {dtype}: expected {', '.join(DTYPES)}")
        return dtype
    if not isinstance(dtype, str | None):
        raise EndoRewardError(f"dtype is a {type(dtype).__name__}: expected {', '.join(DTYPES)}, or a torch.dtype")
    name = "auto" if dtype is None else dtype_name(dtype)
    return name if name in ("auto", FASTEST) else getattr(torch, name)
