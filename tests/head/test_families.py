"""Check every causal model type of transformers and write docs/families.md. Run it with `pytest -m families`."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from endoreward_fast import EndoRewardModel

pytestmark = pytest.mark.families

# All other types are scored from hidden states. The strings are a part of the message that the user sees.
EXCEPTIONS = {
    "cpmant": ("refused", "is not causal"),  # every token attends to every other
    "xlnet": ("refused", "is not causal"),  # the same, without a perm_mask
    "musicgen": ("refused", "has 4 output heads"),
    "musicgen_melody": ("refused", "has 4 output heads"),
    "prophetnet": ("own logits", "its output head is fed (2, 2, 8, 32)"),
    "gemma3n": ("not built", "requires the timm library"),
    "gemma4_assistant": ("not built", "set of layer types producing a cache"),
    "gemma4_unified_assistant": ("not built", "set of layer types producing a cache"),
}


@pytest.fixture(scope="module")
def families():
    transformers.logging.set_verbosity_error()
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "tools" / "families.py")))


@pytest.fixture(scope="module")
def rows():
    return {}


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_family(model_type, families, rows):
    row = rows[model_type] = families.examine(model_type)
    outcome, words = EXCEPTIONS.get(model_type, ("hidden states", ""))
    assert row.outcome == outcome, row.note
    assert words in row.note
    if outcome == "hidden states":
        assert row.error < 1e-5  # float32 on both sides; the largest seen was 6e-7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_row_as_long_as_the_table_of_positions_runs(model_type, families):
    if EXCEPTIONS.get(model_type, ("",))[0] in ("refused", "not built"):
        pytest.skip("there is no such model to ask")
    scorer = EndoRewardModel(families.tiny_model(model_type))
    count = scorer.positions.table
    if count is not None:
        row = {"prompt_ids": [5] * (count - 1), "completion_ids": [6]}
        assert scorer.score([row], max_length=10**6)[0].error is None
        assert f"the limit is {count}" in scorer.score([row | {"completion_ids": [6, 7]}], max_length=10**6)[0].error


def test_the_table_is_written_when_every_type_ran(families, rows):
    if set(rows) == set(families.CLASSES):
        families.TABLE.write_text(families.table(list(rows.values())))
    assert f"Of {len(families.CLASSES)} types" in families.TABLE.read_text()
