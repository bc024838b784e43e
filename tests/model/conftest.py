"""What the tests of loading share."""

import shutil
from pathlib import Path

import pytest

from tiny_models import MODELS, TOKENIZER


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer. Tests must not change it."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    MODELS["llama"]().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
