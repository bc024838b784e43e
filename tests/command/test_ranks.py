"""Ranks share rows: real launches by torchrun and accelerate give the output of one process; a rank is killed."""

import gzip
import json
import os
import signal
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
from types import SimpleNamespace

import psutil
import pytest
import torch

from cli_harness import LengthScorer, put, rows_of, run
from endoreward_fast import EndoRewardError
from endoreward_fast.command.flags.engine_flags import EngineFlags
from endoreward_fast.command.run import pipeline
from endoreward_fast.command.run.jobs import Finished, InOrder, Job, Windows, note_idle
from endoreward_fast.command.run.monitor import Monitor
from endoreward_fast.command.run.ranks import Rank, help_out, lead
from endoreward_fast.command.run.ranks_board import Board, call
from endoreward_fast.command.run.ranks_clerk import Clerk
from endoreward_fast.command.run.resume import key_of, rows_left
from endoreward_fast.data.files import open_source
from endoreward_fast.model.checkpoint import weights_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--max-tokens-per-batch", "32")  # gives windows of about a thousand characters
TORCHRUN = ("torch.distributed.run", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--num_processes")  # fmt: skip


def questions(count):
    return [
        {"id": i, "prompt": f"What is {i % 89} + {i % 7}?", "completion": str(i % 89 + i % 7)} for i in range(count)
    ]


def launched(arguments, launcher=()):
    """Start the command in separate processes with one thread each. `launcher` says how many."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    module = ("-m", launcher[0], *launcher[1:]) if launcher else ()
    return subprocess.Popen(
        [sys.executable, *module, "-m", "endoreward_fast", *map(str, arguments)],
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process):
    """Wait and return (exit code, standard error)."""
    try:
        _, said = process.communicate(timeout=240)
    finally:
        process.terminate()  # ends the ranks of a launcher that hangs
    return process.returncode, said


@pytest.mark.parametrize(("launcher", "ranks"), [(TORCHRUN, 3), (ACCELERATE, 2)])
def test_several_ranks_write_the_bytes_of_one_process(tmp_path, launcher, ranks):
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
    if ranks == 2:  # only rank 0 prints, once
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
def test_a_killed_rank_loses_no_rows(tmp_path, restarts):
    """The launcher ends the other ranks. It restarts all of them if allowed; otherwise --resume continues."""
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


def test_what_ranks_cannot_do_is_refused_once(rank_0_of_2, monkeypatch, tmp_path):
    assert "cannot read standard input or a pipe: name a file" in run("score", "-", code=2, input="{}").stderr
    assert "no such file" in run("score", tmp_path / "absent", code=2).stderr
    os.mkfifo(tmp_path / "pipe")  # each rank would read a part of it
    assert "or a pipe: name a file" in run("score", tmp_path / "pipe", code=2).stderr
    said = run("eval", tmp_path / "absent", code=2).stderr
    assert said == (
        "endoreward: eval runs in one process: start it without a launcher (only score and rank run in several)\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert run("eval", tmp_path / "absent", code=0).stderr == ""  # a failure might end rank 0 before it prints
    monkeypatch.delenv("MASTER_PORT")
    assert "WORLD_SIZE is 2, but MASTER_PORT is not set" in run("score", "-", code=2).stderr
    monkeypatch.setenv("WORLD_SIZE", "many")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "WORLD_SIZE is 'many': expected a number" in run("score", "-", code=2).stderr
    for port, number, said in (
        ("1", "2", "RANK is 2, but WORLD_SIZE is 2"),
        ("a", "0", "MASTER_PORT is 'a': expected"),
        ("65536", "0", "MASTER_PORT is 65536: use a port from 1 to 65535"),
    ):
        for name, value in (("WORLD_SIZE", "2"), ("RANK", number), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        assert said in run("score", "-", code=2).stderr
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Rank.from_environment() == Rank(0, 1, 0)


@pytest.mark.parametrize("command", ["score", "rank", "eval", "show", "plot", "demo"])
def test_help_ignores_the_launchers_variables(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no other variable of a launcher
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


def shared(monkeypatch, job, source, *, ranks=3, done=(), load=None):
    """Score `source` on `ranks` threads, one row per window. Returns (lines, monitor, error message or None)."""
    board = Board(torch.distributed.HashStore())
    monkeypatch.setattr(Board, "of_launch", lambda: board)
    barrier, scored = Barrier(ranks), []
    monkeypatch.setattr(pipeline, "load_scorer", load or (lambda flags: Together(barrier, scored)))
    done = Counter(key_of(row, job.flags.id) for row in done)
    others = [Thread(target=help_out, args=(job, Rank(r, ranks, r)), daemon=True) for r in range(1, ranks)]
    for other in others:
        other.start()
    lines, monitor, stopped = [], Monitor(quiet=True), None
    opened = rows_left(open_source(str(source), job.flags.limit), job.flags, done, [])
    first, windows = pipeline.peek(pipeline.windows(opened, "score", job.flags))
    try:
        lead(job, Rank(0, ranks, 0), weights_of("pocket"), idle=not first)(windows, lines.append, monitor)
    except EndoRewardError as error:
        stopped = str(error)
    else:
        attempt = board.part(board.get("attempt").decode())
        assert all(attempt.has(f"rank {r} left") for r in range(1, ranks))  # rank 0 leaves last
    for other in others:
        other.join(30)
        assert not other.is_alive()
    if not stopped and load is None:  # each row was scored once
        assert len(scored) == sum("completion" in json.loads(line) for line in lines)
    return [json.loads(line) for line in lines], monitor, stopped


A_ROW_A_WINDOW = EngineFlags(max_tokens_per_batch=1)


def lengths(count):
    return [{"id": i, "prompt": "p" * 20, "completion": "a" * (1 + i % 7)} for i in range(count)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_row_is_written_once_and_in_order(monkeypatch, tmp_path, ranks):
    source = put(tmp_path, *lengths(20), "not json", {"prompt": "p"}, *lengths(3))
    found, monitor, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), source, ranks=ranks)
    assert stopped is None and len(found) == 25
    assert [row["score"] for row in found[:20]] == [-float(1 + i % 7) for i in range(20)]
    assert (monitor.rows, monitor.failed, monitor._done) == (25, 2, 25)
    assert monitor.tokens == sum(1 + i % 7 for i in range(20)) + 6


def test_ranks_respect_the_limit_and_skip_rows_that_are_done(monkeypatch, tmp_path):
    rows = lengths(20)
    job = Job("score", replace(A_ROW_A_WINDOW, limit=15))
    found, *_ = shared(monkeypatch, job, put(tmp_path, *rows), done=rows[2:9])
    assert [row["id"] for row in found] == [0, 1, *range(9, 15)]
    by_id = replace(job, flags=replace(job.flags, id="id"))
    found, *_ = shared(monkeypatch, by_id, put(tmp_path, *rows), done=[{"id": n} for n in (0, 3)])
    assert [row["id"] for row in found] == [1, 2, *range(4, 15)]


def test_an_error_stops_ranks_after_the_rows_before_it(monkeypatch, tmp_path):
    bad = {"id": 7, "prompt": "p" * 20, "completion": "LONG"}
    source = put(tmp_path, *lengths(7), bad, *lengths(3))
    found, _, stopped = shared(monkeypatch, Job("score", replace(A_ROW_A_WINDOW, strict=True)), source)
    assert stopped.startswith("line 8: 9 tokens") and [row["id"] for row in found] == list(range(7))
    source = put(tmp_path, *lengths(7), {"prompt": "p"}, *lengths(3))  # reading finds this error, not scoring
    found, _, stopped = shared(monkeypatch, Job("score", replace(A_ROW_A_WINDOW, strict=True)), source)
    assert stopped.startswith("line 8: ") and [row["id"] for row in found] == list(range(7))


def test_a_truncated_file_is_reported_after_its_rows(monkeypatch, tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(put(tmp_path, *lengths(150)).read_bytes(), 0)[:-3000])
    alone = [record.row["id"] for record in islice(open_source(str(torn)).records, 100)]
    found, _, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), torn)
    assert f"cannot read {torn} to its end" in stopped
    assert [row["id"] for row in found[:100]] == alone and 100 <= len(found) < 150


def test_no_rank_loads_a_model_if_all_rows_are_done(monkeypatch, tmp_path):
    rows = lengths(4)
    monkeypatch.setattr(Job, "load", None)
    found, monitor, stopped = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), put(tmp_path, *rows), done=rows)
    assert (found, monitor.rows, stopped) == ([], 0, None)


@pytest.fixture
def board(monkeypatch):
    """Return a board for rank 0 of 2. The test acts as rank 1."""
    made = Board(torch.distributed.HashStore())
    monkeypatch.setattr("endoreward_fast.command.run.ranks.call", lambda *about: made)
    monkeypatch.setattr(Board, "of_launch", lambda: made)
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: LengthScorer())
    return made


def engine_and_windows(tmp_path, count):
    source = put(tmp_path, *lengths(count))
    windows = pipeline.windows(open_source(str(source)), "score", A_ROW_A_WINDOW)
    return lead(Job("score", A_ROW_A_WINDOW), Rank(0, 2, 0), "", idle=False), windows


@pytest.fixture
def ctrl_c():
    """Enable SIGINT, because a shell ignores it for tests that run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_results_handed_in_are_written_when_rank_0_is_ended(board, ctrl_c, tmp_path, how):
    """Ctrl-C or the launcher ends rank 0. It writes the windows after one that another rank never handed in."""
    board.count("claimed")  # window 0, by a rank that has died
    engine, windows = engine_and_windows(tmp_path, 5)
    lines = []

    def write(line):
        os.kill(os.getpid(), signal.SIGINT)  # a launcher signals its ranks again
        os.kill(os.getpid(), signal.SIGTERM)
        lines.append(line)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Thread(target=interrupt, args=(board, 4, how), daemon=True).start()
    with pytest.raises(KeyboardInterrupt if how == signal.SIGINT else SystemExit) as caught:
        engine(windows, write, Monitor(quiet=True))
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3, 4]
    assert how == signal.SIGINT or caught.value.code == 143
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def interrupt(board, handed_in, how):
    while board.count("handed in", 0) < handed_in:
        time.sleep(0.01)
    time.sleep(0.1)  # so that rank 0 is waiting
    os.kill(os.getpid(), how)


def test_a_rank_without_heartbeats_is_named(board, monkeypatch, tmp_path):
    """No launcher sees that a machine is lost. Results that the others handed in are kept."""
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.BEAT", 0.05)
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.LOST", 0.5)
    board.count("claimed")  # window 0, by rank 1, which sends no heartbeat
    board.count("handed in")  # rank 1 died while it handed in a result
    engine, windows = engine_and_windows(tmp_path, 4)
    lines = []
    with pytest.raises(
        EndoRewardError, match=r"rank 1 has sent no heartbeat for 0 minutes\. .*: continue with --resume"
    ):
        engine(windows, lines.append, Monitor(quiet=True))
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3]


def test_a_rank_with_a_recent_heartbeat_or_that_has_left_is_not_lost(monkeypatch):
    now, board = [0.0], Board(torch.distributed.HashStore())
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.time", SimpleNamespace(monotonic=lambda: now[0]))
    clerk = Clerk(board, 3, Windows(iter(())), InOrder(print, Monitor(quiet=True)))

    def lost_at(seconds, *beating):
        now[0] = float(seconds)
        for rank in beating:
            board.count(f"rank {rank} beats")
        return clerk._lost()

    assert [lost_at(11, 1, 2), lost_at(300, 1), lost_at(605), lost_at(606)] == [None] * 4
    assert lost_at(620) == 2
    board.put("rank 2 left", b"")
    assert [lost_at(640), lost_at(895)] == [None, None]
    assert lost_at(910) == 1


def test_a_slow_rank_sends_heartbeats(monkeypatch, tmp_path):
    """Loading the model and scoring a window both take longer than LOST."""
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.BEAT", 0.05)
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.LOST", 0.4)

    class Slow(LengthScorer):
        def iter_scores(self, rows, **options):
            time.sleep(0.9)
            return super().iter_scores(rows, **options)

    def load(flags):
        if not flags.quiet:  # rank 0, which is not slow
            return LengthScorer()
        time.sleep(0.9)
        return Slow()

    found, _, stopped = shared(
        monkeypatch, Job("score", A_ROW_A_WINDOW), put(tmp_path, *lengths(9)), ranks=2, load=load
    )
    assert stopped is None and [row["id"] for row in found] == list(range(9))


def test_a_lost_rank_is_not_waited_for_when_all_is_written(board, monkeypatch, tmp_path):
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.BEAT", 0.05)
    monkeypatch.setattr("endoreward_fast.command.run.ranks_clerk.LOST", 0.3)
    engine, windows = engine_and_windows(tmp_path, 4)
    lines = []
    engine(windows, lines.append, Monitor(quiet=True))
    assert len(lines) == 4


def hand_in(board, number, line):
    finished = Finished(number, [(line, f"line {number + 1}", None)])
    board.put(f"result {board.count('handed in')}", finished.to_json().encode())


def test_results_of_others_are_written_while_rank_0_scores(board, monkeypatch, tmp_path):
    board.count("claimed")  # window 0, by rank 1
    lines, seen = [], []

    class Watching(LengthScorer):
        def iter_scores(self, rows, **options):
            if not seen:
                hand_in(board, 0, '{"id": 0}')
                until(lambda: lines)
                seen.extend(lines)
            return super().iter_scores(rows, **options)

    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: Watching())
    engine, windows = engine_and_windows(tmp_path, 3)
    board.put("rank 1 left", b"")
    engine(windows, lines.append, Monitor(quiet=True))
    assert seen == ['{"id": 0}'] and [json.loads(line)["id"] for line in lines] == [0, 1, 2]


def until(seen):
    deadline = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_few_windows_are_handed_out_before_the_first_is_written():
    """A kill of rank 0 loses at most these windows."""
    board, lines = Board(torch.distributed.HashStore()), []
    output = InOrder(lines.append, Monitor(quiet=True))
    clerk = Clerk(board, 2, Windows([n] for n in range(40)), output)
    clerk.start()
    try:
        until(lambda: board.has("window 7"))
        for number in (2, 3, 1):
            hand_in(board, number, f"{number}")
        time.sleep(0.2)
        assert lines == [] and not board.has("window 8")
        hand_in(board, 0, "0")
        until(lambda: board.has("window 11"))
        time.sleep(0.2)
        assert lines == ["0", "1", "2", "3"] and not board.has("window 12")
        hand_in(board, 6, "6")
    finally:
        clerk.leave()
    clerk.raise_error()
    assert board.get("end") == b"0"  # ranks that wait for a window leave
    output.keep()
    assert lines[4:] == ["6"]


def test_an_output_that_cannot_be_written_ends_rank_0(board, tmp_path):
    def full(line):
        raise EndoRewardError("cannot write out: No space left on device")

    engine, windows = engine_and_windows(tmp_path, 40)
    with pytest.raises(EndoRewardError, match="No space left"):
        engine(windows, full, Monitor(quiet=True))


def test_rank_0_raises_an_unexpected_error_of_the_clerk(board, tmp_path):
    engine, _ = engine_and_windows(tmp_path, 1)
    with pytest.raises(ZeroDivisionError):
        engine(iter([1 / n] for n in (0,)), print, Monitor(quiet=True))


def test_other_weights_of_the_same_name_are_refused(monkeypatch):
    board = Board(torch.distributed.HashStore())
    monkeypatch.setattr(Board, "of_launch", lambda: board)
    leader = Thread(target=call, args=(board, 2, {"weights": "sha256 0", "idle": False}), daemon=True)
    leader.start()
    with pytest.raises(EndoRewardError, match="model 'pocket' has other weights here than on rank 0"):
        help_out(Job("score", A_ROW_A_WINDOW), Rank(1, 2, 1))
    leader.join(20)


def test_each_rank_has_its_own_device_and_only_rank_0_prints(monkeypatch, tmp_path):
    loaded = []

    def load(flags):
        loaded.append((flags.device, flags.quiet))
        return LengthScorer()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found, *_ = shared(monkeypatch, Job("score", A_ROW_A_WINDOW), put(tmp_path, *lengths(5)), ranks=2, load=load)
    assert len(found) == 5 and sorted(loaded) == [("cuda:0", False), ("cuda:1", True)]


def test_only_rank_0_prints_warnings_of_loading(monkeypatch, tmp_path):
    def load(flags):
        warnings.warn("no usable tokenizer", stacklevel=2)
        return LengthScorer()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        board = Board(torch.distributed.HashStore())
        monkeypatch.setattr(Board, "of_launch", lambda: board)
        monkeypatch.setattr(pipeline, "load_scorer", load)
        board.put("end", b"0")
        monkeypatch.setattr(
            "endoreward_fast.command.run.ranks.come",
            lambda *about: (board, {"weights": weights_of("pocket"), "idle": False, "date": None}),
        )
        help_out(Job("score", A_ROW_A_WINDOW), Rank(1, 2, 1))
    assert caught == [] and board.has("rank 1 left")


def test_rank_0_prints_warnings_of_scoring_once(monkeypatch, tmp_path, capsys):
    def warned(self, rows, **options):
        warnings.warn("out of memory with max_tokens_per_batch=1: it is halved", stacklevel=2)
        return LengthScorer.iter_scores(self, rows, **options)

    (items,) = pipeline.windows(open_source(put(tmp_path, *lengths(2))), "score", EngineFlags())
    monkeypatch.setattr(Together, "iter_scores", warned)
    monitor = Monitor()
    for _ in range(2):
        found = Job("score", EngineFlags()).finish(0, items, Together(None, []))
        Finished.from_json(found.to_json()).hand_on(lambda line: None, monitor)
    assert capsys.readouterr().err == "endoreward: out of memory with max_tokens_per_batch=1: it is halved\n"


# ---------------------------------------------------------------- the parts
def test_a_store_that_cannot_be_reached_is_one_clear_line(rank_0_of_2, monkeypatch, tmp_path):
    with socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        said = run("score", put(tmp_path, *lengths(1)), "-o", tmp_path / "out", code=2).stderr
    assert said.startswith("endoreward: the store that the ranks share, at localhost:") and said.count("\n") == 1


def test_windows_are_written_in_order_in_whatever_order_they_finish():
    lines, monitor = [], Finished(-1)
    output = InOrder(lambda line: (lines.append(line), monitor.rows.append((line, "", None))), monitor)
    windows = [Finished(n, [(f"{n}\n", f"line {n}", None)], tokens=n) for n in range(6)]
    output.add(windows[1])
    output.add(windows[2])
    assert lines == [] and output.due == 0
    output.add(windows[0])
    assert lines == ["0\n", "1\n", "2\n"] and monitor.tokens == 3 and output.due == 3
    output.add(windows[5])
    output.add(replace(windows[4], stopped="line 9: no (--strict: stopped here)"))
    with pytest.raises(EndoRewardError, match="line 9"):
        output.add(windows[3])
    assert lines[3:] == ["3\n", "4\n"]  # the rows before the error are written
    output.keep()
    assert lines[5:] == []  # and no rows after it


def test_waiting_windows_are_written_past_gaps():
    lines, monitor = [], Monitor(quiet=True)
    output = InOrder(lines.append, monitor)
    for number in (4, 2, 7):
        output.add(Finished(number, [(str(number), "", None)], stopped="no" if number == 2 else None))
    output.keep()
    assert lines == ["2", "4", "7"] and monitor.rows == 3


def test_a_finished_window_holds_the_error_that_stopped_it(tmp_path):
    rows = [{"prompt": "p", "completion": text} for text in ("a\u2028", "bb", "LONG")]
    flags = EngineFlags(strict=True)
    (items,) = pipeline.windows(open_source(put(tmp_path, *rows[::-1])), "score", flags)
    found = Job("score", flags).finish(7, items, LengthScorer())
    assert Finished.from_json(found.to_json().encode()) == found and found.number == 7
    assert "line 1: 9 tokens" in found.stopped
    assert [where for _, where, _ in found.rows] == ["line 2", "line 3"]  # the scorer starts at the end
    (items,) = pipeline.windows(open_source(put(tmp_path, *rows)), "score", EngineFlags())
    found = Job("score", EngineFlags()).finish(0, items, LengthScorer())
    assert [(where, problem and problem[:8]) for _, where, problem in found.rows] == [
        ("line 1", None), ("line 2", None), ("line 3", "9 tokens"),
    ]  # fmt: skip
    assert found.tokens == 8 and found.stopped is None


def test_a_reading_error_is_raised_after_the_windows_before_it():
    def windows():
        yield ["a"]
        raise EndoRewardError("torn")

    read = Windows(windows())
    assert list(read) == [["a"]] and read.count == 1
    with pytest.raises(EndoRewardError, match="torn"):
        read.raise_error()


def test_workers_without_rows_are_noted(capsys):
    for windows, said in ((1, "only 1 of 2 ranks had rows"), (2, "")):
        note_idle(Monitor(), windows, 2, "ranks")
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


def test_each_rank_has_its_own_device(monkeypatch):
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher makes one device visible to each rank
    assert Rank(1, 2, 1).flags(EngineFlags()).device == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Rank(1, 2, 1).flags(EngineFlags()).device is None
