"""`make gpu` with small commands in place of its steps: order, time limit, archive, carried wheels, targets."""

import json
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

from bench.gpu import console, device_tests, groups, run, targets, wheels
from bench.gpu.run import Step

PASS, FAIL, HANG = "pass", "raise SystemExit(3)", "import time; time.sleep(60)"
STOP = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Return run({step: Python code}, seconds) -> (exit code, members of the archive, text of the console)."""
    for name, value in (("LEAST", 0.1), ("STARTUP", 0.0), ("RESERVE", 0.0)):
        monkeypatch.setattr(run, name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run_steps(codes: dict[str, str], seconds: float = 60.0, carried=None):
        monkeypatch.setattr(run, "command", lambda step, *rest: [sys.executable, "-c", codes[step]])
        code = run.run_all(seconds, tmp_path / "out", True, carried, [Step(name, 0.3) for name in codes])
        with tarfile.open(tmp_path / "out" / run.ARCHIVE) as archive:
            names = archive.getnames()
        return code, names, (tmp_path / "out" / run.CONSOLE).read_text()

    yield run_steps
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_command_that_hangs_is_killed():
    assert console.run_limited([sys.executable, "-c", "pass"], 60) == 0
    assert console.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) is None


def test_a_run_leaves_two_files_and_says_what_became_of_each_step(runs, tmp_path):
    code, names, console = runs({"one": "print('from one')", "two": PASS})
    assert code == 0 and {path.name for path in (tmp_path / "out").iterdir()} == {run.ARCHIVE, run.CONSOLE}
    assert {"gpu/summary.md", "gpu/console.txt"} <= set(names)
    assert "from one" in console and "one: passed" in console and "nothing failed" in console
    assert console.index("== one:") < console.index("== two,")


def test_a_step_that_fails_is_named_and_the_next_one_runs(runs):
    code, _, console = runs({"tune 64,3000": FAIL, "next": PASS})
    assert code == 1 and "FAILED: tune 64,3000" in console and "tune 64,3000: failed (exit code 3" in console
    assert "next: passed" in console


def test_a_step_out_of_time_is_killed_and_is_no_failure_unless_it_is_the_first_tests(runs):
    start = time.monotonic()
    code, _, console = runs({"slow": HANG}, 1.0)
    assert code == 0 and "slow: unfinished" in console and time.monotonic() - start < 20
    code, _, console = runs({run.FIRST_TESTS: HANG, "late": PASS}, 1.0)
    assert code == 1 and f"FAILED: {run.FIRST_TESTS}" in console


def test_nothing_starts_when_the_time_is_spent(runs):
    code, _, console = runs({"one": PASS, "two": PASS}, 0.0)
    assert code == 0 and console.count("not run (the time was spent)") == 2


def test_a_run_that_is_told_to_stop_keeps_what_it_has(runs):
    code, names, console = runs({"one": PASS, "two": STOP, "three": PASS})
    assert code == 1 and "gpu/summary.md" in names and "the run: failed (stopped by SIGTERM)" in console
    assert "one: passed" in console and "three" not in console


def test_the_archive_is_there_after_each_step(runs, tmp_path):
    archive = tmp_path / "out" / run.ARCHIVE
    _, _, console = runs({"one": PASS, "two": f"import os; print('archived', os.path.exists({str(archive)!r}))"})
    assert "archived True" in console


def test_of_the_cache_only_the_tuners_choices_are_archived(runs):
    store = "import os, pathlib; c = pathlib.Path(os.environ['XDG_CACHE_HOME']); t = c / 'endoreward_fast/tuned'; "
    store += "t.mkdir(parents=True); (t / 'choice.json').touch(); (c / 'compiled.so').touch()"
    _, names, _ = runs({"tune": store})
    assert "gpu/tuned/choice.json" in names and not any("compiled.so" in name for name in names)


# ------------------------------------------------------------------------------------------------ the real steps


def test_the_order_is_correctness_auto_tuner_peers_rest():
    names = [step.name for step in run.STEPS]
    assert names[:2] == [run.FIRST_TESTS, "gpu-auto"] and names[2].startswith("tune ")
    assert names[3] == "gpu-peers" and names.index("gpu-tuned") < names.index("other tests") < names.index("gpu-sweep")
    assert set(groups.GROUPS) <= set(names)


def test_every_step_has_a_command(tmp_path):
    commands = {step.name: run.command(step.name, 10.0, tmp_path, dry=False) for step in run.STEPS}
    assert all(command[0] == sys.executable and command[1] == "-m" for command in commands.values())
    first, other = (set(commands[name]) for name in (run.FIRST_TESTS, "other tests"))
    assert set(device_tests.FIRST) <= first and not set(device_tests.FIRST) & other and "--collect-only" not in first
    assert {case.only[-1] for case in groups.cases("gpu-auto")} == {groups.OURS[-1]}


def test_files_of_marked_tests_are_found(request):
    """A subset of the suite is enough: each file is checked by the process that collects it."""
    found, absent = device_tests.files()
    listed = {*found, *absent}
    for item in request.session.items:
        file = str(item.path.relative_to(device_tests.ROOT))
        marked = item.get_closest_marker("device") is not None
        assert "device" not in getattr(item, "fixturenames", ()) or marked
        assert not marked or file in listed or file.startswith(device_tests.APART), file


def test_a_file_whose_imports_are_absent_is_left_out_by_name(monkeypatch):
    real = device_tests.importlib.util.find_spec
    monkeypatch.setattr(device_tests.importlib.util, "find_spec", lambda n: None if n == "hypothesis" else real(n))
    found, absent = device_tests.files()
    assert set(device_tests.FIRST) <= set(found)
    assert absent["tests/vocab/test_properties.py"] == "needs hypothesis, which is not installed"
    assert "tests/vocab/test_mutations.py" not in {*found, *absent}, "it runs in the interpreter, not on the device"


# ------------------------------------------------------------------------------------------------ wheels


def wheel(folder, name: str, files: dict[str, str], tag="py3-none-any"):
    path, info = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as out:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            out.writestr(file, text)


def test_carried_wheels_are_seen_by_steps_only_and_a_bad_one_is_named(tmp_path, runs):
    carried = tmp_path / "wheels"
    carried.mkdir()
    wheel(carried, "one_half", {"shared_folder/one.py": "", "hidden/behind_pth.py": "", "half.pth": "hidden\n"})
    wheel(carried, "other_half", {"shared_folder/other.py": ""})
    wheel(carried, "for_another_python", {"x.py": ""}, tag="cp27-cp27m-manylinux1_x86_64")
    environment, failed = wheels.install(carried, tmp_path)
    assert list(failed) == ["for_another_python-1.0-cp27-cp27m-manylinux1_x86_64.whl"]
    assert "not a supported wheel" in next(iter(failed.values()))
    code = "import shared_folder.one, shared_folder.other, behind_pth; print(shared_folder.one.__file__)"
    seen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "/site-packages/" in seen.stdout
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
    assert wheels.install(tmp_path / "nothing", tmp_path)[1] == {str(tmp_path / "nothing"): "the folder has no wheel"}


# ------------------------------------------------------------------------------------------------ targets


def record(folder, group: str, subject: str, shape: str, rows: int, **peers) -> None:
    fields = {"ratio": None, "of_ceiling": None, "median_s": None, "extra_mib": None}
    found = {name.replace("_fast_", "_fast, "): fields | values for name, values in peers.items()}
    case = {"subject": subject, "shape": shape, "rows": rows, "peers": found}
    (folder / f"{group}.json").write_text(json.dumps({"environment": {}, "cases": [case, {"failed": "x"}]}))


def test_targets_are_read_from_the_records(tmp_path):
    ours = {"endoreward_fast_fused": {"ratio": 1.2, "extra_mib": 40.0}, "endoreward_fast_auto": {"ratio": 1.04}}
    record(tmp_path, "gpu-auto", "linear", "qwen3-8b", 8192, other={"ratio": 0.9}, **ours)
    record(tmp_path, "gpu-tuned", "linear", "qwen3-1.7b", 8192, endoreward_fast_auto={"ratio": 1.06})
    record(
        tmp_path, "gpu-peers", "linear forward+backward", "llama3-8b", 4096, endoreward_fast_auto={"median_s": 0.016}
    )
    record(tmp_path, "gpu-logits", "logits", "qwen3-0.6b", 8192, endoreward_fast_fused={"of_ceiling": 0.91})
    lines = targets.table(tmp_path).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["yes", "NO", "", "yes", "yes", "NO"]
    assert "1.04 x | auto, gpu-auto" in lines[0] and "not measured" in lines[2] and "16 ms" in lines[4]
    assert "40 MiB | fused, gpu-auto" in lines[5]


def test_every_target_is_measured_by_a_group():
    planned = {(c.subject, c.shape, c.rows) for c in groups.cases("gpu-auto")}
    assert all((t.subject, t.shape, t.rows) in planned for t in targets.TARGETS)
