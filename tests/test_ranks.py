"""Rows shared by ranks: real launches by torchrun and accelerate, against one process; a rank that is killed."""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Barrier, Thread

import psutil
import pytest
import torch

from cli_harness import LengthScorer, put, rows_of, run
from endoreward_fast import EndoRewardError
from endoreward_fast.command import pipeline
from endoreward_fast.command.board import Board, call
from endoreward_fast.command.data import open_source
from endoreward_fast.command.jobs import Finished, Job, Windows, note_idle
from endoreward_fast.command.options import EngineFlags
from endoreward_fast.command.output import Monitor
from endoreward_fast.command.ranks import Rank, _InOrder, help_out, lead
from endoreward_fast.command.resume import key_of, rows_left

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--max-tokens-per-batch", "32")  # windows of about a thousand characters
TORCHRUN = ("torch.distributed.run", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--num_processes")  # fmt: skip


def questions(count):
    return [
        {"id": i, "prompt": f"What is {i % 89} + {i % 7}?", "completion": str(i % 89 + i % 7)} for i in range(count)
    ]


def launched(arguments, launcher=()):
    """The command in processes of its own, one thread each; `launcher` says how many."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    module = ("-m", launcher[0], *launcher[1:]) if launcher else ()
    return subprocess.Popen(
        [sys.executable, *module, "-m", "endoreward_fast", *map(str, arguments)],
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process):
    """(exit code, what it said)."""
    try:
        _, said = process.communicate(timeout=240)
    finally:
        process.terminate()  # a launcher that hangs takes its ranks with it
    return process.returncode, said


@pytest.mark.parametrize(("launcher", "ranks"), [(TORCHRUN, 3), (ACCELERATE, 2)])
def test_the_output_is_that_of_one_process_to_the_byte(tmp_path, launcher, ranks):
    rows = [*questions(60), "not json", {"prompt": "p"}, *questions(90)]
    source, alone, shared = put(tmp_path, *rows), tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    command = ["rank" if ranks == 3 else "score", source, *SMALL, "--per-token", "-o"]
    if ranks == 3:
        command[1] = put(tmp_path, *({"prompt": r["prompt"], "completions": ["1", r["completion"]]} for r in rows[:60]))
    code, said = ended(launched([*command, alone]))
    assert code == (0 if ranks == 3 else 2), said
    code, said = ended(launched([*command, shared], (*launcher, str(ranks))))
    assert (code == 0) == (ranks == 3), said
    assert shared.read_bytes() == alone.read_bytes()
    settings = [Path(f"{path}.settings.json").read_bytes() for path in (alone, shared)]
    assert settings[0] == settings[1]
    if ranks == 2:  # rank 0 alone speaks, and once
        assert said.count("endoreward: line 61: not valid JSON") == 1
        assert said.count("endoreward: scored 150 of 152 rows") == 1


def kill_rank_1(process):
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children() if p.is_running()}
    ranks["1"].kill()


def until_written(process, path, size):
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_size < size:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_is_killed_loses_nothing(tmp_path, restarts):
    """The launcher ends the others, and starts them anew if it may: --resume goes on."""
    source, out, alone = put(tmp_path, *questions(600)), tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    command = ["score", source, *SMALL, "--resume", "-o"]
    process = launched([*command, out], (TORCHRUN[0], f"--max-restarts={restarts}", TORCHRUN[1], "2"))
    until_written(process, out, 4_000)
    kill_rank_1(process)
    code, said = ended(process)
    if restarts:
        assert code == 0, said
    else:
        assert code != 0 and 0 < out.read_text().count("\n") < 600
        run(*command, out, "-q")
    run("score", source, "-o", alone, "-q")
    found, wanted = rows_of(out.read_text()), rows_of(alone.read_text())
    assert [row["id"] for row in found] == [row["id"] for row in wanted]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-4)


# ---------------------------------------------------------------- bad input
@pytest.fixture
def rank_0_of_2(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")


def test_what_ranks_cannot_do_is_said_once(rank_0_of_2, monkeypatch, tmp_path):
    assert "cannot share standard input" in run("score", "-", code=2, input="{}").stderr
    assert "no such file" in run("score", tmp_path / "absent", code=2).stderr
    os.mkfifo(tmp_path / "pipe")  # each would read some of it
    assert "or a pipe: name a file" in run("score", tmp_path / "pipe", code=2).stderr
    said = run("eval", tmp_path / "absent", code=2).stderr
    assert (
        said == "endoreward: eval runs in one process: start it without a launcher (score and rank share their rows)\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert run("eval", tmp_path / "absent", code=0).stderr == ""  # or the launcher might end rank 0 before it speaks
    monkeypatch.delenv("MASTER_PORT")
    assert "WORLD_SIZE is 2, and MASTER_PORT is not set" in run("score", "-", code=2).stderr
    monkeypatch.setenv("WORLD_SIZE", "many")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "WORLD_SIZE is 'many': expected a number" in run("score", "-", code=2).stderr
    for port, number, said in (
        ("1", "2", "RANK is 2 where WORLD_SIZE is 2"),
        ("a", "0", "MASTER_PORT is 'a': expected"),
    ):
        for name, value in (("WORLD_SIZE", "2"), ("RANK", number), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        assert said in run("score", "-", code=2).stderr
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Rank.from_environment() == Rank(0, 1, 0)


@pytest.mark.parametrize("command", ["score", "rank", "eval", "show", "plot", "demo"])
def test_help_needs_no_launch(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and nothing else, as on a machine in a job of its own
    assert f"{command} [OPTIONS]" in run(command, "--help").stdout
    assert run("--version").stdout.startswith("endoreward ")


# ---------------------------------------------------------------- ranks as threads, a made-up scorer
class Together(LengthScorer):
    """Scores its first window only when every rank has one."""

    def __init__(self, barrier, scored):
        super().__init__()
        self.barrier, self.scored = barrier, scored

    def iter_scores(self, rows, **options):
        self.scored.extend(row["completion"] for row in rows)
        if self.barrier is not None:
            self.barrier.wait(20)
            self.barrier = None
        return super().iter_scores(rows, **options)


def shared(monkeypatch, job, source, *, ranks=3, done=()):
    """What `ranks` of them write of `source`, a row a window: (lines, the monitor, what stopped them)."""
    board = Board(torch.distributed.HashStore())
    monkeypatch.setattr(Board, "of_launch", lambda: board)
    barrier, scored = Barrier(ranks), []
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: Together(barrier, scored))
    done = Counter(key_of(row, job.flags.id) for row in done)
    others = [Thread(target=help_out, args=(job, Rank(r, ranks, r), str(source)), daemon=True) for r in range(1, ranks)]
    for other in others:
        other.start()
    lines, monitor, stopped = [], Monitor(quiet=True), None
    opened = rows_left(str(source), job.flags, done)
    first, windows = pipeline.peek(pipeline.windows(opened, "score", job.flags))
    try:
        lead(job, Rank(0, ranks, 0), str(source), done, idle=not first)(windows, lines.append, monitor)
    except EndoRewardError as error:
        stopped = str(error)
    else:
        attempt = board.part(board.get("attempt"))
        assert all(attempt.has(f"rank {r} left") for r in range(1, ranks))  # rank 0 is the last to go
    for other in others:
        other.join(30)
        assert not other.is_alive()
    assert stopped or len(scored) == sum("completion" in json.loads(line) for line in lines)  # each of them once
    return [json.loads(line) for line in lines], monitor, stopped


A_ROW_A_WINDOW = EngineFlags(max_tokens_per_batch=1)


def lengths(count):
    return [{"id": i, "prompt": "p" * 20, "completion": "a" * (1 + i % 7)} for i in range(count)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_row_comes_once_and_in_order(monkeypatch, tmp_path, ranks):
    source = put(tmp_path, *lengths(20), "not json", {"prompt": "p"}, *lengths(3))
    found, monitor, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), source, ranks=ranks)
    assert stopped is None and len(found) == 25
    assert [row["score"] for row in found[:20]] == [-float(1 + i % 7) for i in range(20)]
    assert (monitor.rows, monitor.failed, monitor._done) == (25, 2, 25)
    assert monitor.tokens == sum(1 + i % 7 for i in range(20)) + 6


def test_ranks_keep_to_the_limit_and_leave_out_what_is_done(monkeypatch, tmp_path):
    rows = lengths(20)
    job = Job("score", replace(A_ROW_A_WINDOW, limit=15))
    found, *_ = shared(monkeypatch, job, put(tmp_path, *rows), done=rows[2:9])
    assert [row["id"] for row in found] == [0, 1, *range(9, 15)]
    by_id = replace(job, flags=replace(job.flags, id="id"))
    found, *_ = shared(monkeypatch, by_id, put(tmp_path, *rows), done=[{"id": n} for n in (0, 3)])
    assert [row["id"] for row in found] == [1, 2, *range(4, 15)]


def test_what_stops_ranks_comes_after_the_rows_before_it(monkeypatch, tmp_path):
    bad = {"id": 7, "prompt": "p" * 20, "completion": "LONG"}
    source = put(tmp_path, *lengths(7), bad, *lengths(3))
    found, _, stopped = shared(monkeypatch, Job("score", replace(A_ROW_A_WINDOW, strict=True)), source)
    assert stopped.startswith("line 8: 9 tokens") and [row["id"] for row in found] == list(range(8))
    source = put(tmp_path, *lengths(7), {"prompt": "p"}, *lengths(3))  # which reading finds
    found, _, stopped = shared(monkeypatch, Job("score", replace(A_ROW_A_WINDOW, strict=True)), source)
    assert stopped.startswith("line 8: ") and [row["id"] for row in found] == list(range(7))


def test_a_file_that_breaks_off_is_said_after_its_rows(monkeypatch, tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(put(tmp_path, *lengths(150)).read_bytes(), 0)[:-3000])
    alone = [record.row["id"] for record in islice(open_source(str(torn)).records, 100)]
    found, _, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), torn)
    assert f"cannot read {torn} to its end" in stopped
    assert [row["id"] for row in found[:100]] == alone and 100 <= len(found) < 150


def test_where_all_is_done_no_rank_loads_a_model(monkeypatch, tmp_path):
    rows = lengths(4)
    monkeypatch.setattr(Job, "load", None)
    found, monitor, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), put(tmp_path, *rows), done=rows)
    assert (found, monitor.rows, stopped) == ([], 0, None)


@pytest.mark.parametrize("more", [-3, 3])
def test_ranks_that_read_different_rows_do_not_wait_for_each_other(monkeypatch, tmp_path, more):
    """The input grows, or is cut, between rank 0's reading and the others'."""
    source = put(tmp_path, *lengths(9))
    theirs = put(tmp_path, *lengths(9 + more), name="theirs.jsonl")
    monkeypatch.setattr("endoreward_fast.command.ranks.rows_left", lambda file, *about: rows_left(theirs, *about))
    found, _, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), source)
    assert "the ranks read different rows" in stopped and "--resume goes on" in stopped
    assert [row["id"] for row in found] == list(range(len(found)))


def test_an_input_that_is_another_on_another_machine_is_refused(monkeypatch, tmp_path):
    board, source = Board(torch.distributed.HashStore()), put(tmp_path, *lengths(9))
    monkeypatch.setattr(Board, "of_launch", lambda: board)
    leader = Thread(target=call, args=(board, 2, {"done": {}, "size": 1234}), daemon=True)
    leader.start()
    with pytest.raises(EndoRewardError, match=r"in.jsonl is not the one that rank 0 reads, which has 1,234 bytes"):
        help_out(Job("score", A_ROW_A_WINDOW), Rank(1, 2, 1), str(source))
    leader.join(20)


def test_ctrl_c_keeps_what_rank_0_finished(monkeypatch, tmp_path):
    """Past a window that another rank has not handed in, and may never."""
    board, lines = Board(torch.distributed.HashStore()), []
    monkeypatch.setattr("endoreward_fast.command.ranks.call", lambda *about: board)
    monkeypatch.setattr(Board, "of_launch", lambda: board)
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: LengthScorer())
    board.claim()  # window 0, by a rank that is gone
    source = put(tmp_path, *lengths(5))
    windows = pipeline.windows(open_source(str(source)), "score", A_ROW_A_WINDOW)

    def interrupt(seconds):
        raise KeyboardInterrupt

    engine = lead(Job("score", A_ROW_A_WINDOW), Rank(0, 2, 0), str(source), Counter(), idle=False)
    monkeypatch.setattr("endoreward_fast.command.ranks.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine(windows, lines.append, Monitor(quiet=True))
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3, 4]


def test_what_a_rank_is_warned_of_is_said_once_by_rank_0(monkeypatch, tmp_path, capsys):
    def warned(self, rows, **options):
        warnings.warn("out of memory with max_tokens_per_batch=1: it is halved", stacklevel=2)
        return LengthScorer.iter_scores(self, rows, **options)

    (items,) = pipeline.windows(open_source(put(tmp_path, *lengths(2))), "score", EngineFlags())
    monkeypatch.setattr(Together, "iter_scores", warned)
    monitor = Monitor()
    for _ in range(2):
        found = Job("score", EngineFlags()).finish(items, Together(None, []))
        Finished.from_json(found.to_json()).hand_on(lambda line: None, monitor)
    assert capsys.readouterr().err == "endoreward: out of memory with max_tokens_per_batch=1: it is halved\n"


# ---------------------------------------------------------------- the parts
def test_a_store_that_cannot_be_reached_is_one_clear_line(rank_0_of_2, monkeypatch, tmp_path):
    with socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        said = run("score", put(tmp_path, *lengths(1)), "-o", tmp_path / "out", code=2).stderr
    assert said.startswith("endoreward: the ranks' common store at localhost:") and said.count("\n") == 1


def test_windows_are_written_in_order_whoever_finishes_first(tmp_path):
    board, lines, monitor = Board(torch.distributed.HashStore()), [], Finished()
    output = _InOrder(board, 2, lambda line: (lines.append(line), monitor.rows.append((line, "", None))), monitor)
    windows = {n: Finished([(f"{n}\n", f"line {n}", None)], tokens=n) for n in range(4)}
    board.put("window 1", windows[1].to_json())
    output.own[2] = windows[2]
    output.hand_on()
    assert lines == []  # window 0 is missing
    output.own[0] = windows[0]
    output.hand_on()
    assert lines == ["0\n", "1\n", "2\n"] and monitor.tokens == 3
    board.put("window 3", Finished(windows[3].rows, 3, "line 9: no (--strict: stopped here)").to_json())
    with pytest.raises(EndoRewardError, match="line 9"):
        output.hand_on(until=4)
    assert lines[3] == "3\n"  # what was done before is written


def test_a_window_is_finished_with_what_stopped_it(tmp_path):
    rows = [{"prompt": "p", "completion": text} for text in ("a\u2028", "bb", "LONG")]
    flags = EngineFlags(strict=True)
    (items,) = pipeline.windows(open_source(put(tmp_path, *rows)), "score", flags)
    found = Job("score", flags).finish(items, LengthScorer())
    assert Finished.from_json(found.to_json().encode()) == found
    assert "line 3: 9 tokens" in found.stopped
    assert [where for _, where, _ in found.rows] == ["line 3"]  # scored last first: what is done is kept
    (items,) = pipeline.windows(open_source(put(tmp_path, *rows)), "score", EngineFlags())
    found = Job("score", EngineFlags()).finish(items, LengthScorer())
    assert [(where, problem and problem[:8]) for _, where, problem in found.rows] == [
        ("line 1", None), ("line 2", None), ("line 3", "9 tokens"),
    ]  # fmt: skip
    assert found.tokens == 8 and found.stopped is None


def test_reading_that_fails_comes_after_what_was_read():
    def windows():
        yield ["a"]
        raise EndoRewardError("torn")

    read = Windows(windows())
    assert list(read) == [["a"]] and read.count == 1
    with pytest.raises(EndoRewardError, match="torn"):
        read.raise_error()


def test_workers_without_rows_are_named(capsys):
    for windows, said in ((1, "only 1 of 2 ranks had rows"), (2, "")):
        note_idle(Monitor(), windows, 2, "ranks")
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


def test_each_rank_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, flags, device in (
        (Rank(0, 8, 0), EngineFlags(), "cuda:0"),
        (Rank(6, 8, 3), EngineFlags(device="cuda"), "cuda:3"),
        (Rank(7, 8, 7), EngineFlags(), "cuda:3"),  # more ranks than devices share them
        (Rank(7, 8, 3), EngineFlags(device="cpu"), "cpu"),
        (Rank(7, 8, 3), EngineFlags(device="cuda:1"), "cuda:1"),
    ):
        assert rank.flags(flags).device == device
        assert rank.flags(flags).quiet == (rank.rank > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows each its own alone
    assert Rank(1, 2, 1).flags(EngineFlags()).device == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Rank(1, 2, 1).flags(EngineFlags()).device is None
