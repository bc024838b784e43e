"""Which test files touch the device, and which of them can be imported here."""

import ast
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIRST = ("tests/test_functional.py", "tests/vocab/test_devices.py")  # what every public function takes by default
APART = ("tests/bench",)  # the benchmarks themselves; `make gpu` runs those
LOCAL = (ROOT, ROOT / "tests/harness")


def files() -> tuple[list[str], dict[str, str]]:
    """Return (files with tests that touch the device, {file: the module that it needs and that is absent})."""
    found, absent = [], {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith(APART) and touches(path):
            needed = missing(path)
            if needed:
                absent[name] = f"needs {needed}, which is not installed"
            else:
                found.append(name)
    return found, absent


def touches(path: Path) -> bool:
    """Return whether a test of the file takes the fixture `device` or is marked with it."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)) if "device" in text else ():
        if isinstance(node, ast.FunctionDef) and any(argument.arg == "device" for argument in node.args.args):
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.device":
            return True
    return False


def missing(path: Path) -> str | None:
    """Return the first module that the file, or a helper of tests/harness that it imports, needs and is absent."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            modules = [] if node.level else [node.module]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = module.partition(".")[0]
            helper = ROOT / "tests/harness" / f"{top}.py"
            if helper.exists():
                if needed := missing(helper):
                    return needed
            elif not any((folder / top).is_dir() for folder in LOCAL) and importlib.util.find_spec(top) is None:
                return top
    return None
