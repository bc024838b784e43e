"""Build the sdist and the wheel, and use both as someone would who has nothing but them. What passes goes into dist/.

    python tools/check_package.py

The wheel goes into a new environment outside the repository, is imported there and scores with the embedded model; the
sdist is unpacked and some of its tests are run. The packages that these need are lent by the Python that runs this.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A handful that is done in seconds, and reads most of the folders.
TESTS = (
    "tests/test_layers.py",
    "tests/test_packaging.py",
    "tests/vocab/test_reference.py",
    "tests/scoring/test_batching.py",
)
USE = """
import sys, torch, endoreward_fast
from endoreward_fast import EndoRewardModel, vocab_stats
assert endoreward_fast.__file__.startswith(sys.prefix), endoreward_fast.__file__
rows = [{"prompt": "Question: What is 2 + 3?\\nAnswer:", "completion": answer} for answer in (" 5", " 7")]
right, wrong = EndoRewardModel.from_pretrained("pocket").score(rows)
assert right.score > wrong.score, (right, wrong)
logits, targets = torch.randn(3, 5000), torch.tensor([0, 70, 4999])
ours, oracle = (vocab_stats(logits, targets, entropy=True, impl=impl) for impl in ("fused", "reference"))
for one, other in zip(ours[:3], oracle[:3]):
    torch.testing.assert_close(one, other)
print("the wheel scores:", right.score, wrong.score)
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Outside of this checkout: no PYTHONPATH leads back to it."""
    print("+", *(str(word) if "\n" not in str(word) else "..." for word in command), flush=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, cwd=cwd, check=True, env=clean | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


def tracked(*folders: str) -> set[str]:
    """Files under git; a symlink is none."""
    listed = subprocess.run(["git", "ls-files", "-s", *folders], cwd=ROOT, check=True, capture_output=True, text=True)
    lines = [line.split("\t") for line in listed.stdout.splitlines()]
    return {name for about, name in lines if not about.startswith("120000")}


def build(dist: Path) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel from the sdist."""
    dist.mkdir()
    run(sys.executable, "-m", "build", "--quiet", "--outdir", dist, ROOT, cwd=dist)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every file under git is in the sdist, and every one of the package in the wheel."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    forgotten = tracked() - inside - {".gitignore"}
    assert not forgotten, f"not in the sdist, see MANIFEST.in: {sorted(forgotten)}"
    package = {name.replace("kernels/", "endoreward_fast/kernels/", 1) for name in tracked("kernels")}
    forgotten = (tracked("endoreward_fast") | package) - set(zipfile.ZipFile(wheel).namelist())
    assert not forgotten, f"not in the wheel, see setup.py: {sorted(forgotten)}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        sdist, wheel = build(away / "dist")
        check_contents(sdist, wheel)
        environment = away / "environment"
        venv.create(environment, with_pip=True)
        python = environment / "bin/python"
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=away)
        lent = environment.joinpath("lib", f"python{sysconfig.get_python_version()}", "site-packages", "lent.pth")
        lent.write_text(sysconfig.get_path("purelib"))
        run(environment / "bin/endoreward", "--version", cwd=away)
        run(python, "-c", USE, cwd=away)
        with tarfile.open(sdist) as archive:
            archive.extractall(away)
        run(python, "-m", "pytest", "-q", *TESTS, cwd=away / sdist.name.removesuffix(".tar.gz"))
        (ROOT / "dist").mkdir(exist_ok=True)
        for file in (sdist, wheel):
            shutil.copy(file, ROOT / "dist")


if __name__ == "__main__":
    main()
