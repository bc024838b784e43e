"""The next window is read and encoded in a thread while one is scored, unless reading may wait."""

import threading

import pytest

from cli_harness import LengthScorer, put, rows_of, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.command.run import pipeline
from endoreward_fast.scoring.batching import ELSEWHERE, ON_CPU


class Watched(LengthScorer):
    """Encodes to upper case, and notes where."""

    def __init__(self):
        super().__init__()
        self.threads, self.seen = [], threading.Event()

    def encode(self, rows, **options):
        self.threads.append(threading.current_thread().name.partition("_")[0])
        if len(self.threads) == 2:
            self.seen.set()
        return [row | {"completion": row["completion"].upper()} for row in rows]


class Item:
    """A window of one row."""

    def __init__(self, text):
        self.task = type("Task", (), {"samples": [{"prompt": "p", "completion": text}]})()


def windows(count, error=None):
    for i in range(count):
        yield [Item(f"row {i}")]
    if error is not None:
        raise error


@pytest.mark.parametrize("ahead", [True, False])
def test_windows_come_in_order_with_encoded_samples(ahead):
    found = list(pipeline.encoded(windows(5), Watched(), {}, ahead=ahead))
    assert [samples[0]["completion"] for _, samples in found] == [f"ROW {i}" for i in range(5)]
    assert [samples[0]["group"] for _, samples in found] == [0] * 5
    assert list(pipeline.encoded(iter(()), Watched(), {}, ahead=ahead)) == []


def test_the_next_window_is_encoded_while_this_one_is_scored():
    scorer = Watched()
    for number, _ in enumerate(pipeline.encoded(windows(3), scorer, {}, ahead=True)):
        if number == 0:
            assert scorer.seen.wait(20), "nothing was encoded during the first window"
    assert scorer.threads[1:] == ["encode", "encode"]


def test_nothing_is_read_before_the_last_window_is_scored_where_reading_may_wait():
    scorer, read = Watched(), []

    def slow():
        for window in windows(3):
            read.append(window)
            yield window

    for number, _ in enumerate(pipeline.encoded(slow(), scorer, {}, ahead=False), start=1):
        assert len(read) == number
    assert "encode" not in scorer.threads


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_of_reading_comes_after_the_windows_before_it(ahead):
    done = []
    with pytest.raises(EndoRewardError, match="damaged"):
        for items, _ in pipeline.encoded(windows(2, EndoRewardError("damaged")), Watched(), {}, ahead=ahead):
            done.append(items)
    assert len(done) == 2


def test_a_window_fits_the_batches_of_scoring():
    assert pipeline.BATCH == ON_CPU.held == ELSEWHERE.held


def test_encoded_rows_score_as_the_rows_do(tmp_path):
    scorer = EndoRewardModel.from_pretrained("pocket")
    rows = [{"prompt": "What is 2 + 3?", "completion": "5"}, {"prompt": 7}, {"prompt_ids": [5], "completion_ids": [6]}]
    ready = scorer.encode(rows, system="Be brief.")
    assert scorer.score(ready, system="Be brief.") == scorer.score(rows, system="Be brief.")
    assert ready[1].error and scorer.score([ready[1]]) == [ready[1]]
    file, out = put(tmp_path, *rows[:1] * 30), tmp_path / "out.jsonl"
    run("score", file, "-o", out, "--max-tokens-per-batch", "1")  # a row is a window
    (found,) = {row["score"] for row in rows_of(out.read_text())}
    assert found == pytest.approx(scorer.score(rows)[0].score, abs=1e-4)
