"""Outputs that cannot be written, inputs that would be overwritten, and interruptions: no computed row is lost."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli_harness import PAIR, LengthScorer, put, rows_of, run
from endoreward_fast.command.evaluate import side_by_side
from endoreward_fast.command.run import pipeline
from endoreward_fast.command.run.interrupted import resume_command

ROOT = Path(__file__).resolve().parents[2]
BOTH = {"id": 7, "prompt": "p", "completion": "abc", "chosen": "a", "rejected": "bb"}
PREFERENCES = [{"n": n, "prompt": "p", "chosen": "a", "rejected": "bb"} for n in range(4)]
COMMANDS = ("score", "rank", "eval", "show", "plot")


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    """No model is looked for: its weights have a made-up name."""
    monkeypatch.setattr(side_by_side, "weights_of", lambda name, **where: "weights")


# ---------------------------------------------------------------- where results go


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("output", ["", "x" * 300 + ".png", "in.jsonl/x.png", "nowhere/x.png", "folder.png"])
def test_an_impossible_output_is_one_line_before_a_model_is_loaded(command, output, scorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    result = run(command, put(tmp_path, BOTH).name, "-o", output, code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("endoreward: ") and scorer.loaded == []
    assert ("--output is empty" if output == "" else f"cannot write {output}: ") in result.stderr


def test_an_empty_name_of_a_page_is_refused(scorer, tmp_path):
    assert "--html is empty" in run("show", put(tmp_path, PAIR), "--html", "", code=2).stderr


@pytest.mark.parametrize("side", [".part", ".settings.json", ".settings.json.part"])
def test_files_written_beside_an_output_must_not_be_inputs(side, scorer, tmp_path):
    source = put(tmp_path, PAIR, name=f"out.jsonl{side}")
    before = source.read_text()
    said = run("score", source, "-o", tmp_path / "out.jsonl", code=2).stderr
    assert f"{source} is the input, and would be written beside {tmp_path / 'out.jsonl'}" in said
    assert source.read_text() == before and not (tmp_path / "out.jsonl").exists() and scorer.loaded == []


@pytest.mark.parametrize("command", ["score", "rank", "eval", "show"])
@pytest.mark.parametrize("name", ["tools.json", "link", "hard"])
def test_the_file_of_tools_is_an_input(command, name, scorer, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "f"}]')
    (tmp_path / "link").symlink_to(tools)
    os.link(tools, tmp_path / "hard")
    out = tmp_path / name
    said = run(command, put(tmp_path, BOTH), "--tools", tools, "-o", out, "--overwrite", code=2).stderr
    assert f"{out} is the input: name another output" in said and tools.read_text() == '[{"name": "f"}]'


def command_line(*arguments, **streams):
    line = [sys.executable, "-m", "endoreward_fast", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, timeout=120, text=True, stderr=subprocess.PIPE, check=False, **streams)


def test_standard_streams_that_are_the_input_are_refused(tmp_path):
    """`score FILE >> FILE` would read its own output; `score - -o FILE < FILE` would empty its input."""
    source = put(tmp_path, PAIR)
    before = source.read_text()
    with source.open("a") as added:
        assert "standard output goes to the input" in command_line("score", source, stdout=added).stderr
        with source.open() as read:
            assert "standard output goes to the input" in command_line("score", "-", stdin=read, stdout=added).stderr
    with source.open() as read:
        said = command_line("score", "-", "-o", source, "--overwrite", stdin=read, stdout=subprocess.PIPE).stderr
    assert f"{source} is the input" in said and source.read_text() == before


def test_an_evaluation_whose_output_cannot_be_written_is_printed(scorer, tmp_path):
    source = put(tmp_path, *PREFERENCES)
    result = run("eval", source, "-o", "/dev/full", code=2)
    assert "4 rows scored" in result.stdout and "cannot write /dev/full: No space left" in result.stderr
    found = json.loads(run("eval", source, "-o", "/dev/full", "--json", code=2).stdout)
    assert found["complete"] is True and found["files"][0]["scored"] == 4


def test_a_name_that_standard_output_cannot_encode_is_escaped(scorer, tmp_path, monkeypatch):
    if os.name != "posix":
        pytest.skip("file names are always text on this system")
    source = put(tmp_path, *PREFERENCES, name="\udcff.jsonl")
    assert "4 rows scored" in run("eval", source).stdout
    from endoreward_fast.command.run.monitor import say

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    say("± ok\n")
    out.flush()
    assert out.buffer.getvalue() == b"\\xb1 ok\n"


# ---------------------------------------------------------------- ends in the middle


def damaged(folder):
    """Return a gzip file whose second part is truncated after some rows."""
    path = folder / "torn.jsonl.gz"
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in PREFERENCES).encode(), mtime=0)
    path.write_bytes(data + gzip.compress(b"{}\n", mtime=0)[:-6])
    return path


def test_an_evaluation_that_fails_reports_the_rows_it_scored(scorer, tmp_path):
    target = tmp_path / "found.json"
    result = run("eval", damaged(tmp_path), "-o", target, code=2)
    assert "4 rows scored" in result.stdout and "cannot read" in result.stderr.splitlines()[-1]
    found = json.loads(target.read_text())
    assert found["complete"] is False and found["files"][0]["scored"] == 4
    strict = put(tmp_path, *PREFERENCES, {**PREFERENCES[0], "chosen": "LONG"})
    result = run("eval", strict, "--strict", "--max-tokens-per-batch", 1, code=2)
    assert "4 rows scored" in result.stdout and "--strict: stopped here" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_an_evaluation_ended_by_a_signal_reports_the_rows_it_scored(terminal, number, scorer, tmp_path):
    ending(scorer, getattr(signal, number))
    result = run("eval", put(tmp_path, *PREFERENCES), "--max-tokens-per-batch", 1, code=128 + getattr(signal, number))
    assert "rows scored" in result.stdout and "stopped early" in result.stderr


def ending(scorer, number):
    """Make the scorer send this process the signal `number` after five scores."""
    score = scorer.iter_scores
    seen = []

    def ended(rows, **options):
        for found in score(rows, **options):
            seen.append(found)
            if len(seen) == 5:
                os.kill(os.getpid(), number)
            yield found

    scorer.iter_scores = ended


@pytest.fixture
def terminal():
    """SIGHUP as on a terminal, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("command", "name"), [("show", "out.html"), ("show", "out.txt"), ("plot", "out.svg")])
def test_a_picture_shows_the_rows_scored_before_a_signal(command, name, tmp_path):
    if command == "plot":
        pytest.importorskip("matplotlib")
    said = run(command, damaged(tmp_path), "-o", tmp_path / name, "-q", code=2).stderr
    assert "cannot read" in said.splitlines()[-1] and (tmp_path / name).stat().st_size > 100


def test_a_closed_terminal_loses_no_rows(terminal, scorer, tmp_path):
    ending(scorer, signal.SIGHUP)
    source, out = put(tmp_path, *({**PAIR, "n": n} for n in range(9))), tmp_path / "out.jsonl"
    said = run("score", source, "-o", out, code=128 + signal.SIGHUP).stderr
    assert len(rows_of(out.read_text())) >= 4 and "To continue: endoreward score" in said.splitlines()[-1]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        run("score", source, "-o", tmp_path / "all.jsonl")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_to_continue_is_printed_when_quiet_too(scorer, tmp_path):
    scorer.stop_after = 2
    source = put(tmp_path, *({**PAIR, "n": n} for n in range(5)))
    said = run("score", source, "-o", tmp_path / "out.jsonl", "-q", code=130).stderr
    assert "To continue: endoreward score" in said and said.count("\n") == 1


def test_the_command_to_continue_includes_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    wanted = "-m endoreward_fast score in -o out --resume"
    assert resume_command(("score", "in", "-o", "out")) == f"torchrun --nproc-per-node 4 {wanted}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = resume_command(("score", "in", "-o", "out"))
    assert told == f"your launcher on each machine, as before, {wanted}"


# ---------------------------------------------------------------- before a model is read


def test_settings_that_differ_are_quoted_in_a_readable_line(scorer, tmp_path):
    source, out, tools = put(tmp_path, PAIR), tmp_path / "out.jsonl", tmp_path / "tools.json"
    for n in range(2):
        tools.write_text(json.dumps([{"description": "x" * 50_000, "name": f"f{n}", "more": "y" * 999}]))
        flags = ("score", source, "-o", out, "--tools", tools, "--resume", "-q")
        result = run(*flags, code=2 if n else 0)
    was, now = result.stderr.split("was made with tools=")[1].split(", not ")
    assert '"name": "f0"' in was and '"name": "f1"' in now and len(result.stderr) < 600


def test_a_gguf_file_may_be_named_as_model(scorer, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    monkeypatch.setattr(pipeline, "load_reward_model", lambda flags, name: LengthScorer())
    monkeypatch.setattr(pipeline, "refuse_other_models", lambda flags: None)
    for flag in ("-m", "--reward-model"):
        run("eval", put(tmp_path, *PREFERENCES), flag, path, "-q")
    path.write_bytes(b"other")
    assert "is a file, but not a GGUF file" in run("score", put(tmp_path, PAIR), "-m", path, code=2).stderr


def test_a_revision_of_a_local_model_is_refused(scorer, tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    for model in ("pocket", tmp_path, file):
        said = run("score", put(tmp_path, PAIR), "-m", model, "--revision", "main", code=2).stderr
        assert "--revision: model " in said and "only models on the Hub have revisions" in said


def test_the_wrong_kind_of_comparison_model_is_refused_before_loading(scorer, tmp_path):
    """Its configuration tells. Loading weights may take minutes."""
    source = put(tmp_path, *PREFERENCES)
    for flags, error in (
        (("--reward-model", "pocket"), "model 'pocket' is a SmolLM3ForCausalLM, which is not a reward model"),
        (("--reward-model", tmp_path), "cannot be loaded: Unrecognized model"),
        (("--reference-model", tmp_path, "--signals", "all"), "cannot be loaded: Unrecognized model"),
    ):
        assert error in run("eval", source, *flags, "-q", code=2).stderr and scorer.loaded == []


def test_a_missing_device_is_refused_before_a_model_is_looked_up(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = run("score", put(tmp_path, PAIR), "-m", "no/such-model", "--device", "gpu", code=2).stderr
    assert said.startswith("endoreward: device 'cuda' cannot be used: ") and said.count("\n") == 1


CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_prompt_of_calls_and_parts_is_shown(tmp_path):
    """A turn of tool calls may have no content."""
    parts = {"role": "user", "content": [{"type": "text", "text": "of parts"}]}
    turns = [parts, {"role": "assistant", "tool_calls": CALLS}, {"role": "assistant", "content": "x"}]
    told = run("show", put(tmp_path, {"messages": turns}), "-q", code=(0, 2)).stdout
    assert "user: of parts" in told and '"name": "f"' in told and "None" not in told


@pytest.mark.parametrize(
    ("text", "settings"),
    [("[" * 99_999 + "\n", None), ('{"score": 1' + "0" * 5000 + "}\n", None), (None, "[" * 99_999)],
)
def test_an_output_or_settings_with_any_contents_are_one_clear_line(text, settings, scorer, tmp_path):
    source, out = put(tmp_path, PAIR), tmp_path / "out.jsonl"
    run("score", source, "-o", out, "-q")
    if text:
        out.write_text(text)
    if settings:
        Path(f"{out}.settings.json").write_text(settings)
    said = run("score", source, "-o", out, "-q", "--resume", code=2).stderr
    assert "line 1 is not a row of results" in said if text else "settings.json is missing or damaged" in said


def test_old_results_stay_if_their_settings_cannot_be_replaced(scorer, tmp_path):
    source, out = put(tmp_path, PAIR), tmp_path / "out.jsonl"
    out.write_text("mine\n")
    Path(f"{out}.settings.json").mkdir()
    said = run("score", source, "-o", out, "-q", "--overwrite", code=2).stderr
    assert f"cannot write {out}.settings.json: Is a directory" in said and out.read_text() == "mine\n"


def test_a_limit_beyond_every_file_reads_all_rows(scorer, tmp_path):
    assert len(rows_of(run("score", put(tmp_path, PAIR), "--limit", 10**30, "-q").stdout)) == 1


def test_an_empty_array_is_named_as_such(scorer, tmp_path):
    said = run("score", put(tmp_path, PAIR, {"messages": []}, {"prompt": [], "completion": "x"}), code=2).stderr
    assert 'messages: wanted an array of {"role", "content"} objects, found an empty array' in said
    assert "prompt: wanted text or messages, found an empty array" in said
