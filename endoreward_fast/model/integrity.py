"""Check that a checkpoint is complete, and that the model has read all of it."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import EndoRewardError

NOT_FETCHED = b"version https://git-lfs"
"""start of a file that Git LFS has not downloaded yet"""
TOKENIZER = ("tokenizer*", "*.model", "vocab*", "merges.txt", "spiece*")
READ_FROM = ("*.safetensors", "*.bin", *TOKENIZER, "*.json")


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a file of a model's folder, and what to do. None if all look complete."""
    for index in sorted(folder.glob("*.index.json")):
        for shard in _shards(index):
            if not (folder / shard).is_file():
                return f"{shard}, which {index.name} names, is not there: download the model again"
    for path in sorted({path for pattern in READ_FROM for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            start = file.read(len(NOT_FETCHED))
        if start == NOT_FETCHED:
            return f"{path.name} is a pointer of Git LFS, not the file: run `git lfs pull` in {folder}"
        if path.suffix == ".safetensors" and not _whole_safetensors(path):
            return f"{path.name} is cut short or damaged: download it again"
        if path.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short: download it again"
    return None


def _shards(index: Path) -> Iterator[str]:
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # transformers reports what is wrong with the index
    yield from sorted({str(file) for file in files})


def _whole_safetensors(path: Path) -> bool:
    """Return whether the file has the length that its header declares.

    The format is: 8 bytes with the length of the header, the header as JSON, the tensors at the offsets in the header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        if size < 8 or head + 8 > size:
            return False
        try:
            tensors = json.loads(file.read(head))
            ends = [about["data_offsets"][1] for name, about in tensors.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return size == 8 + head + max(ends, default=0)


def refuse_unknown_quantisation(config: Any) -> None:
    """Raise EndoRewardError if transformers does not know the checkpoint's method of quantisation.

    transformers would then read the quantised numbers as weights.
    """
    about = getattr(config, "quantization_config", None)
    if about is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    method = about.get("quant_method") if isinstance(about, Mapping) else about.quant_method
    if method is not None and str(getattr(method, "value", method)) not in (*KNOWN, "bitsandbytes"):
        raise EndoRewardError(
            f"its weights are quantised by {method!r}, which transformers does not know: take the model's unquantised "
            f"weights, or those of another method ({', '.join(sorted(KNOWN))})"
        )


def refuse_misread(model: nn.Module, info: Mapping[str, Any], *, quantised: bool) -> None:
    """Raise EndoRewardError if a layer of the model does not read one of its tensors in the checkpoint.

    Either the shapes differ, or the layer has no such parameter: the scale of quantised weights, or a bias that the
    config switches off. transformers only warns about the second, and the model's outputs are then wrong.
    """
    for key, there, here in sorted(info["mismatched_keys"]):
        raise EndoRewardError(f"{key!r} is {tuple(there)} in its checkpoint, but {tuple(here)} in the model")
    if quantised:
        return  # each method adds its own tensors
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    unread = sorted(key for key in info["unexpected_keys"] if key.rpartition(".")[0] in layers)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise EndoRewardError(
            f"its checkpoint holds {unread[0]!r}{more}, which the model does not read: config.json does not fit the "
            "checkpoint (weights that are quantised need their quantization_config there)"
        )


def why_no_tokenizer(folder: Path) -> str | None:
    """Return why a folder's tokenizer cannot be read. None if its files look complete, or if there is no folder."""
    if not folder.is_dir():
        return None
    if not any(path for pattern in TOKENIZER for path in folder.glob(pattern)):
        return "the folder holds no file of a tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...)"
    return fault_of(folder)
