"""The machine that a measured time belongs to."""

import functools
import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

SOURCES = (("vocab", "*.py"), ("vocab", "*.cpp"), ("kernels", "*.py"))


@dataclass(frozen=True)
class Machine:
    """What a measured time depends on, besides the head."""

    device: str
    driver: str
    torch: str
    triton: str
    source: str
    """hash of vocab/ and kernels/"""


def machine_of(device: torch.device) -> Machine:
    """Describe the machine that a choice for this device is valid on."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, driver = f"{about.name}, {about.multi_processor_count} processors", driver_version()
    else:
        name, driver = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}", "-"
    return Machine(name, driver, str(torch.__version__), version_of("triton") or "-", source_hash())


def driver_version() -> str:
    """Return the version of the GPU's kernel driver; where Linux does not list it, the CUDA version that it supports.

    Does not start nvidia-smi, because `auto` asks in the first call of a process.
    """
    for module in ("nvidia", "amdgpu"):
        try:
            return Path(f"/sys/module/{module}/version").read_text().strip()
        except OSError:
            continue
    return f"CUDA {torch.version.cuda}, HIP {torch.version.hip}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def source_hash() -> str:
    """Return a hash of every file that a measured time may depend on."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for folder, pattern in SOURCES:
        for path in sorted((package / folder).glob(pattern)):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
