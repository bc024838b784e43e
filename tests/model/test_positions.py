"""The most tokens of a row: a config's number gives way to max_length, a table of positions does not."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GemmaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from endoreward_fast import EndoRewardModel
from endoreward_fast.model.positions import Positions
from endoreward_fast.rivals.reward_model import RewardModel
from tiny_models import SIZES, TOKENIZER, build, expected_score

NUMBER = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
SHORT = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 1}
SMALL = {"intermediate_size": 48, "max_position_embeddings": NUMBER, "pad_token_id": 0, "eos_token_id": 2}


def row(length):
    ids = torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    return {"prompt_ids": ids[:10], "completion_ids": ids[10:], "terminal": True}


def right(scorer, length, **options):
    result = scorer.score([row(length)], **options)[0]
    assert result.error is None
    ids = [*row(length)["prompt_ids"], *row(length)["completion_ids"]]
    assert result.score == pytest.approx(expected_score(scorer, ids, 10)[0], rel=1e-4, abs=1e-3)


def refused(scorer, length, limit, **options):
    error = scorer.score([row(length)], **options)[0].error
    assert error is not None and f"the limit is {limit}" in error and "\n" not in error


@pytest.mark.parametrize(
    ("rope", "number", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 64, 64),
        (YARN, 64, 256),
        (YARN | {"original_max_position_embeddings": 64}, 64, 256),
        (YARN | {"original_max_position_embeddings": 16}, 64, 64),  # the number includes the scaling already
        (YARN | {"original_max_position_embeddings": 32, "factor": 2.5}, 32, 80),
        (YARN | {"original_max_position_embeddings": 64, "factor": 0.5}, 64, 64),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, 64, 128),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 64, 128),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 16, "rope_theta": 10000.0}, 128, 128,
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0,
             "original_max_position_embeddings": 32, "rope_theta": 10000.0}, 128, 128,
        ),
    ],
)  # fmt: skip
def test_a_rotary_scaling_sets_the_limit_that_max_length_overrides(rope, number, limit):
    scorer = EndoRewardModel(build(LlamaConfig, rope_parameters=dict(rope), max_position_embeddings=number), TOKENIZER)
    assert (scorer.max_positions, scorer.positions.table) == (limit, None)
    right(scorer, limit - 1)
    refused(scorer, limit + 3, limit)
    right(scorer, limit + 3, max_length=limit + 3)
    refused(scorer, 20, 15, max_length=15)


def test_scalings_by_the_kind_of_layer():
    def limit(full, number=NUMBER):
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        config = AutoConfig.for_model("gemma3_text", **SIZES | {"max_position_embeddings": number})
        config.rope_parameters = {"sliding_attention": plain, "full_attention": plain | full}
        return Positions.of(torch.nn.Identity(), config).default

    assert limit({}) == 64
    assert limit({"rope_type": "linear", "factor": 8.0}) == 64  # Gemma 3's number includes it
    assert limit(YARN | {"original_max_position_embeddings": 64}) == 256


# sliding windows and ALiBi have no table either, and n_ctx, seq_length or a window is no limit
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("mistral", SIZES | {"max_position_embeddings": NUMBER, "sliding_window": 8}),
        ("bloom", {"vocab_size": 384, "hidden_size": 32, "n_layer": 1, "n_head": 2, "seq_length": NUMBER}),
        ("falcon", SHORT | {"alibi": True, "max_position_embeddings": NUMBER, "eos_token_id": 2}),
        ("gpt_neox", SHORT | SMALL),
        ("xglm", {"vocab_size": 384, "d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 2,
                  "max_position_embeddings": NUMBER}),
    ],
)  # fmt: skip
def test_max_length_wins_where_there_is_no_table(model_type, sizes):
    torch.manual_seed(0)
    scorer = EndoRewardModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval())
    assert scorer.positions.table is None and scorer.max_positions in (NUMBER, None)
    right(scorer, 90, max_length=100)
    if scorer.max_positions:
        refused(scorer, 90, NUMBER)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt2", {"vocab_size": 384, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": NUMBER}),
        ("gptj", {"vocab_size": 384, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": NUMBER, "rotary_dim": 8}),
        ("ctrl", {"vocab_size": 384, "n_embd": 32, "dff": 32, "n_layer": 1, "n_head": 2, "n_positions": NUMBER}),
        ("opt", {"vocab_size": 384, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "word_embed_proj_dim": 32, "max_position_embeddings": NUMBER}),
        ("mpt", {"vocab_size": 384, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": NUMBER}),
    ],
)  # fmt: skip
def test_a_table_is_never_read_beyond_its_end(model_type, sizes):
    torch.manual_seed(0)
    scorer = EndoRewardModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval())
    assert scorer.max_positions == scorer.positions.table == NUMBER
    right(scorer, NUMBER, max_length=1000)
    refused(scorer, NUMBER + 1, NUMBER, max_length=1000)
    refused(scorer, NUMBER + 1, NUMBER)


def test_with_a_reference_the_shorter_table_counts():
    torch.manual_seed(0)
    gpt2 = AutoConfig.for_model("gpt2", vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=40)
    reference = EndoRewardModel(AutoModelForCausalLM.from_config(gpt2).eval())
    scorer = EndoRewardModel(build(LlamaConfig))
    asked = {"reference": reference, "signals": ["log-ratio"], "max_length": 1000}
    assert scorer.score([row(40)], **asked)[0].error is None
    refused(scorer, 41, 40, **asked)


def test_reward_models_have_the_same_rule():
    def words(model, count, **options):
        return RewardModel(model.eval(), TOKENIZER).score([{"prompt": "", "completion": "x" * count}], **options)[0]

    torch.manual_seed(0)
    llama = LlamaForSequenceClassification(LlamaConfig(**SIZES | {"max_position_embeddings": NUMBER}, num_labels=1))
    assert "the limit is 64" in words(llama, 80).error
    assert words(llama, 80, max_length=80).error is None
    roberta = RobertaForSequenceClassification(RobertaConfig(**SHORT | SMALL | {"pad_token_id": 1}, num_labels=1))
    assert words(roberta, NUMBER - 2, max_length=80).error is None  # two rows of its table are not for tokens
    assert "the limit is 62" in words(roberta, NUMBER - 1, max_length=80).error
    relative = DebertaV2Config(**SHORT | SMALL, position_biased_input=False, relative_attention=True, num_labels=1)
    assert words(DebertaV2ForSequenceClassification(relative), 90, max_length=90).error is None


def test_a_table_in_a_vision_tower_limits_no_text():
    tower = torch.nn.ModuleDict({"vision_tower": torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(9, 4)})})
    assert Positions.of(tower, GemmaConfig(max_position_embeddings=NUMBER)) == Positions(NUMBER, None)
