"""`make compare` on tiny inputs: what each cell says about arms that are right, wrong, unstable or broken."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench.compare import arms, cases, measure, page, run
from bench.compare.arms import Arm
from bench.harness import packages
from bench.harness.clock import Processor
from bench.harness.peers import OURS, Peer
from bench.harness.shapes import Shape

CPU = torch.device("cpu")
SMALL = (cases.Case("normal", 300), cases.Case(page.APART, 300, offset=1e4))
TIMED = measure.Timed(Shape("small", 16, 200), 4, 3)


def exact(i):
    return F.cross_entropy(i.logits.double(), i.targets, reduction="none")


def twice(i):
    return 2 * exact(i)


class Drifting:
    """Adds another number in every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, i):
        self.calls += 1
        return exact(i) + 1e-12 * self.calls


def batch_dependent(i):
    return exact(i) + 1e-12 * len(i.targets)


def broken(i):
    raise RuntimeError("no kernel image")


def without_backward(i):
    return exact(i).detach()


def of(run_, **about) -> Arm:
    return Arm(Peer(run_, gives="nll"), "logits", **about)


# ------------------------------------------------------------------------------------------------ cells


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_cases_are_what_their_names_say(case):
    vocab = min(case.vocab, 5000)
    inputs = cases.make(
        cases.Case(case.name, vocab, case.spread, case.offset, case.peaked), torch.float32, cases.ROWS, CPU
    )
    logits = inputs.hidden.double() @ inputs.weight.double().T
    assert logits.std().item() == pytest.approx(case.spread, rel=0.2)
    assert logits.mean().item() == pytest.approx(case.offset, abs=1.0)
    assert bool((logits < 0).all()) == (case.name == "all negative")
    likeliest = (logits.argmax(1) == inputs.targets).float().mean()
    assert likeliest == (0.5 if case.peaked else 0.0) or not case.peaked


def test_the_truth_is_that_of_autograd_in_float64():
    inputs = cases.make(cases.Case("normal", 300), torch.float64, 5, CPU)
    truth = cases.truth(inputs)
    dhidden, dweight = measure.gradients(of(exact), inputs)
    torch.testing.assert_close(truth.nll, exact(replace(inputs, logits=inputs.hidden @ inputs.weight.T)))
    torch.testing.assert_close(truth.dhidden, dhidden)
    torch.testing.assert_close(truth.dweight, dweight)
    log_p = torch.log_softmax(inputs.hidden @ inputs.weight.T, -1)
    torch.testing.assert_close(truth.entropy, -(log_p.exp() * log_p).sum(-1))


def test_one_arm_is_made_without_the_packages_of_the_others(monkeypatch):
    monkeypatch.setattr(packages.Call, "peer", lambda call: pytest.fail("imports a package"))
    assert arms.arm("torch, F.cross_entropy", gpu=False).takes == "logits"
    assert arms.arm(f"{OURS}, chunked", gpu=False).takes == "hidden"
    assert arms.PACKAGES.keys() <= packages.CALLS.keys()


def test_errors_are_those_of_the_arm():
    right = measure.accuracy(of(exact), torch.float32, CPU, SMALL[:1])["normal"]
    wrong = measure.accuracy(of(twice), torch.float32, CPU, SMALL[:1])["normal"]
    assert right["statistics"]["nll"] < 1e-5 and right["gradients"]["dhidden"] < 1e-5
    assert wrong["statistics"]["nll"] > 1 and wrong["gradients"]["dweight"] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("arm", "no"),
    [
        (of(Drifting()), {"statistics, run to run", "rows alone", "half of the batch"}),
        (of(batch_dependent), {"rows alone", "half of the batch"}),
    ],
    ids=["drifting", "batch dependent"],
)
def test_other_bits_are_seen(arm, no):
    found = measure.repeatability(arm, torch.float64, CPU, SMALL)
    assert {name for name, same in found.items() if not same} == no


def test_a_failure_costs_its_cells_and_says_where_it_arose():
    found = measure.measure(of(without_backward), Processor(), TIMED, SMALL[:1])["float32"]
    assert "nll" in found["accuracy"]["normal"]["statistics"]
    assert "does not require grad" in found["accuracy"]["normal"]["gradients"]["failed"]
    assert found["times"]["forward"]["ratio"] > 0 and "failed" in found["times"]["forward + backward"]
    said = page.reasons(found)
    assert len(said) == 1 and said[0].startswith("gradients, normal: RuntimeError")


def test_arms_in_the_interpreter_have_no_time_and_few_rows():
    found = measure.measure(of(exact, interpreted=True, largest=200), Processor(), TIMED, SMALL[:1])["float32"]
    assert found["times"] is None and found["accuracy"]["normal"]["vocab"] == 200


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_our_arms_give_the_numbers_of_the_rows(impl):
    arm = arms.ours(gpu=False)[f"{OURS}, {impl}"]
    inputs = cases.make(cases.Case("normal", 150), torch.float32, 3, CPU, hidden=16)
    truth = cases.truth(inputs)
    assert measure.statistics_error(arm, inputs, truth)["nll"] < 1e-5
    assert measure.statistics_error(arm, inputs, truth)["entropy"] < 1e-5
    assert max(measure.gradient_error(arm, inputs, truth).values()) < 1e-5


# ------------------------------------------------------------------------------------------------ processes and page


def test_a_process_that_dies_hangs_or_lacks_the_package_is_the_reason_in_the_record(monkeypatch):
    arm = of(exact)
    command = subprocess.run

    def instead(code):
        monkeypatch.setattr(run.subprocess, "run", lambda c, **k: command([sys.executable, "-c", code], **k))

    instead("import os; os.abort()")
    assert run.in_a_process("x", arm, 60)["failed"].startswith("exit code -6")
    instead("raise SystemExit('no driver')")
    assert run.in_a_process("x", arm, 60)["failed"] == "exit code 1: no driver"
    instead("import time; time.sleep(60)")
    assert run.in_a_process("x", arm, 0.5)["failed"] == "no result after 0 s"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Run the command with a few arms, measured in this process, and return (record, folder)."""
    chosen = {
        "exact": of(exact),
        "without backward": of(without_backward),
        "broken": of(broken),
        "absent": Arm(Peer(exact, missing="no module")),
        "needs a GPU": Arm(Peer(exact, missing="no module", obstacle=lambda i: "needs a CUDA GPU")),
        f"{OURS}, fused": of(exact, interpreted=True, largest=200),
    }
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "arms", lambda gpu: chosen)
        patch.setattr(cases, "CASES", SMALL)
        patch.setattr(run, "in_a_process", lambda n, arm, s: measure.measure(arm, Processor(), TIMED, SMALL))
        assert run.main(["--out", str(folder)]) == 0
        assert run.main(["--out", str(folder), "--only", "absent"]) == 0  # keeps what was measured of the others
    return json.loads((folder / "compare.json").read_text()), folder


def test_the_table_has_a_row_for_each_arm_and_a_reason_for_what_is_missing(written):
    record, folder = written
    text = (folder / "compare.md").read_text()
    assert text == page.markdown(record)
    assert text.count("| exact (takes logits) |") == 2, "one table for each dtype"
    fused = next(line for line in text.splitlines() if line.startswith(f"| {OURS}, fused"))
    assert "(V = 200)" in fused and fused.endswith("| interpreted | interpreted |")
    partly = next(line for line in text.splitlines() if line.startswith("| without backward"))
    assert "failed" in partly
    assert "| broken" not in text and "- broken, float32: statistics, normal: RuntimeError: no kernel image" in text
    assert "- absent: no module" in text and "- needs a GPU: needs a CUDA GPU" in text


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is in the bench extra")
def test_pictures_come_from_the_record_in_both_themes(written):
    for name in ("compare.svg", "compare-dark.svg"):
        drawn = (written[1] / name).read_text()
        assert "<!-- exact -->" in drawn and "absent" not in drawn


def test_largest_errors_leave_the_offset_out_and_show_nan():
    def found(**errors):
        return {
            "accuracy": {name.replace("offset", page.APART): {"statistics": {"nll": e}} for name, e in errors.items()}
        }

    assert page.worst(found(a=1.0, b=2.0, offset=9.0), "statistics", "nll") == 2.0
    assert page.worst(found(a=float("nan"), b=2.0), "statistics", "nll") == float("inf")
    assert page.worst(found(a=1.0), "statistics", "entropy") is None
