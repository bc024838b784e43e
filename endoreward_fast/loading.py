"""A model's name -> the loaded model and its tokenizer, with one clear line for whatever can be wrong with the name."""

from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from .checkpoint import first_line, place_of
from .errors import EndoRewardError

OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
SHARED = ("revision", "trust_remote_code", "token", "cache_dir")  # options that the tokenizer takes as well
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load(
    name_or_path: str, *, dtype: torch.dtype | str | None, device: torch.device | str | None, options: dict[str, Any]
) -> tuple[nn.Module, Any, str | None]:
    """(model, tokenizer or None, why there is no tokenizer). See `EndoRewardModel.from_pretrained`."""
    from transformers import AutoModelForCausalLM

    place = place_of(str(name_or_path))
    _refuse_unless_causal(_config(place, name_or_path, options), name_or_path)
    return _loaded(AutoModelForCausalLM, "a causal language model", place, name_or_path, dtype, device, options)


def load_classifier(
    name_or_path: str, *, dtype: torch.dtype | str | None, device: torch.device | str | None, options: dict[str, Any]
) -> tuple[nn.Module, Any, str | None]:
    """As `load`, a sequence classifier with one output. See `judges.RewardModel.from_pretrained`."""
    from transformers import AutoModelForSequenceClassification

    place = place_of(str(name_or_path))
    _refuse_unless_reward_model(_config(place, name_or_path, options), name_or_path)
    return _loaded(AutoModelForSequenceClassification, "a reward model", place, name_or_path, dtype, device, options)


def refuse_other_than_one_output(config: Any, name: str) -> None:
    """EndoRewardError unless the classifier gives one number."""
    if config.num_labels != 1:
        labels = ", ".join(map(str, list(config.id2label.values())[:4]))
        raise EndoRewardError(f"{name} has {config.num_labels} outputs ({labels}): a reward model has one")


def _loaded(
    auto: Any, kind: str, place: str, name: str, dtype: torch.dtype | str | None, device: torch.device | str | None,
    options: dict[str, Any],
) -> tuple[nn.Module, Any, str | None]:  # fmt: skip
    from safetensors import SafetensorError

    target = None if "device_map" in options else _device(device)
    wanted = _dtype(dtype)
    try:
        loaded: Any = auto.from_pretrained(place, dtype=wanted, output_loading_info=True, **options)
        model, info = loaded
        model = model if target is None else model.to(target)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise EndoRewardError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    absent = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise EndoRewardError(
            f"{name!r} is not {kind}: its checkpoint lacks {absent[0]!r}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
        )
    tokenizer, reason = _tokenizer(place, _shared(options))
    model.eval()
    return model, tokenizer, reason


def _shared(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in SHARED}


def _config(place: str, name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, **_shared(options))
    except (OSError, ValueError) as error:
        raise EndoRewardError(f"model {name!r} cannot be loaded: {first_line(error)}") from error


def _refuse_unless_causal(config: Any, name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    for architecture in getattr(config, "architectures", None) or ():
        if architecture.endswith(OTHER_TASKS):
            raise EndoRewardError(f"model {name!r} is a {architecture}, which is not a causal language model")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise EndoRewardError(f"model {name!r} is of type {config.model_type!r}, which is not a causal language model")


def _refuse_unless_reward_model(config: Any, name: str) -> None:
    architectures = getattr(config, "architectures", None) or ()
    remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if architectures and not remote and not any(a.endswith("ForSequenceClassification") for a in architectures):
        raise EndoRewardError(
            f"model {name!r} is a {architectures[0]}, which is not a reward model (a sequence classifier)"
        )
    refuse_other_than_one_output(config, f"model {name!r}")


def _tokenizer(place: str, shared: dict[str, Any]) -> tuple[Any, str | None]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, **shared), None
    except (OSError, ValueError, ImportError, KeyError) as error:
        return None, first_line(error)  # token ids can be scored all the same; text is refused with this reason


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return "auto" if dtype is None else dtype
    if dtype not in DTYPES:
        raise EndoRewardError(f"dtype {dtype!r}: expected {', '.join(DTYPES)}")
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise EndoRewardError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
    return found
