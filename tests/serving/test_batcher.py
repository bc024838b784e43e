"""Batches from what waits: results, order, turns, cancellation, limits of the queue, and failures."""

import threading
import time

import pytest
import torch

from batchers import SHORT, Rounds, hold, ids, row, submit, until
from endoreward_fast.scoring.options import ScoreOptions
from endoreward_fast.serving.batcher import Closed, Full
from served import PATIENCE


def test_requests_from_many_threads_get_their_own_rows_scores(pocket, open_batcher):
    rows = [row(4 + n % 37, n) for n in range(90)] + [
        {"prompt": "What is 2 + 3?", "completion": str(n)} for n in range(9)
    ]
    wanted = pocket.score(rows)
    batcher = open_batcher(max_tokens=256)
    parts = [rows[n : n + 1 + n % 5] for n in range(0, len(rows), 5)]
    places = [list(range(n, min(n + 1 + n % 5, len(rows)))) for n in range(0, len(rows), 5)]
    found = [None] * len(parts)

    def ask(n):
        found[n] = submit(batcher, parts[n]).future.result(PATIENCE)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(parts))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for part, place in zip(found, places, strict=True):
        assert [r.score for r in part] == pytest.approx([wanted[i].score for i in place], abs=2e-4)


def test_rows_of_different_requests_share_a_round_and_their_prompt(pocket, open_batcher):
    watch = Rounds()
    batcher = open_batcher(watch=watch)
    first = hold(pocket, batcher)
    prompt = ids(100)
    asked = [submit(batcher, [{"prompt_ids": prompt, "completion_ids": [10 + n, 11]}]) for n in range(8)]
    until(lambda: batcher.tokens == 8 * 102)
    del pocket.batches[:]
    pocket.gate.set()
    assert all(a.future.result(PATIENCE)[0].score is not None for a in [first, *asked])
    until(lambda: len(watch.rows) == 2)
    assert watch.rows == [1, 8]
    assert sum(batch.numel() for batch in pocket.batches) < 8 * 102 / 5


def test_a_request_with_many_rows_does_not_hold_up_the_next_one(pocket, open_batcher):
    batcher = open_batcher(max_tokens=512)
    hold(pocket, batcher)
    ended = []
    many = submit(batcher, [row(100, n) for n in range(60)])
    until(lambda: batcher.tokens == 6000)
    single = submit(batcher, [row(100, 99)])
    until(lambda: batcher.tokens == 6100)
    for name, asked in (("many", many), ("single", single)):
        asked.future.add_done_callback(lambda _, name=name: ended.append((name, len(pocket.batches))))
    del pocket.batches[:]
    pocket.gate.set()
    many.future.result(PATIENCE)
    assert [name for name, _ in ended] == ["single", "many"]
    assert ended[0][1] <= 2 < 12 <= ended[1][1]  # passes by then


def test_a_huge_row_waits_for_its_turns_and_the_rows_behind_it_do_not(pocket, open_batcher):
    batcher = open_batcher(max_tokens=256)
    hold(pocket, batcher)
    ended = []
    huge = submit(batcher, [row(3000)])
    until(lambda: batcher.tokens == 3000)
    others = [submit(batcher, [row(50, n)]) for n in range(10)]
    until(lambda: batcher.tokens == 3500)
    for name, asked in (("huge", huge), *((n, other) for n, other in enumerate(others))):
        asked.future.add_done_callback(lambda _, name=name: ended.append(name))
    pocket.gate.set()
    assert huge.future.result(PATIENCE)[0].score is not None
    assert ended[-1] == "huge" and len(ended) == 11


def test_a_huge_row_gets_its_turn_while_others_keep_coming(pocket, open_batcher):
    batcher = open_batcher(max_tokens=256)
    hold(pocket, batcher)
    huge = submit(batcher, [row(2000)])
    stop, sent = threading.Event(), []

    def keep_asking():
        while not stop.is_set():
            if batcher.rows < 20:
                sent.append(submit(batcher, [row(60, len(sent))]))
            time.sleep(0.001)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    pocket.gate.set()
    try:
        assert huge.future.result(PATIENCE)[0].score is not None
    finally:
        stop.set()
        thread.join()
    [asked.future.result(PATIENCE) for asked in sent]


def test_a_cancelled_request_is_not_computed_and_leaves_the_queue(pocket, open_batcher):
    batcher = open_batcher()
    first = hold(pocket, batcher)
    kept, cancelled = submit(batcher, [row(40, 1)]), submit(batcher, [row(200, 2), row(200, 3)])
    until(lambda: batcher.tokens == 440)
    batcher.cancel(cancelled)
    assert (batcher.rows, batcher.tokens) == (2, 40)
    del pocket.batches[:]
    pocket.gate.set()
    first.future.result(PATIENCE), kept.future.result(PATIENCE)
    assert sum(batch.numel() for batch in pocket.batches) <= 40
    assert cancelled.future.cancelled() and batcher.rows == 0


def test_a_request_that_is_cancelled_in_its_round_does_no_harm(pocket, open_batcher):
    batcher = open_batcher()
    first = hold(pocket, batcher)
    batcher.cancel(first)
    pocket.gate.set()
    assert submit(batcher, [SHORT]).future.result(PATIENCE)[0].score is not None
    assert batcher.rows == 0 and batcher.alive()


def test_a_full_queue_refuses_and_says_when_to_ask_again(pocket, open_batcher):
    batcher = open_batcher(most_waiting=4)
    submit(batcher, [SHORT] * 4).future.result(PATIENCE)
    first = hold(pocket, batcher)
    waiting = submit(batcher, [SHORT] * 3)
    with pytest.raises(Full) as refused:
        submit(batcher, [SHORT])
    assert 1 <= refused.value.seconds <= 60 and "4 rows wait" in str(refused.value)
    pocket.gate.set()
    first.future.result(PATIENCE), waiting.future.result(PATIENCE)
    until(lambda: batcher.rows == 0)
    assert submit(batcher, [SHORT] * 9).future.result(PATIENCE)  # an empty queue takes any one request


def test_out_of_memory_halves_the_batch_and_answers(pocket, open_batcher):
    batcher = open_batcher()

    def run_out(batch):
        if batch.numel() > 120:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pocket.on_batch = run_out
    first = hold(pocket, batcher)
    asked = [submit(batcher, [row(40, n)]) for n in range(8)]
    until(lambda: batcher.tokens == 320)
    pocket.gate.set()
    with pytest.warns(UserWarning, match="halved"):
        scores = [a.future.result(PATIENCE)[0].score for a in asked]
        first.future.result(PATIENCE)
    assert None not in scores and max(batch.numel() for batch in pocket.batches[-3:]) <= 120
    too_long = submit(batcher, [row(200)]).future.result(PATIENCE)[0]
    assert too_long.score is None and "out of memory" in too_long.error


def test_one_requests_failure_leaves_the_others_their_scores(pocket, open_batcher, caplog):
    batcher = open_batcher()

    def fail(batch):
        if (batch == 999).any():
            raise RuntimeError("a bug")

    pocket.on_batch = fail
    hold(pocket, batcher)
    good = [submit(batcher, [row(30, n)]) for n in range(3)]
    bad = submit(batcher, [{"prompt_ids": [4, 999], "completion_ids": [8]}])
    good += [submit(batcher, [row(30, n)]) for n in range(3, 6)]
    until(lambda: batcher.rows == 8 and batcher.tokens == 6 * 30 + 3)
    pocket.gate.set()
    assert all(asked.future.result(PATIENCE)[0].score is not None for asked in good)
    with pytest.raises(RuntimeError, match="a bug"):
        bad.future.result(PATIENCE)
    assert "a request could not be scored" in caplog.text and batcher.alive()


def test_requests_with_other_options_get_their_own_rounds(pocket, open_batcher):
    watch = Rounds()
    batcher = open_batcher(watch=watch)
    hold(pocket, batcher)
    options = [{"alpha": 1.0}, {"alpha": 0.5}, {"per_token": True}] * 3
    asked = [submit(batcher, [row(30, n)], **o) for n, o in enumerate(options)]
    until(lambda: batcher.tokens == 9 * 30)
    pocket.gate.set()
    results = [a.future.result(PATIENCE)[0] for a in asked]
    until(lambda: len(watch.rows) == 4)
    for n, (found, o) in enumerate(zip(results, options, strict=True)):
        assert found.score == pytest.approx(pocket.score([row(30, n)], **o)[0].score, abs=2e-4)
        assert (found.tokens is not None) == ("per_token" in o)
    assert sorted(watch.rows) == [1, 3, 3, 3]


def test_close_answers_what_was_accepted_and_refuses_the_rest(pocket, open_batcher):
    batcher = open_batcher(max_tokens=64)
    first = hold(pocket, batcher)
    asked = [submit(batcher, [row(40, n)]) for n in range(6)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    until(lambda: batcher._closed)
    with pytest.raises(Closed):
        submit(batcher, [SHORT])
    pocket.gate.set()
    closing.join(PATIENCE)
    assert all(a.future.result(0)[0].score is not None for a in [first, *asked]) and not batcher.alive()


def test_an_idle_model_waits_for_the_window_unless_a_round_is_full(pocket, open_batcher):
    watch = Rounds()
    batcher = open_batcher(watch=watch, max_tokens=100, window=PATIENCE)
    asked = [submit(batcher, [row(50, n)]) for n in range(2)]  # as many tokens as a round has: no wait
    [a.future.result(PATIENCE / 2) for a in asked]
    assert watch.rows == [2] and len(watch.waits) == 2


def test_what_reading_raises_is_raised_by_the_request(pocket, open_batcher):
    batcher = open_batcher()
    asked = batcher.submit(1, lambda: 1 / 0, ScoreOptions())
    with pytest.raises(ZeroDivisionError):
        asked.future.result(PATIENCE)
    many = batcher.submit(2, lambda: [row(50), row(60)], ScoreOptions(), 100, lambda n: ValueError(f"{n} tokens"))
    with pytest.raises(ValueError, match="110 tokens"):
        many.future.result(PATIENCE)
    until(lambda: batcher.rows == 0)


def test_large_requests_are_encoded_apart_from_the_others(pocket, open_batcher):
    batcher, go_on = open_batcher(), threading.Event()

    def read():
        assert go_on.wait(PATIENCE)
        return [SHORT]

    large = [batcher.submit(1, read, ScoreOptions(), large=True) for _ in range(5)]
    assert submit(batcher, [SHORT]).future.result(PATIENCE)[0].score is not None
    go_on.set()
    assert all(asked.future.result(PATIENCE)[0].score is not None for asked in large)


def test_a_round_waits_for_the_clients_of_the_last_one_and_no_longer(pocket, open_batcher):
    watch = Rounds()
    batcher = open_batcher(watch=watch, window=PATIENCE, max_tokens=200)
    [a.future.result(PATIENCE) for a in [submit(batcher, [row(50, n)]) for n in range(4)]]  # a full round does not wait
    again = [submit(batcher, [row(20, n)]) for n in range(4)]
    [a.future.result(PATIENCE / 2) for a in again]
    alone = submit(batcher, [row(20, 5)])
    until(lambda: batcher.tokens == 20)
    assert not alone.over  # four were there before, so it may not be alone
    batcher.cancel(alone)
    assert watch.rows == [4, 4]
