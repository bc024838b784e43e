"""What the tests of the command share."""

import pytest

from cli_harness import LengthScorer
from endoreward_fast.command.run import pipeline


@pytest.fixture
def scorer(monkeypatch):
    """A made-up scorer in place of the model. `scorer.loaded` holds the flags of each time that it was loaded."""
    made = LengthScorer()
    made.loaded = []

    def load(flags):
        made.loaded.append(flags)
        return made

    monkeypatch.setattr(pipeline, "load_scorer", load)
    return made
