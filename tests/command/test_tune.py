"""`endoreward tune`: what it prints and stores, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import endoreward_fast as er
from cli_harness import run
from endoreward_fast.command import tune
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.tuning import child
from endoreward_fast.tuning.candidates import candidates
from endoreward_fast.vocab import choice, machine, tuned
from endoreward_fast.vocab.tuned import Choice, Entry, Head

CPU = torch.device("cpu")
SHAPE = ("tune", "--device", "cpu", "--dtype", "fp32", "--shape", "24,333")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty cache folder that is looked into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(tuned.SWITCH, "1")
    monkeypatch.setenv("COLUMNS", "120")
    choice.forget()
    yield tmp_path / "endoreward_fast" / "tuned"
    choice.forget()


@pytest.fixture
def ratios(monkeypatch):
    """Made-up measurements: {candidate: ratio to torch.mm, or problem}. Others take 1.5."""
    found = {}

    def ask(requests, limit):
        [request] = requests
        name = tune_name(request)
        ratio = found.get(name, 1.5)
        if isinstance(ratio, str):
            return [{"problem": ratio}]
        times = {str(n): {"candidate": [ratio] * 3, "matmul": [1.0] * 3} for n in request["rows"]}
        return [{"errors": {"lse": 1e-6}, "times": times}]

    def tune_name(request):
        head = Head(**request["head"])
        return next(c.name for c in candidates(head, CPU) if c.choice == Choice(**request["choice"]))

    monkeypatch.setattr(child, "ask", ask)
    return found


# --- measuring


def test_a_real_tuning_is_stored_and_found_by_auto(folder, monkeypatch):
    """One real process checks and times one candidate."""
    monkeypatch.setattr(tune, "candidates", lambda head, device: candidates(head, device)[:1])
    said = run(*SHAPE, "--seconds", "0.01").stdout
    assert "auto takes `chunked` for this head from now on: it is auto's rule" in said
    [path] = folder.iterdir()
    found = tuned.read(path)
    assert found.head == Head("float32", 24, 333) and found.machine == machine.machine_of(CPU)
    assert set(found.measured["candidates"][0]["errors"]) == {"lse", "target_logit", "entropy"}
    assert tuned.stored_choice(CPU, torch.float32, 24, 333) == Choice("chunked")


def test_the_fastest_candidate_is_taken_and_the_table_says_why(folder, ratios):
    ratios |= {"chunked": 1.0, "chunked, tiles of 4 MiB": 0.8, "chunked, tiles of 8 MiB": "ended by SIGSEGV"}
    lines = run(*SHAPE).stdout.splitlines()
    assert lines[0] == "head: D=24, V=333, float32"
    width = next(line for line in lines if line.endswith("both")).index("16 rows")
    rows = {line[:width].strip(): line[width:].split() for line in lines}
    assert rows["chunked (auto's rule)"] == ["1.00", "(1.00-1.00)"] * 2 + ["1.00"]
    assert rows["chunked, tiles of 4 MiB"][-1] == "0.80"
    assert " ".join(rows["chunked, tiles of 8 MiB"]) == "ended by SIGSEGV"
    taken, why = lines[-2].split(": ")
    assert taken == "auto takes `chunked, tiles of 4 MiB` for this head from now on"
    assert why == "20% less time than chunked, which is auto's rule (0.80 against 1.00)."
    assert rows["taken: chunked, tiles of 4 MiB"] == rows["chunked, tiles of 4 MiB"]
    assert lines[-4].startswith("taken: "), "the last row of the table"
    assert '"both" is the geometric mean of the medians' in " ".join(lines)
    [path] = folder.iterdir()
    assert tuned.read(path).choice == Choice("chunked", {"tile": 2**20})
    assert path.name in lines[-1] and max(map(len, lines[:-2])) <= 120


def test_a_second_tuning_replaces_the_first_even_a_damaged_one(folder, ratios):
    run(*SHAPE)
    [path] = folder.iterdir()
    path.write_text("{")
    ratios["chunked, tiles of 4 MiB"] = 0.5
    run(*SHAPE)
    assert [p.name for p in folder.iterdir()] == [path.name]
    assert tuned.read(path).choice == Choice("chunked", {"tile": 2**20})


def test_a_models_head_is_the_one_that_scoring_looks_up(folder, ratios):
    ratios["chunked, tiles of 4 MiB"] = 0.5
    said = run("tune", "-m", "pocket", "--device", "cpu").stdout
    assert said.startswith("pocket: D=256, V=1024, float32\n")
    with safe_open(pocket_path() / "model.safetensors", "pt") as file:
        vocab, dim = file.get_slice("model.embed_tokens.weight").get_shape()
    assert tuned.stored_choice(CPU, torch.float32, dim, vocab) == Choice("chunked", {"tile": 2**20})


def test_if_every_candidate_fails_nothing_is_stored(folder, ratios):
    ratios |= {c.name: "ended by SIGKILL" for c in candidates(Head("float32", 24, 333), CPU)}
    result = run(*SHAPE, code=2)
    assert result.stdout.count("ended by SIGKILL") == len(ratios)
    assert "no candidate could be measured, so nothing is stored: `endoreward doctor`" in result.stderr
    assert list(folder.iterdir()) == []


def test_the_variable_that_ignores_tunings_is_mentioned(ratios, monkeypatch):
    monkeypatch.setenv(tuned.SWITCH, "0")
    assert run(*SHAPE).stdout.endswith("ENDOREWARD_TUNED=0 is set here, and ignores it.\n")


@pytest.mark.parametrize(
    ("threads", "unit"),
    [
        (1, "Processor time as a ratio"),
        (4, "Close other programs: they slow down calls on 4 threads.\nTime as a ratio"),
    ],
)
def test_on_several_threads_other_programs_disturb_and_the_user_is_told(threads, unit, ratios, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert f"float64.\n{unit} to torch.mm" in run(*SHAPE).stdout


# --- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no head to tune: name a model with --model, or its shape with --shape D,V"),
        (("--shape", "24,333", "-m", "pocket"), "--model and --shape exclude each other: use one of them"),
        (("--shape", "24"), "--shape must be D,V, the width of the hidden states and the size of the vocabulary"),
        (("--shape", "24,333,5"), "got '24,333,5'"),
        (("--shape", "24x333"), "got '24x333'"),
        (("--shape", ""), "got ''"),
        (("--shape", "24,0"), "--shape must be two numbers of 1 or more, got '24,0'"),
        (("--shape", "24,333", "--dtype", "fp64"), "--dtype must be one of auto, fastest, float32, "),
        (("--shape", "24,333", "--dtype", "magic"), "got 'magic'"),
        (("--shape", "24,333", "--device", "magic"), "device 'magic' cannot be used"),
        (("--shape", "24,333", "--seconds", "0"), "--seconds must be above 0, got 0"),
        (("--shape", "24,333", "--seconds", "nan"), "--seconds must be above 0, got nan"),
        (("-m", "./nowhere"), "model './nowhere': there is no such folder"),
        (("-m", ""), "the model's name is empty"),
        (("--show", "--shape", "24,333"), "--show lists every tuned head: leave --model and --shape out"),
    ],
)
def test_bad_input_is_refused_in_one_line(args, message, ratios):
    said = run("tune", *args, code=2).stderr
    assert said.startswith("endoreward: ") and said.count("\n") == 1 and message in said


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(er.EndoRewardError, match="'cuda' does not compute in bfloat16: give --dtype float16"):
        tune.head_to_tune(None, "24,333", "bf16", torch.device("cuda"))
    assert tune.head_to_tune(None, "24,333", "auto", torch.device("cuda")).dtype == "float32"


def test_a_device_that_is_not_tuned_is_refused():
    assert "device 'meta' is not tuned: only CPUs, CUDA and ROCm devices are" in run(
        "tune", "--device", "meta", "--shape", "24,333", code=2
    ).stderr  # fmt: skip


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(folder, monkeypatch, ratios):
    monkeypatch.setattr(child, "ask", lambda *_: pytest.fail("measured"))
    folder.parent.mkdir()
    folder.write_text("a file")
    said = run(*SHAPE, code=2).stderr
    assert (
        "the choice cannot be stored in " in said
        and "name a cache folder that can be written in XDG_CACHE_HOME" in said
    )


def test_another_value_of_the_variable_is_refused(monkeypatch, ratios):
    monkeypatch.setenv(tuned.SWITCH, "yes")
    for args in (SHAPE, ("tune", "--show")):
        assert "ENDOREWARD_TUNED='yes': expected 0 " in run(*args, code=2).stderr


# --- what is stored


def put(folder, found=Choice("chunked"), **about):  # noqa: B008
    measured = {"name": "its name", "score": 0.875, "why": "the reason", "date": "2026-11-29", "threads": 1}
    return tuned.write(
        Entry(Head("float32", 24, 333), replace(machine.machine_of(CPU), **about), found, measured), folder
    )


def test_show_says_that_nothing_is_stored():
    assert run("tune", "--show").stdout == "nothing is tuned: auto follows its rule for every head\n"


def test_show_prints_each_choice_its_ratio_and_why(folder):
    put(folder)
    assert run("tune", "--show").stdout == (
        "D=24, V=333, float32\n"
        "  its name, 0.88 times torch.mm: the reason\n"
        f"  measured on 2026-11-29, {machine.machine_of(CPU).device}, 1 thread\n"
    )


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"triton": "3.0.1"}, "for triton 3.0.1, here "),
        ({"torch": "2.11.0"}, "for torch 2.11.0, here "),
        ({"source": "0"}, "for another version of endoreward_fast's code"),
        ({"device": "NVIDIA H200, 132 processors"}, "for another device, NVIDIA H200, 132 processors"),
        ({"found": Choice("fused")}, "the kernels need a CUDA or ROCm device"),
        ({"found": Choice("magic")}, "there is no implementation 'magic'"),
        ({"found": Choice("chunked", {"magic": 1})}, "magic"),
    ],
)
def test_show_says_why_a_choice_is_not_used(folder, monkeypatch, about, why):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    put(folder, **about)
    assert why in run("tune", "--show").stdout.partition("  NOT USED: ")[2]


def test_show_names_a_file_that_cannot_be_read(folder):
    put(folder).write_text("{")
    (folder / "other.json").write_text(json.dumps({"from": "elsewhere"}))
    said = run("tune", "--show").stdout
    assert said.count("not read: `endoreward tune` did not write it") == 2 and "other.json\n" in said


def test_show_says_that_the_variable_ignores_all(folder, monkeypatch):
    put(folder)
    monkeypatch.setenv(tuned.SWITCH, "0")
    assert "NOT USED: ENDOREWARD_TUNED=0 ignores it" in run("tune", "--show").stdout
