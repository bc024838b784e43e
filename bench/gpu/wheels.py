"""Carried wheels: installed into a temporary folder that only this run's processes see. No network is needed."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = "site-packages"  # quack takes functions of other folders for the user's, and then cannot be imported
READ_PTH = "import pathlib, site\n\nsite.addsitedir(str(pathlib.Path(__file__).parent))\n"


def install(wheels: Path, where: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Install all wheels of a folder below `where`. Return (environment for processes, {wheel: why it is not there}).

    One call of pip installs all, because some wheels share a folder. It names the first wheel that it refuses; the
    others are then tried again.
    """
    left, target = sorted(wheels.glob("*.whl")), where / FOLDER
    if not left:
        return {}, {str(wheels): "the folder has no wheel"}
    failed: dict[str, str] = {}
    while left and (reason := _pip(left, target)):
        refused = [wheel for wheel in left if wheel.name in reason] or left
        failed |= {wheel.name: reason for wheel in refused}
        left = [wheel for wheel in left if wheel not in refused]
    target.mkdir(parents=True, exist_ok=True)
    # Python does not read .pth files of folders on PYTHONPATH; nvidia-cutlass-dsl needs its own.
    (target / "sitecustomize.py").write_text(READ_PTH)
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path}, failed


def _pip(wheels: list[Path], target: Path) -> str | None:
    """Install wheels, without their requirements. Return pip's last line if it fails."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--upgrade", "--target", str(target)]
    done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return (lines[-1] if lines else f"pip exits with {done.returncode}") if done.returncode else None
