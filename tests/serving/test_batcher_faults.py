"""What can go wrong in and around the thread that scores: every request ends, and nothing is kept of it."""

import gc
import random
import threading
import weakref
from concurrent.futures import CancelledError
from contextlib import contextmanager

import pytest
import torch

from batchers import SHORT, Rounds, hold, row, submit, until
from endoreward_fast.scoring.options import ScoreOptions
from endoreward_fast.serving import batcher as module
from endoreward_fast.serving.batcher import Closed
from served import PATIENCE

BAD = {"prompt_ids": [4, 999], "completion_ids": [8]}


class Panic(BaseException):
    """No Exception, as pyo3_runtime.PanicException, which tokenizers raises."""


def failing(error):
    def fail(batch):
        if (batch == 999).any():
            raise error

    return fail


@contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_the_end_of_the_thread_ends_every_request(pocket, open_batcher, caplog):
    class Bug(Rounds):
        def on_wait(self, seconds):
            super().on_wait(seconds)
            if len(self.waits) == 2:
                raise KeyError("a bug")

    batcher = open_batcher(watch=Bug(), max_tokens=64)
    first = hold(pocket, batcher)
    waiting = [submit(batcher, [row(50, n)]) for n in range(3)]
    until(lambda: batcher.tokens == 150)
    may_read = threading.Event()
    encoding = batcher.submit(1, lambda: may_read.wait(PATIENCE) and [SHORT], ScoreOptions())
    pocket.gate.set()
    assert first.future.result(PATIENCE)
    for asked in [*waiting, encoding]:
        with pytest.raises(Closed, match="scores no more"):
            asked.future.result(PATIENCE)
    may_read.set()
    until(lambda: not batcher.alive())
    with pytest.raises(Closed, match="scores no more"):
        submit(batcher, [SHORT])
    batcher.close()
    assert (batcher.rows, batcher.tokens) == (0, 0) and "the thread that scores has ended" in caplog.text


def test_a_model_that_fails_for_good_ends_the_thread(pocket, open_batcher):
    """After some errors, a GPU does nothing more. Then the server has to be started again."""
    batcher = open_batcher()

    def fail(batch):
        raise RuntimeError("CUDA error: device-side assert triggered")

    pocket.on_batch = fail
    with pytest.raises(RuntimeError, match="device-side"):
        submit(batcher, [SHORT]).future.result(PATIENCE)
    until(lambda: not batcher.alive())


@pytest.mark.parametrize("error", [Panic("a bug"), StopIteration("a bug"), SystemExit("a bug")])
def test_errors_that_would_end_a_loop_end_one_request(pocket, open_batcher, error):
    def read():
        raise error

    batcher = open_batcher()
    pocket.on_batch = failing(error)
    asked = [batcher.submit(1, read, ScoreOptions()), submit(batcher, [BAD])]
    for one in asked:
        with pytest.raises(RuntimeError):
            one.future.result(PATIENCE)
    assert submit(batcher, [SHORT]).future.result(PATIENCE)[0].score is not None
    until(lambda: batcher.rows == 0)


def test_one_bad_request_of_many_costs_few_passes(pocket, open_batcher):
    batcher = open_batcher()
    pocket.on_batch = failing(RuntimeError("a bug"))
    hold(pocket, batcher)
    good = [submit(batcher, [row(20, n)]) for n in range(63)]
    bad = submit(batcher, [BAD])
    until(lambda: batcher.tokens == 63 * 20 + 3)
    del pocket.batches[:]
    pocket.gate.set()
    assert all(asked.future.result(PATIENCE)[0].score is not None for asked in good)
    assert isinstance(bad.future.exception(PATIENCE), RuntimeError)
    until(lambda: batcher.rows == 0)
    assert len(pocket.batches) < 30


def test_a_request_that_is_cancelled_is_not_encoded_further(pocket, open_batcher):
    batcher, read, cancelled = open_batcher(), [], threading.Event()

    def rows():
        for n in range(100):
            read.append(n)
            yield SHORT
            assert cancelled.wait(PATIENCE)

    asked = batcher.submit(100, rows, ScoreOptions())
    until(lambda: read)
    batcher.cancel(asked)
    cancelled.set()
    until(lambda: not batcher._encoding)
    assert len(read) <= 2 and (batcher.rows, batcher.tokens) == (0, 0)


def test_nothing_is_kept_of_a_request_that_is_over(pocket, open_batcher, monkeypatch):
    """Garbage that only the collector finds stays for long, because it looks at all objects seldom."""
    batcher = open_batcher()
    pocket.on_batch = failing(RuntimeError("a bug"))
    monkeypatch.setattr(module.LOG, "disabled", True)  # pytest keeps what is logged
    many = {"most_tokens": 3, "too_many": ValueError}

    def ask(rows, cancel=False, **limits):
        given = [dict(one) for one in rows]
        asked = batcher.submit(len(given), lambda: given, ScoreOptions(per_token=True), **limits)
        if cancel:
            batcher.cancel(asked)
        raised = asked.future.exception(PATIENCE) if not cancel else CancelledError()
        return weakref.ref(asked), type(raised)

    with no_collector():
        found = [ask([SHORT]), ask([BAD]), ask([SHORT], **many), ask([SHORT], cancel=True)]
        assert [kind for _, kind in found] == [type(None), RuntimeError, ValueError, CancelledError]
        ask([SHORT])  # the thread has let go of the round before
        until(lambda: all(reference() is None for reference, _ in found))


def test_batches_grow_again_some_time_after_memory_ran_out(pocket, open_batcher, monkeypatch):
    batcher, most = open_batcher(max_tokens=320), [120]

    def run_out(batch):
        if batch.numel() > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def ask():
        del pocket.batches[:]
        rows = [row(40, n) for n in range(8)]
        assert all(found.score is not None for found in submit(batcher, rows).future.result(PATIENCE))
        return [batch.numel() for batch in pocket.batches]

    pocket.on_batch = run_out
    with pytest.warns(UserWarning, match="halved"):
        assert max(ask()) > 120 >= ask()[0]
    most[0] = 10**9
    assert max(ask()) <= 120  # not yet
    monkeypatch.setattr(module, "REGROW", 0)
    for _ in range(4):
        ask()
    assert pocket.room.tokens is None and max(ask()) > 120


def test_64_threads_that_ask_and_cancel_get_every_answer_once(pocket, open_batcher):
    batcher = open_batcher(max_tokens=512, most_waiting=10**6)
    kinds = [{}, {"alpha": 0.5}, {"reduction": "mean"}, {"per_token": True, "texts": False}]
    rows = [row(4 + n % 60, n) for n in range(40)]
    wanted = [[found.score for found in pocket.score(rows, **kind)] for kind in kinds]
    wrong, ended = [], []

    def ask(seed):
        choose = random.Random(seed)
        for _ in range(5):
            kind, chosen = choose.randrange(len(kinds)), [choose.randrange(40) for _ in range(choose.randrange(4))]
            asked = submit(batcher, [rows[i] for i in chosen], **kinds[kind])
            asked.future.add_done_callback(ended.append)
            if choose.random() < 0.3:
                batcher.cancel(asked)
                continue
            scores = [found.score for found in asked.future.result(PATIENCE)]
            if scores != pytest.approx([wanted[kind][i] for i in chosen], abs=2e-4):
                wrong.append((kind, chosen))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(64)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    until(lambda: (batcher.rows, batcher.tokens, batcher._encoding) == (0, 0, 0))
    assert not wrong and len(ended) == 64 * 5 == len(set(map(id, ended)))
    assert not batcher._open and not batcher._line
