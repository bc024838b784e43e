"""A model that can be held up, and batchers of it."""

import pytest

from endoreward_fast.serving.batcher import Batcher
from served import Gated


@pytest.fixture
def pocket():
    return Gated.pocket()


@pytest.fixture
def open_batcher(pocket):
    made = []

    def make(**options):
        made.append(Batcher(pocket, **{"window": 0, **options}))
        return made[-1]

    yield make
    pocket.gate.set()
    for batcher in made:
        batcher.close()
