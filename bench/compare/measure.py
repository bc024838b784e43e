"""Accuracy, repeatability and time of one arm."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.compare import cases
from bench.compare.arms import Arm
from bench.gpu.gradients import matmuls
from bench.harness import shapes, timing
from bench.harness.peers import Inputs, make_inputs
from bench.harness.shapes import Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATED = "V = 50257"  # the case on which repeatability is checked


@dataclass(frozen=True)
class Timed:
    shape: Shape
    rows: int
    rounds: int


ON_CPU = Timed(Shape("smollm2-135m", 576, 49152), 128, 5)
ON_GPU = Timed(shapes.find("qwen3-1.7b"), 4096, 20)


def gradients(arm: Arm, i: Inputs) -> tuple[Tensor, Tensor]:
    """Return the gradients of sum(upstream * nll) in hidden and weight."""
    leaves = i.hidden.detach().requires_grad_(), i.weight.detach().requires_grad_()
    nll, _ = arm.statistics(replace(i, hidden=leaves[0], weight=leaves[1]))
    return torch.autograd.grad(nll, leaves, i.upstream.to(nll.dtype))


def inputs_for(arm: Arm, case: cases.Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows = cases.INTERPRETED_ROWS if arm.interpreted else cases.ROWS
    return cases.make(replace(case, vocab=min(case.vocab, arm.largest or case.vocab)), dtype, rows, device)


def obstacle(arm: Arm, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the arm cannot run on this device in this dtype, or None."""
    return arm.peer.obstacle(inputs_for(arm, cases.CASES[0], dtype, device))


def guarded(call: Callable) -> dict:
    """Return what the call returns, or {"failed": why}: one failure costs one cell."""
    try:
        return call()
    except Exception as error:
        return {"failed": reason(error)}


def reason(error: BaseException) -> str:
    """Return the first line of the error that caused it all, and the last line outside Triton that led to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "/triton/" not in frame.filename), frames[-1])
    where = f"{Path(last.filename).name}:{last.lineno}, {last.line}"
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]} ({where})"


# ------------------------------------------------------------------------------------------------ accuracy


def statistics_error(arm: Arm, i: Inputs, truth: cases.Truth) -> dict:
    """Return the largest absolute errors over the rows, in nats."""
    nll, entropy = arm.statistics(i)
    found = {"nll": _largest(nll, truth.nll)}
    return found | ({} if entropy is None else {"entropy": _largest(entropy, truth.entropy)})


def gradient_error(arm: Arm, i: Inputs, truth: cases.Truth) -> dict:
    """Return |error| / |gradient|, in Euclidean norms."""
    dhidden, dweight = gradients(arm, i)
    return {"dhidden": _relative(dhidden, truth.dhidden), "dweight": _relative(dweight, truth.dweight)}


def _largest(got: Tensor, want: Tensor) -> float:
    return (got.detach().double() - want).abs().max().item()


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def accuracy(arm: Arm, dtype: torch.dtype, device: torch.device, chosen=cases.CASES) -> dict:
    found = {}
    for case in chosen:
        inputs = inputs_for(arm, case, dtype, device)
        truth = cases.truth(inputs)
        found[case.name] = {
            "vocab": inputs.shape.vocab,
            "statistics": guarded(lambda: statistics_error(arm, inputs, truth)),  # noqa: B023
            "gradients": guarded(lambda: gradient_error(arm, inputs, truth)),  # noqa: B023
        }
    return found


# ------------------------------------------------------------------------------------------------ repeatability


def repeatability(arm: Arm, dtype: torch.dtype, device: torch.device, chosen=cases.CASES) -> dict:
    """Compare bits: of two runs, and of rows alone or in half of the batch with the same rows in the batch."""
    case = next((case for case in chosen if case.name == REPEATED), chosen[0])
    inputs = inputs_for(arm, case, dtype, device)
    rows, whole = len(inputs.targets), arm.statistics(inputs)

    def equal(some: slice) -> bool:
        part = arm.statistics(cases.some_rows(inputs, some))
        return all(b is None or torch.equal(a[some], b) for a, b in zip(whole, part, strict=True))

    ends = (slice(0, 1), slice(rows // 2, rows // 2 + 1), slice(rows - 1, rows))
    return {
        "statistics, run to run": equal(slice(None)),
        "rows alone": all(equal(row) for row in ends),
        "half of the batch": equal(slice(0, rows // 2)),
        **guarded(lambda: {"gradients, run to run": _same_gradients(arm, inputs)}),
    }


def _same_gradients(arm: Arm, inputs: Inputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(gradients(arm, inputs), gradients(arm, inputs), strict=True))


# ------------------------------------------------------------------------------------------------ time


def times(arm: Arm, dtype: torch.dtype, clock, timed: Timed) -> dict:
    """Return time against the bare matmuls, in interleaved rounds: forward, and forward with gradients."""
    inputs, rounds = make_inputs("linear", timed.shape, timed.rows, dtype, device=clock.device), timed.rounds
    three = matmuls(3)
    return {
        "forward": guarded(lambda: _spread(
            lambda: inputs.hidden @ inputs.weight.T, lambda: arm.statistics(inputs), rounds, clock
        )),
        "forward + backward": guarded(lambda: _spread(
            lambda: three.run(inputs), lambda: gradients(arm, inputs), rounds, clock
        )),
    }  # fmt: skip


def _spread(bare: Callable, call: Callable, rounds: int, clock) -> dict:
    both = {"bare": bare, "arm": call}
    timing.interleave(both, 1, clock)  # the first call starts threads and compiles
    measured = timing.interleave(both, rounds, clock)
    return timing.spread(measured["arm"], measured["bare"])


def measure(arm: Arm, clock, timed: Timed, chosen=cases.CASES) -> dict:
    """Return {dtype: accuracy, repeatability and times}. Arms in the interpreter have no time."""
    found = {}
    for name, dtype in DTYPES.items():
        if why := obstacle(arm, dtype, clock.device):
            found[name] = {"failed": why}
            continue
        found[name] = {
            "accuracy": accuracy(arm, dtype, clock.device, chosen),
            "repeatability": guarded(lambda: repeatability(arm, dtype, clock.device, chosen)),  # noqa: B023
            "times": None if arm.interpreted else guarded(lambda: times(arm, dtype, clock, timed)),  # noqa: B023
        }
    return found
