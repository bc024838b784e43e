"""`endoreward doctor`: what it finds, its exit code, and what it keeps to itself."""

import getpass
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli_harness import run
from endoreward_fast.tuning import checks, facts
from endoreward_fast.tuning.checks import Checked, Subject
from endoreward_fast.tuning.paths import shortened
from endoreward_fast.vocab import choice, machine, tuned
from endoreward_fast.vocab.tuned import Choice, Entry, Head

WRONG = "wrong numbers: lse is off by 3.0e-02 (allowed 1.0e-05)"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A home folder of its own, without settings of the test-suite."""
    for name in facts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    (tmp_path / "ada").mkdir()
    choice.forget()
    yield tmp_path / "ada"
    choice.forget()


@pytest.fixture
def found(monkeypatch):
    """Made-up answers of the processes: {implementation: problem}. Others are right, and take 1.1 of torch.mm."""
    problems = {}

    def ask(requests, limit, env):
        answers = []
        for request in requests:
            impl = request["choice"]["impl"]
            times = {str(n): {"candidate": [1.1] * 3, "matmul": [1.0] * 3} for n in request["rows"]}
            right = {"errors": {"lse": 1e-6, "entropy": 2e-6}} | ({"times": times} if request["seconds"] else {})
            answers.append({"problem": problems[impl]} if impl in problems else right)
        return answers

    monkeypatch.setattr(checks, "ask", ask)
    return problems


def section(text, title):
    return text.partition(f"{title}")[2].partition("\n\n")[0]


def test_what_runs_its_errors_and_its_rate_are_printed(found):
    said = run("doctor").stdout
    for title in ("Versions", "Extras", "Devices", "Caches", "Numbers", "Tuned heads", "Advice"):
        assert f"{title}" in said
    assert f"  torch                     {torch.__version__}\n" in said
    numbers = section(said, "Numbers")
    right, timed = numbers.partition("  chunked, cpu              ")[2].splitlines()[:2]
    assert right == "right: bfloat16 2e-06, float16 2e-06, float32 2e-06"
    assert timed.startswith(" " * 28 + "time 1.10 (1.10-1.10), with torch.mm at ")
    assert "(D=1024, V=32768, " in timed and timed.endswith(", 128 rows)")
    if not torch.cuda.is_available():
        assert "fused (interpreter), cpu  right: bfloat16 2e-06, float16 2e-06, float32 2e-06\n" in numbers + "\n"
        assert "GPU                       none that torch sees" in said
    assert "none: auto follows its rule" in section(said, "Tuned heads")
    assert "Environment" not in said and max(map(len, said.splitlines())) <= 130


def test_wrong_numbers_are_exit_code_1(found):
    found["chunked"] = WRONG
    said = run("doctor", code=1).stdout
    assert f"FAILS: bfloat16: {WRONG}" in said
    assert "chunked on cpu fails: report it with this output, and use another impl meanwhile" in said


def test_something_that_should_run_and_does_not_is_exit_code_1(found, monkeypatch):
    monkeypatch.setattr(checks, "find_compiler", lambda: "c++")
    found["compiled"] = "ended by SIGSEGV"
    assert "compiled, cpu             FAILS: bfloat16: ended by SIGSEGV" in run("doctor", code=1).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are needed")
def test_the_interpreter_may_fail_but_not_be_wrong(found):
    found["fused"] = "exit code 1: AttributeError: numpy is too new"
    said = run("doctor").stdout
    assert "does not run: bfloat16: exit code 1" in said and "does not run; only tests need it" in said
    found["fused"] = WRONG
    run("doctor", code=1)


def test_what_is_missing_is_said_with_what_to_do(found, monkeypatch):
    monkeypatch.setattr(checks, "find_compiler", lambda: None)
    monkeypatch.setattr(facts, "find_compiler", lambda: None)
    monkeypatch.setattr(facts, "gpu_without_torch", lambda: True)
    installed = machine.version_of
    monkeypatch.setattr(facts, "version_of", lambda name: {"ray": None, "torch": "2.4.0"}.get(name, installed(name)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HF_HOME", __file__)
    said = run("doctor").stdout
    assert "compiled, cpu             not here: there is no C++ compiler" in said
    assert "  ray                       no ray\n" in said and "torch                     2.4.0  needs >=2.11\n" in said
    advice = section(said, "Advice\n")
    for line in (
        "torch 2.4.0 is not supported: pip install 'torch>=2.11'",
        "a GPU's driver is loaded, and torch sees no GPU: install a build of torch for it",
        "TRITON_INTERPRET=1 makes kernels run in Triton's interpreter, for tests: unset it",
        "cannot be written: name another folder in HF_HOME",
        "no C++ compiler: impl='compiled' needs one on the CPU",
    ):
        assert line in advice


def test_a_slow_implementation_is_advised_to_be_tuned(found, monkeypatch):
    slow = Checked(Subject("chunked", "chunked", "cpu"), {"float32": 1e-6}, {}, (1.5, 1.62, 1.7), 0.5)
    monkeypatch.setattr(checks, "check", lambda subject, fastest: slow)
    assert "chunked on cpu takes 1.62 times torch.mm: `endoreward tune --model NAME`" in run("doctor").stdout


def test_a_time_that_may_be_noise_is_shown_without_advice(found, monkeypatch):
    busy = Checked(Subject("chunked", "chunked", "cpu"), {"float32": 1e-6}, {}, (1.1, 8.31, 9.0), 0.5, "a head")
    monkeypatch.setattr(checks, "check", lambda subject, fastest: busy)
    said = run("doctor").stdout
    assert "time 8.31 (1.10-9.00), with torch.mm at 0.5 TFLOP/s (a head)" in said
    assert section(said, "Advice\n").strip() == "nothing to do"


def test_a_cpu_is_checked_on_all_threads_and_timed_on_one(monkeypatch):
    """On several threads only the wall clock tells the time, and other programs lengthen it."""
    asked = []

    def ask(requests, limit, env):
        asked.extend(requests)
        return [{"problem": "not run"}] * len(requests)

    monkeypatch.setattr(checks, "ask", ask)
    checks.check(Subject("chunked", "chunked", "cpu"), lambda device: torch.float32)
    assert [(bool(r["seconds"]), r["threads"]) for r in asked] == [(False, None)] * 3 + [(True, 1)]
    asked.clear()
    checks.check(Subject("chunked", "chunked", "cuda:0"), lambda device: torch.float32)
    assert [r["threads"] for r in asked] == [None] * 4


def test_tuned_heads_are_listed_and_stale_ones_advised_to_be_tuned_again(found, here):
    folder = here / ".cache" / "endoreward_fast" / "tuned"
    for dtype, triton in (("float32", None), ("bfloat16", "3.0.1")):
        where = machine.machine_of(CPU)
        where = where if triton is None else replace(where, triton=triton)
        tuned.write(Entry(Head(dtype, 24, 333), where, Choice("chunked"), {"name": "chunked", "score": 0.9}), folder)
    (folder / "odd.json").write_text("")
    said = run("doctor").stdout
    assert "  D=24, V=333, float32\n    chunked, 0.90 times torch.mm" in said
    assert "the tuning of D=24, V=333, bfloat16 is not used (for triton 3.0.1, here " in said
    assert "odd.json is not read (" in said and "~/.cache/endoreward_fast/tuned/odd.json" in said


def test_json_holds_the_same(found):
    found["chunked"] = WRONG
    told = json.loads(run("doctor", "--json", code=1).stdout)
    assert told["versions"]["torch"] == str(torch.__version__)
    first = told["checks"][0]
    assert first["impl"] == "chunked" and first["failed"] and first["problems"]["float32"] == WRONG
    timed = next(check for check in told["checks"] if check["timed"] and not check["failed"])
    assert timed["ratio_to_matmul"] == pytest.approx(1.1) and timed["ratio_quartiles"] == pytest.approx([1.1, 1.1])
    assert told["advice"][0].startswith("chunked on cpu fails")
    assert {"extras", "devices", "compiler", "caches", "environment", "tuned", "unmet"} <= set(told)


def test_home_folders_user_names_and_secrets_are_not_printed(found, here, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/ada/triton")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found["compiled"] = f"OSError: {here}/x and /data/ada/y"
    for form in ((), ("--json",)):
        said = run("doctor", *form, code=(0, 1)).stdout
        assert "ada" not in said and "hf_secret" not in said and str(here) not in said
        assert "~/cache" in said and "/scratch/~/triton" in said


def test_paths_are_shortened_at_whole_names(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    assert shortened("/home/ada/x: /home/ada /home/adam/ada.txt /ada/b") == "~/x: ~ /home/adam/ada.txt /~/b"


def test_a_machine_without_a_home_folder_is_examined(found, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    said = run("doctor").stdout
    assert said.count("Could not determine home directory., CANNOT BE WRITTEN") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_the_kernels_are_checked_in_the_interpreter_for_real(monkeypatch):
    """One real process: the interpreter is chosen by a variable that Triton reads once."""
    monkeypatch.setattr(checks, "KERNEL_DTYPES", (torch.float32,))
    [fused] = [subject for subject in checks.subjects() if subject.impl == "fused"]
    result = checks.check(fused, lambda device: torch.float32)
    assert not result.problems and result.ratios is None and 0 < result.errors["float32"] < 1e-5


def test_on_a_gpu_the_kernels_and_the_workspace_are_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 - 2 * device.index, 0))
    subjects = {(s.name, s.device): s for s in checks.subjects()}
    assert subjects["fused", "cuda:0"].needed and subjects["chunked", "cuda:0"].needed
    old = subjects["fused", "cuda:1"]
    assert not old.needed and old.obstacle == "an old GPU is older than compute capability 8.0"
    assert subjects["chunked", "cuda:1"].needed and ("fused (interpreter)", "cpu") not in subjects
