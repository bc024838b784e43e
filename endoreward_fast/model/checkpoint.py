"""Find the model that a name stands for: a folder, a GGUF file, a model on the Hub, of a package, or the embedded one.

This module does not import torch.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from ..errors import EndoRewardError
from .adapters import adapter_at
from .gguf_files import MAGIC
from .hub import commit_of, reachable, refuse_no_hub_name
from .packaged import PACKAGED, folder_of, source_of

POCKET = "pocket"
URLS = ("http://", "https://")
FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "*.index.json", "*.py", "*.model", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip
"""files of a model's folder that can change a score, besides its weights"""
WEIGHTS = ("*.safetensors", "*.bin")
"""weights of a folder, unless a GGUF file in it is read"""
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
"""files that trainers save beside the weights"""
SAMPLES, SAMPLE = 64, 4096
"""number of pieces of each file that are hashed, and their size in bytes; to read all weights could take longer than
to score"""


def pocket_path() -> Path:
    """Return the folder of the embedded demonstration model, in Hugging Face's format."""
    return Path(__file__).parents[1] / POCKET


def on_this_machine(name: str) -> bool:
    """Return whether a name stands for a local folder or GGUF file. Raises EndoRewardError if no model has it."""
    if name in PACKAGED:
        return source_of(name).is_file()
    return (name != POCKET and _is_gguf(_path(name))) or os.path.isdir(place_of(name))


def place_of(name: str) -> str:
    """Return the folder that `name` stands for, or else its name on the Hub. EndoRewardError if it can be neither.

    A model of a package is converted into a folder, once.
    """
    if name in PACKAGED:
        return str(folder_of(name))
    if not name.strip():
        raise EndoRewardError("the model's name is empty: give a folder, a name on the Hub or a GGUF file")
    if name.lower().startswith(URLS):
        raise EndoRewardError(
            "a model is not loaded from a URL. To ask a server: endoreward_fast.RemoteModel(URL), or "
            "`endoreward score FILE --engine http --url URL`. A model on the Hub has a name, such as owner/model"
        )
    folder = pocket_path() if name == POCKET else _path(name)
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise EndoRewardError(f"model {name!r} is a file, but not a GGUF file: name the folder that holds it")
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or folder.suffix == ".gguf":
        kind = "file" if folder.suffix == ".gguf" else "folder"
        raise EndoRewardError(f"model {name!r}: there is no such {kind}")
    refuse_no_hub_name(name, (POCKET, *PACKAGED))
    return name


def located(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (place, options) of a model. For the path of a GGUF file these are its folder and `gguf_file`.

    Raises EndoRewardError if there is no such folder, subfolder or file, or if the Hub cannot be reached for it.
    """
    options = {key: value for key, value in options.items() if value is not None and value != ""}
    for key in ("revision", "subfolder", "gguf_file"):
        if not isinstance(options.get(key, ""), str | os.PathLike):
            raise EndoRewardError(f"model {name!r}: {key} is a {type(options[key]).__name__}: expected text")
        options |= {key: os.fspath(options[key])} if key in options else {}
    path = _path(name)
    if name not in (POCKET, *PACKAGED) and _is_gguf(path):
        if "gguf_file" in options:
            raise EndoRewardError(f"model {name!r} is a GGUF file, with no gguf_file inside: leave gguf_file out")
        return os.path.abspath(path.parent), options | {"gguf_file": path.name}
    place = place_of(name)
    if not os.path.isdir(place):
        return place, reachable(place, options)
    inside = Path(place, options.get("subfolder", ""))
    if not inside.is_dir():
        raise EndoRewardError(f"model {name!r}: there is no folder {options['subfolder']!r} in it")
    if "gguf_file" in options:
        file = inside / options["gguf_file"]
        if not file.is_file():
            raise EndoRewardError(f"model {name!r}: there is no file {options['gguf_file']!r} in it")
        if not _is_gguf(file):
            raise EndoRewardError(f"model {name!r}: {options['gguf_file']!r} is not a GGUF file: name one")
    return os.path.abspath(place), options  # absolute, because transformers does not find a subfolder of "."


def weights_of(name: str, **options: Any) -> str:
    """Return an identifier of the model's weights: the commit on the Hub, or a hash of the folder's files.

    The hash covers each file's name, size and SAMPLES pieces, but not where the folder is. An adapter's identifier
    includes its base's. `options` are those of EndoRewardModel.from_pretrained: revision, subfolder, gguf_file, ...

    Raises EndoRewardError if there is no such model.
    """
    if name in PACKAGED:
        source_of(name)
        return PACKAGED[name].weights
    place, options = located(name, options)
    if os.path.isdir(place):
        found = _hash_of(Path(place, options.get("subfolder", "")), options.get("gguf_file"))
    else:
        parts = [options[key] for key in ("subfolder", "gguf_file") if key in options]
        found = " ".join(["commit", commit_of(place, options, options.get("gguf_file", "")), *parts])
    adapter = adapter_at(name, place, options)
    if adapter is None or adapter.base is None:
        return found
    return f"{found} on {weights_of(adapter.base, **adapter.base_options(options))}"


def _hash_of(folder: Path, gguf_file: str | None) -> str:
    patterns = (*FILES, *(WEIGHTS if gguf_file is None else (gguf_file,)))
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        if path.name not in NO_WEIGHTS:
            found.update(f"{path.name} {path.stat().st_size}\n".encode())
            _add_pieces(path, found)
    return f"sha256 {found.hexdigest()[:32]}"


def _add_pieces(path: Path, found: "hashlib._Hash") -> None:
    size = path.stat().st_size
    step = max(SAMPLE, -(-size // SAMPLES))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            found.update(file.read(SAMPLE))


def _path(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home
        raise EndoRewardError(f"model {name[:80]!r}: not a path: {error}") from error
    return path


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise EndoRewardError(f"cannot read {path}: {error.strerror}") from None
