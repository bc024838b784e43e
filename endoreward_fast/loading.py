"""A model's name -> the loaded model and its tokenizer, with one clear line for whatever can be wrong with the name."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from .errors import EndoRewardError

POCKET = "pocket"
OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
SHARED = ("revision", "trust_remote_code", "token", "cache_dir")  # options that the tokenizer takes as well
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def pocket_path() -> Path:
    """The folder of the embedded demonstration model, in Hugging Face's format."""
    return Path(__file__).parent / POCKET


def load(
    name_or_path: str, *, dtype: torch.dtype | str | None, device: torch.device | str | None, options: dict[str, Any]
) -> tuple[nn.Module, Any, str | None]:
    """(model, tokenizer or None, why there is no tokenizer). See `EndoRewardModel.from_pretrained`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    place = str(pocket_path()) if name_or_path == POCKET else str(name_or_path)
    shared = {k: v for k, v in options.items() if k in SHARED}
    target = None if "device_map" in options else _device(device)
    wanted = _dtype(dtype)
    _refuse_unless_causal(place, name_or_path, shared)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, output_loading_info=True, **options)
        model, info = loaded
        model = model if target is None else model.to(target)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise EndoRewardError(f"model {name_or_path!r} cannot be loaded: {_one_line(error)}") from error
    absent = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise EndoRewardError(
            f"{name_or_path!r} is not a causal language model: its checkpoint lacks {absent[0]!r}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
        )
    tokenizer, reason = _tokenizer(place, shared)
    model.eval()
    return model, tokenizer, reason


def _refuse_unless_causal(place: str, name: str, shared: dict[str, Any]) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = Path(place).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1):
        raise EndoRewardError(f"model {name!r}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(place, **shared)
    except (OSError, ValueError) as error:
        raise EndoRewardError(f"model {name!r} cannot be loaded: {_one_line(error)}") from error
    for architecture in getattr(config, "architectures", None) or ():
        if architecture.endswith(OTHER_TASKS):
            raise EndoRewardError(f"model {name!r} is a {architecture}, which is not a causal language model")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise EndoRewardError(f"model {name!r} is of type {config.model_type!r}, which is not a causal language model")


def _tokenizer(place: str, shared: dict[str, Any]) -> tuple[Any, str | None]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, **shared), None
    except (OSError, ValueError, ImportError, KeyError) as error:
        return None, _one_line(error)  # token ids can be scored all the same; text is refused with this reason


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
        raise EndoRewardError(f"device {str(device)!r} cannot be used: {_one_line(error)}") from error
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
