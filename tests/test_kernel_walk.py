"""examples/kernel_walk: each step is right where docs/kernel-walk.md says so, and wrong where it says so."""

import ast
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "kernel_walk"
PAGE = (ROOT / "docs" / "kernel-walk.md").read_text()
STEPS = sorted(path.stem for path in FOLDER.glob("step_*.py"))


@pytest.fixture(autouse=True)
def _beside_the_steps(monkeypatch):
    """As where `python examples/kernel_walk/step_1_naive.py` starts."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def measure():
    return importlib.import_module("against_float64")


def table(heading):
    """A table of the page: {first cell: the others}."""
    lines = PAGE[PAGE.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in rows}


PROMISED = table("| logits |")
COSTS = table("| step |")


def test_the_page_promises_something_of_every_step_in_every_case(measure):
    assert list(PROMISED) == list(measure.CASES)
    assert {len(said) for said in PROMISED.values()} == {len(STEPS)} == {len(COSTS)}
    assert all(said[-1] == said[-2] == said[-3] == "right" for said in PROMISED.values())


@pytest.mark.parametrize("number", range(len(STEPS)), ids=STEPS)
@pytest.mark.parametrize("case", PROMISED)
def test_a_step_does_what_the_page_says(number, case, measure, assert_within_budget):
    step = importlib.import_module(STEPS[number])
    fused = number == 4
    ours, exact = measure.compute(step.lse, case, from_hidden=fused)
    if PROMISED[case][number] == "right":
        hidden, weight, bias = measure.inputs(case)
        eager = torch.logsumexp(hidden @ weight.T + bias, -1)
        assert_within_budget(ours, eager, exact)
    else:
        wrong = {"inf": ours == torch.inf, "-inf": ours == -torch.inf, "NaN": ours.isnan()}
        assert wrong[PROMISED[case][number]].all()


@pytest.mark.parametrize("number", (2, 3, 4), ids=STEPS[2:])
def test_steps_with_a_temperature(number, measure, assert_within_budget):
    step = importlib.import_module(STEPS[number])
    given = hidden, weight, bias = measure.inputs("every third is -inf")
    logits = hidden @ weight.T + bias
    exact = torch.logsumexp((hidden.double() @ weight.double().T + bias.double()) / 0.7, -1)
    ours = step.lse(*(given if number == 4 else (logits,)), alpha=0.7)
    assert_within_budget(ours, torch.logsumexp(logits / 0.7, -1), exact, scale=10.0)


def test_a_row_split_over_programs_has_the_same_bits_alone(measure):
    step = importlib.import_module("step_4_split")
    hidden, weight, _ = measure.inputs("ordinary")
    logits = hidden @ weight.T
    assert torch.equal(step.lse(logits)[3:4], step.lse(logits[3:4]))


def test_costs_on_the_page_are_those_of_the_formulas(measure):
    for name, (_, moved, programs) in zip(STEPS, COSTS.values(), strict=True):
        step = importlib.import_module(name)
        assert moved == f"{step.bytes_moved(measure.MANY, measure.REAL_VOCAB) / 1e9:.2f} GB"
        assert programs == str(step.programs(measure.FEW, measure.REAL_VOCAB))


@pytest.mark.parametrize("name", STEPS[:1])
def test_a_step_runs_as_a_script_from_any_folder(name, capsys, tmp_path, monkeypatch, measure):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(case in printed for case in measure.CASES) and "19.91 GB" in printed


def test_without_a_gpu_or_the_interpreter_a_step_says_what_to_set(monkeypatch, measure):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        measure.device()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import step_1_naive as a, step_2_two_reads as b, step_3_online as c, step_4_split as d, step_5_fused as e
kernels = [
    (a.naive_kernel, {"BLOCK_V": a.BLOCK_V}), (b.two_reads_kernel, {"BLOCK_V": b.BLOCK_V}),
    (c.online_kernel, {"BLOCK_V": c.BLOCK_V}), (d.split_kernel, {"SPLIT": d.SPLIT}),
    (d.combine_kernel, {"BLOCK_N": 16}),
    (e.fused_kernel, {"BLOCK_N": e.BLOCK_N, "BLOCK_V": e.BLOCK_V, "BLOCK_D": e.BLOCK_D, "SPLIT": e.SPLIT}),
]
for kernel, constants in kernels:
    pointers = ("logits", "out", "hidden", "weight", "bias", "p_m", "p_s")
    kind = lambda name: "*fp32" if name in pointers else "fp32" if name in ("c", "alpha") else "i32"
    signature = {n: "constexpr" if n in constants else kind(n) for n in kernel.arg_names}
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__)
"""


def test_every_kernel_compiles_for_a_gpu():
    """In a process of its own: in this one Triton may be the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=FOLDER, env=environment | {"PYTHONPATH": str(FOLDER)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6


def _lines(path):
    """Lines of code, without what every kernel has to say alike: imports, signatures, docstrings."""
    tree = ast.parse(path.read_text())
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return ["".join(ast.unparse(statement).split()) for body in bodies for statement in body]


def test_steps_are_short_and_no_copy_of_the_production_kernels():
    def windows(path):
        lines = _lines(path)
        return {tuple(lines[i : i + 3]) for i in range(len(lines) - 2)}

    production = set().union(*(windows(path) for path in (ROOT / "kernels").glob("*.py")))
    for name in STEPS:
        assert not windows(FOLDER / f"{name}.py") & production
        for node in ast.parse((FOLDER / f"{name}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                assert node.end_lineno - node.lineno < 40


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links if not link.startswith("http"))


def test_names_of_production_code_on_the_page_exist():
    for file, names in re.findall(r"^\| .*\[`(\w+\.py)`\]\(\S+\): (.*) \|$", PAGE, re.M):
        source = (ROOT / "kernels" / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", source), f"{file} has no {name}"
