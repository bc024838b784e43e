"""Imports run one way, downwards: from a folder of the package to those that it may know, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "endoreward_fast"
# A folder, or a file at the top, and what it may import besides itself. Imports for type checkers count.
MAY_IMPORT = {
    "errors": "",
    "kernels": "",
    "view": "",
    "types": "view",
    "vocab": "types errors kernels",
    "functional": "types vocab",
    "divergence": "vocab",
    "returns": "vocab",
    "losses": "types vocab",
    "signals": "types errors vocab functional returns",
    "text": "errors",
    "head": "errors vocab",
    "scoring": "types errors view text head returns signals",
    "model": "types errors vocab functional signals text head scoring",
    "tuning": "errors vocab kernels",
    "rivals": "errors text scoring model",
    "pocket": "",
    "data": "errors text scoring",
    "remote": "errors text scoring",
    "serving": "errors text data scoring model remote",
    "integrations": "errors returns text scoring model remote serving",
    "command": "errors vocab view text data scoring model rivals pocket tuning serving remote",
    "__main__": "command",
}
FACE = "__init__"
"""the package's own __init__, which imports from every folder"""


def modules() -> dict[str, Path]:
    """{"vocab.rows": its file}; a folder's own __init__ is named after the folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """The modules of the package that a file names, wherever in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in MODULES else ".".join(base))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any((n or "").partition(".")[0] == "endoreward_fast" for n in names), (
                f"{path}: write it relative"
            )
    return found


def folder(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name != FACE])
def test_a_file_imports_only_from_folders_below(name):
    allowed = {folder(name), *MAY_IMPORT[folder(name)].split()}
    beyond = {other for other in imports(name, MODULES[name]) if folder(other) not in allowed}
    assert not beyond, f"{name} imports {', '.join(sorted(beyond))}"


def test_of_the_integrations_only_ray_serve_knows_the_server():
    """The others are for trainers, which do not have the server's packages."""
    knowing = {name for name, path in MODULES.items() for other in imports(name, path) if folder(other) == "serving"}
    of_integrations = {name for name in knowing if folder(name) == "integrations"}
    assert of_integrations and all(name.startswith("integrations.ray_serve") for name in of_integrations)


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: imports(name, path) - {name} for name, path in MODULES.items() if name != FACE}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_folders_have_an_order_and_every_arrow_is_used():
    folders = {name: set(below.split()) for name, below in MAY_IMPORT.items()}
    list(TopologicalSorter(folders).static_order())
    used = {(folder(name), folder(other)) for name, path in MODULES.items() for other in imports(name, path)}
    unused = {(one, other) for one, below in folders.items() for other in below} - used
    assert not unused and set(MAY_IMPORT) == {folder(name) for name in MODULES} - {FACE} | {"kernels"}


def test_every_folder_says_what_lives_there():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and "kernels" not in name:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
