"""Rows for batchers in tests, and what waits for them."""

import random
import time

from endoreward_fast.scoring.options import ScoreOptions
from served import PATIENCE

SHORT = {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9]}


class Rounds:
    """A Watch that keeps what it is told."""

    def __init__(self):
        self.rows, self.waits = [], []

    def on_round(self, rows, tokens, fill, seconds):
        self.rows.append(rows)

    def on_wait(self, seconds):
        self.waits.append(seconds)


def submit(batcher, rows, **options):
    return batcher.submit(len(rows), lambda: rows, ScoreOptions.of(options))


def ids(length, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(3, 1000) for _ in range(length)]


def row(length, seed=0):
    return {"prompt_ids": ids(length - 2, seed), "completion_ids": [8, 9]}


def hold(pocket, batcher):
    """Begin a round that waits at the gate, so that what is submitted next waits in line."""
    pocket.gate.clear()
    first = submit(batcher, [SHORT])
    assert pocket.entered.acquire(timeout=PATIENCE)
    return first


def until(condition):
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)
