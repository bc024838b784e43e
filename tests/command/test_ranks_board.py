"""The board of the ranks: joining an attempt, and messages of any size."""

import time
from threading import Thread

import pytest
import torch

from endoreward_fast import EndoRewardError
from endoreward_fast.command.run import ranks_board as boards
from endoreward_fast.command.run.ranks_board import PART, Board, call, come


@pytest.fixture
def board():
    return Board(torch.distributed.HashStore())


class Joining(Thread):
    """A thread in which `rank` joins an attempt. `found` is then (board, rank 0's message)."""

    def __init__(self, board, rank):
        super().__init__(daemon=True)
        self.board, self.rank, self.found = board, rank, None
        self.start()

    def run(self):
        self.found = come(self.board, self.rank)

    def told(self):
        self.join(20)
        return self.found[1]["attempt"]


def test_restarted_ranks_ignore_messages_of_earlier_attempts(board):
    """The launcher's store outlives the ranks. A rank that joins first waits for the others of its attempt."""
    for attempt in range(3):
        others = [Joining(board, 1), Joining(board, 2)]
        time.sleep(0.1)
        assert [other.found for other in others] == [None, None]  # they ignore the start of the attempt before
        mine = call(board, 3, {"attempt": attempt})
        assert [other.told() for other in others] == [attempt] * 2
        assert [part.count("claimed") for part in (mine, *(other.found[0] for other in others))] == [1, 2, 3]


def test_ranks_leave_an_attempt_that_ended_before_all_had_joined(board):
    Thread(target=call, args=(board, 3, {"attempt": 0}), daemon=True).start()
    other = Joining(board, 1)
    time.sleep(0.1)
    assert other.found is None
    call(board, 2, {"attempt": 1})
    assert other.told() == 1


def test_rank_0_starts_when_all_have_joined(board):
    leader = Thread(target=call, args=(board, 3, {"attempt": 0}), daemon=True)
    leader.start()
    first = Joining(board, 1)
    time.sleep(0.1)
    assert leader.is_alive() and first.found is None
    assert (Joining(board, 2).told(), first.told()) == (0, 0)
    leader.join(20)
    assert not leader.is_alive()


def test_a_rank_that_never_joins_is_named(board, monkeypatch):
    monkeypatch.setattr(boards, "PATIENCE", 0.1)
    with pytest.raises(EndoRewardError, match="rank 1 did not join within 0 minutes"):
        call(board, 2, {})
    with pytest.raises(EndoRewardError, match="rank 0 did not join"):
        come(Board(torch.distributed.HashStore()), 1)


def test_messages_of_any_size_arrive_complete_and_are_deleted():
    store = torch.distributed.HashStore()
    board = Board(store)
    text = ("ü" * PART + "end").encode()  # two bytes each: three parts
    board.put("a", text)
    assert store.num_keys() == 4 and board.has("a") and not board.has("b")
    assert board.get("a") == text == board.take("a")
    assert store.num_keys() == 0
    assert [board.count("claimed"), board.count("claimed"), board.count("other", 0)] == [1, 2, 0]
