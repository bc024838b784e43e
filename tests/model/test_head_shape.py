"""The shape of a head from a config alone, as `endoreward tune --model` reads it."""

import json

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from endoreward_fast import EndoRewardError
from endoreward_fast.model.head_shape import HeadShape, head_shape
from tiny_models import SIZES


def saved(folder, config):
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def test_no_weights_are_read_and_none_are_made(tmp_path):
    large = {**SIZES, "hidden_size": 8192, "vocab_size": 128256, "num_hidden_layers": 80}  # 280 GB in float32
    name = saved(tmp_path, LlamaConfig(**large, dtype=torch.bfloat16))
    assert head_shape(name) == HeadShape(8192, 128256, "bfloat16")


def test_another_familys_names_and_no_dtype(tmp_path):
    assert head_shape(saved(tmp_path, GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4)))[:2] == (32, 300)


def test_padding_of_the_vocabulary_is_left_out(tmp_path, monkeypatch):
    from endoreward_fast.head.recipes import HeadRecipe
    from endoreward_fast.model import head_shape as module

    monkeypatch.setattr(module, "recipe_for", lambda model: HeadRecipe(vocab_size=380))
    assert head_shape(saved(tmp_path, LlamaConfig(**SIZES))).vocab == 380


def test_a_config_that_makes_no_model_is_one_line(tmp_path):
    name = saved(tmp_path, LlamaConfig(**SIZES))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": -8}))
    with pytest.raises(EndoRewardError, match=r"^model .*: (its config makes no model|.*cannot be loaded): ") as error:
        head_shape(name)
    assert "\n" not in str(error.value)
