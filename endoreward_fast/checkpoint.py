"""What a model's name stands for: a folder, the Hub, or the model that is built in. Torch is not needed to know."""

import hashlib
import os
from pathlib import Path

from .errors import EndoRewardError

POCKET = "pocket"
FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "*.index.json", "*.py", "*.safetensors", "*.bin",
    "*.model", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip
"""those of a folder that scores depend on"""
SAMPLES, SAMPLE = 64, 4096
"""pieces of each file that are hashed, and their bytes: to read terabytes of weights would take longer than to score"""


def pocket_path() -> Path:
    """The folder of the embedded demonstration model, in Hugging Face's format."""
    return Path(__file__).parent / POCKET


def place_of(name: str) -> str:
    """The folder that `name` stands for, or else its name on the Hub. EndoRewardError: a folder that is not there."""
    folder = pocket_path() if name == POCKET else Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise EndoRewardError(f"model {name!r}: there is no such folder")
    return name


def weights_of(name: str) -> str:
    """A hash of the model: of its folder's files, wherever that lies; from the Hub, the commit.

    Files go in by name, size and SAMPLES pieces. Raises EndoRewardError: there is no such model.
    """
    place = place_of(name)
    if not os.path.isdir(place):
        return f"commit {_commit(place)}"
    found = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in Path(place).glob(pattern) if path.is_file()}):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        _add_pieces(path, found)
    return f"sha256 {found.hexdigest()[:32]}"


def _commit(name: str) -> str:
    from transformers.utils import cached_file

    try:
        config = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise EndoRewardError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    return Path(str(config)).parent.name  # the cache has a folder for every commit


def _add_pieces(path: Path, found: "hashlib._Hash") -> None:
    size = path.stat().st_size
    step = max(SAMPLE, -(-size // SAMPLES))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            found.update(file.read(SAMPLE))


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its name."""
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
