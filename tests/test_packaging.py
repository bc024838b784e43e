"""What the project's files say to pip, to people and to CI agrees with itself."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEWEST, OLDEST = "constraints.txt", "constraints-oldest.txt"
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]


def requirements() -> list[Requirement]:
    """Of the package and of every extra; those that name another extra of this package stand for it already."""
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def pins(file: str, python: str) -> dict[str, str]:
    """{package: version} that a constraints file holds pip to on that Python, on Linux."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) for r in parsed), f"{file}: a line is no pin"
    return {r.name: str(r.specifier)[2:] for r in parsed if applies(r, python)}


def applies(requirement: Requirement, python: str) -> bool:
    here = default_environment() | {"platform_system": "Linux", "python_version": python}
    return requirement.marker is None or requirement.marker.evaluate(here)


@pytest.mark.parametrize("file", [NEWEST, OLDEST])
@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_pinned_satisfies_what_is_required(python, file):
    pinned = pins(file, python)
    for requirement in filter(lambda r: applies(r, python), requirements()):
        version = pinned.get(requirement.name)
        assert version is None or requirement.specifier.contains(version), f"{requirement} excludes {version}"
    assert {"torch", "triton"} <= pinned.keys()


def test_floors_are_what_the_oldest_set_installs():
    pinned = pins(OLDEST, "3.12")
    core = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    floors = {name: str(specifier)[2:] for name, specifier in core.items() if str(specifier).startswith(">=")}
    assert floors and {"torch", "triton", "transformers"} <= floors.keys()
    for name, floor in floors.items():
        assert pinned[name].startswith(floor), f"{name}: the floor is {floor}, the oldest set has {pinned[name]}"


def test_pythons_promised_are_the_pythons_tested():
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert PYTHONS[0] == floor and len(set(PYTHONS)) == len(PYTHONS)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert jobs["floors"]["steps"][1]["with"]["python-version"] == floor


def test_ci_runs_what_a_person_can_run():
    """Every step is an action or a make target; the targets of .ci/run are among them."""
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    run = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert all(re.fullmatch(r"make [a-z-]+", line) for line in run)
    made = {line.split()[1] for line in run}
    here = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert here <= made <= targets


def test_one_version():
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == newest[1] == version
    assert str(citation.get("date-released", "unreleased")) == newest[2]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


@pytest.mark.parametrize("stands_there", ["a text file", "nothing"])
def test_a_checkout_without_symlinks_says_what_to_do(tmp_path, stands_there):
    """Git writes a symlink as a text file that holds its target where the system or its settings allow no links."""
    package = tmp_path / "endoreward_fast"
    package.mkdir()
    shutil.copy(ROOT / "endoreward_fast/__init__.py", package)
    if stands_there == "a text file":
        (package / "kernels").write_text("../kernels")
    spec = importlib.util.spec_from_file_location("without_links", package / "__init__.py")
    with pytest.raises(ImportError, match=r"symlink.*core\.symlinks.*pip install") as told:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "\n" not in str(told.value)


def test_the_card_of_the_embedded_weights_is_its_tools_own():
    """Its text is that of tools/pocket_card.py, which fills in numbers; the licence of the weights is the project's."""
    folder = ROOT / "endoreward_fast/pocket"
    card = (folder / "README.md").read_text()
    template = re.search(r'^CARD = """(.*?)^"""', (ROOT / "tools/pocket_card.py").read_text(), re.DOTALL | re.MULTILINE)
    assert re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+?", re.escape(template[1])), card, re.DOTALL)
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == PROJECT["license"].lower()
