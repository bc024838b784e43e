"""Adapters of other packages: each call fits the function's signature, and each result is read as it is returned."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import gradients, peers_gpu
from bench.harness import packages, peers, shapes
from bench.harness.gate import Gate

SHAPE = shapes.find("D128-V384")
CASES = [(name, call, place) for name, call in packages.CALLS.items() for place in call.where]
each_place = pytest.mark.parametrize(("name", "call", "place"), CASES, ids=[f"{n}: {p}" for n, _, p in CASES])
each_call = pytest.mark.parametrize("name", packages.CALLS)


def inputs_for(name: str, rows: int = 8) -> peers.Inputs:
    linear = peers.make_inputs("linear", SHAPE, rows, torch.float32)
    return replace(linear, logits=linear.hidden @ linear.weight.T)


# ------------------------------------------------------------------------------------------------ signatures


def source_of(module: str) -> Path | None:
    """Return the file of a module without importing it or its parents; None if it is not installed."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in (folder.joinpath(*rest, "__init__.py"), folder.joinpath(*rest).with_suffix(".py")):
            if path.exists():
                return path
    return None


def parameters(path: Path, name: str) -> list[str]:
    """Return the parameters of a function of a file; of `forward`, without its context, for a Function's `apply`."""
    tree = ast.parse(path.read_text())
    owner, _, method = name.rpartition(".")
    body = tree.body
    if owner:
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    found = functions.get(method) or functions["forward"]
    names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
    return [n for n in names if n not in ("ctx", "self")]


def defined_in(module: str, name: str) -> tuple[str, str] | None:
    """Follow `from x import name` in a package's __init__ to where the function is defined."""
    path = source_of(module)
    if path is None:
        return None
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name.partition(".")[0] for alias in node.names):
            parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(max(node.level - 1, 0)):
                parent = parent.rpartition(".")[0]
            return defined_in(f"{parent}.{node.module}" if node.level else node.module, name)
    return str(path), name


@each_place
def test_the_installed_package_has_the_parameters_that_its_adapter_passes(name, call, place):
    module, _, function = place.partition(":")
    found = defined_in(module, function)
    if found is None:
        pytest.skip(f"{module.partition('.')[0]} is not installed")
    path, function = found
    if function == "lse_target_epi":  # an object: its parameters are those of the class's __call__
        path, function = source_of("quack.epilogue.frontend"), "EpiMod.__call__"
    real, takes = parameters(Path(path), function), call.takes.split()
    assert [n for n in real if n in takes] == takes


# ------------------------------------------------------------------------------------------------ stubs


class Stub:
    """Stands for a package's function: checks the arguments' names, and computes what the function is said to give."""

    def __init__(self, call: packages.Call):
        self.names, self.gives, self.entropy = call.takes.split(), call.gives, False

    def __call__(self, *args, target=None, **named):
        assert len(args) <= len(self.names) and set(named) <= set(self.names)
        given = dict(zip(self.names, args, strict=False)) | named
        hidden, weight = args[0], args[1]
        if weight.is_floating_point():
            targets = next(x for x in (target, *given.values()) if isinstance(x, torch.Tensor) and x.ndim == 1)
            logits = hidden @ (weight if weight.shape[0] == hidden.shape[1] else weight.T)
        else:
            logits, targets = hidden, weight
        return self.answer(given, logits.double(), targets)

    def answer(self, given: dict, logits, targets):
        nll = F.cross_entropy(logits, targets, reduction="none")
        if "store_d" in given:
            assert given["store_d"] is False
            return {"lse": logits.logsumexp(-1), "target_logit": logits.gather(1, targets[:, None])[:, 0]}
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        if "outputs" in given:  # TRL's chunked function
            return -nll, entropy if "entropy" in given["outputs"] else None, None, None, None
        if "dist_process_group" in given or self.names == ["logits", "index"]:  # log-probabilities and entropy
            return (-nll, entropy) if self.gives == "nll, entropy" else -nll
        if given.get("return_entropy"):
            return nll, entropy
        if self.gives == "summed nll":
            assert given["reduction"] == "sum"
            nll = nll.sum()
        return (nll, None, None, None) if "lse_square_scale" in given else nll


@each_call
def test_an_adapter_reads_what_the_function_returns(name):
    call = packages.CALLS[name]
    inputs = inputs_for(name)
    Gate(inputs).check(name, call.gives, call.run(Stub(call), inputs))


@pytest.mark.parametrize("name", [*peers_gpu.LINEAR_PACKAGES, *peers_gpu.SUMMED_PACKAGES])
def test_gradients_go_through_an_adapter(name):
    call, inputs = packages.CALLS[name], inputs_for(name)
    stub = peers.Peer(lambda i: call.run(Stub(call), i), gives=call.gives)
    peer = gradients.with_gradients(stub)
    got = peer.prepare(inputs)()
    gate = Gate(inputs)
    gate.check(name, peer.gives, got)
    nll, dhidden, dweight = got
    for wrong in ((nll + 1, dhidden, dweight), (nll, dhidden * 1.01, dweight), (nll, dhidden, dweight * 1.01)):
        with pytest.raises(AssertionError, match="is off by"):
            gate.check(name, peer.gives, wrong)


def test_the_gradients_of_a_sum_are_not_those_of_other_upstream_gradients():
    call, inputs = packages.CALLS["liger-kernel, summed"], inputs_for("linear")
    peer = gradients.with_gradients(peers.Peer(lambda i: call.run(Stub(call), i), gives=call.gives))
    total, *rest = peer.prepare(inputs)()
    with pytest.raises(AssertionError):
        Gate(inputs).check("sum", "gradients", (total.expand(8), *rest))


# ------------------------------------------------------------------------------------------------ what cannot run


def test_the_first_place_that_can_be_imported_is_used():
    found, missing = packages.find(("no_such_package_here:f", "math:sqrt"))
    assert found(4.0) == 2.0 and missing is None
    _, missing = packages.find(("no_such_package_here:f", "math:no_such_function"))
    assert "no_such_package_here" in missing and "math: AttributeError" in missing


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("liger-kernel, scaled, CuTe", {}, "Hopper"),
        ("quack-kernels, scaled exp, summed", {"shape": shapes.find("D128-V300")}, "divisible by 128"),
        ("verl", {"shape": shapes.find("D70-V384")}, "divisible by 128"),
        ("verl", {}, "CUDA"),
        ("liger-kernel, scaled, torch fallback", {"shape": replace(SHAPE, softcap=30.0)}, "no softcap"),
    ],
)
def test_what_a_function_cannot_do_is_the_reason_in_the_record(name, change, reason):
    assert reason in packages.CALLS[name].obstacle(replace(inputs_for(name), **change))


def test_every_package_of_the_gpu_subjects_has_an_adapter():
    listed = (*peers_gpu.LINEAR_PACKAGES, *peers_gpu.ENTROPY_PACKAGES, *peers_gpu.SUMMED_PACKAGES)
    assert set(listed) <= packages.CALLS.keys() and set(peers_gpu.FORWARD_ONLY) <= set(peers_gpu.LINEAR_PACKAGES)
