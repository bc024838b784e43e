"""The most tokens of a row: max_length overrides a config's number, but not a table of positions."""

import warnings

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
from tiny_models import SIZES, TOKENIZER, build, byte_tokenizer, expected_score

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
        (YARN | {"original_max_position_embeddings": 16}, 64, 64),  # the number already includes the scaling
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


def default(model_type="llama", tokenizer=None, firm=False, **config):
    return Positions.of(torch.nn.Identity(), AutoConfig.for_model(model_type, **config), tokenizer, firm=firm).default


def test_scalings_of_real_configs_in_either_spelling():
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    longrope = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 4096}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    for number, kind, about, limit in (
        (131072, "llama3", llama3 | {"factor": 32.0}, 131072),  # Llama 3.2: the scaled original is twice the number
        (131072, "llama3", llama3 | {"factor": 8.0}, 131072),  # Llama 3.1: it is half the number
        (8192, "llama3", llama3 | {"factor": 8.0}, 65536),
        (131072, "longrope", longrope, 131072),  # Phi 3
        (131072, "longrope", longrope | {"factor": 64.0}, 131072),
        (4096, "longrope", longrope | {"factor": 32.0}, 131072),
        (32768, "yarn", yarn, 131072),  # Qwen 2.5
        (40960, "yarn", yarn, 131072),  # Qwen 3
        (131072, "yarn", yarn, 131072),
        (163840, "yarn", yarn | {"factor": 40, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek V3
        (32768, "dynamic", {"factor": 2.0}, 65536),  # InternLM 2
        (4096, "linear", {"factor": 4.0}, 16384),  # Vicuna 16k
        (16384, "linear", {"factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (8192, "linear", {"factor": 1.0}, 8192),
    ):
        assert default(max_position_embeddings=number, rope_parameters={"rope_type": kind, **about}) == limit, kind
        assert default(max_position_embeddings=number, rope_scaling={"type": kind, **about}) == limit, kind
    assert default("cohere", max_position_embeddings=8192, model_max_length=131072) == 131072  # Command R
    assert default("gpt_oss") == 131072 and default("bloom") is None


def test_a_tokenizers_number_says_whether_a_scaling_is_included_and_limits_no_causal_model():
    def tokenizer(number):
        return byte_tokenizer(model_max_length=number)

    linear = {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert default(**linear) == default(**linear, tokenizer=tokenizer(10**30)) == 65536
    assert default(**linear, tokenizer=tokenizer(16384)) == 16384  # DeepSeek Coder
    assert default(**linear, tokenizer=tokenizer(32768)) == 32768
    assert default(**linear, tokenizer=tokenizer(2048)) == 16384
    plain = {"max_position_embeddings": 32768}
    assert default(**plain, tokenizer=tokenizer(2048)) == 32768  # Zephyr's tokenizer says 2048
    assert default(**plain, tokenizer=tokenizer(2048), firm=True) == 2048
    short = EndoRewardModel(build(LlamaConfig), byte_tokenizer(model_max_length=16))
    assert short.max_positions == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert short.score([{"prompt": "x" * 30, "completion": "y" * 30}])[0].error is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0,
         "original_max_position_embeddings": NUMBER},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_a_longer_row_does_not_change_the_rotary_frequencies_of_a_shorter_one(rope):
    """Frequencies depend on the longest row of a batch. With dynamic scaling they also depend on earlier batches."""

    def fresh():
        config = {"rope_parameters": rope | {"rope_theta": 10000.0}, "max_position_embeddings": NUMBER}
        return EndoRewardModel(build(LlamaConfig, **config), TOKENIZER)

    lengths = (30, 200, NUMBER, 100, NUMBER + 1, 60, 100)
    expected = [fresh().score([row(length)])[0].score for length in lengths]
    scorer = fresh()
    for _ in range(2):  # the first call does not change the second
        found = [result.score for result in scorer.score([row(length) for length in lengths])]
        assert found == pytest.approx(expected, rel=1e-4)
    assert [scorer.score([row(length)])[0].score for length in lengths] == pytest.approx(expected, rel=1e-4)
    asked = {"reference": fresh(), "signals": ["log-ratio"]}
    plain = EndoRewardModel(build(LlamaConfig, max_position_embeddings=256))
    ratios = [plain.score([row(n)], **asked | {"reference": fresh()})[0].signals["log-ratio"] for n in lengths]
    found = plain.score([row(length) for length in lengths], **asked)
    assert [result.signals["log-ratio"] for result in found] == pytest.approx(ratios, rel=1e-3, abs=1e-3)


def test_reward_models_keep_rotary_frequencies_apart_too():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    sizes = SIZES | {"max_position_embeddings": NUMBER, "rope_parameters": rope}

    def fresh():
        torch.manual_seed(0)
        return RewardModel(LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)).eval(), TOKENIZER)

    rows = [{"prompt": "", "completion": "xyz" * count} for count in (50, 5, 30, 25, 22)]
    expected = [fresh().score([one], max_length=256)[0].score for one in rows]
    assert [r.score for r in fresh().score(rows, max_length=256)] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_scalings_by_the_kind_of_layer():
    def limit(full, number=NUMBER):
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        config = AutoConfig.for_model("gemma3_text", **SIZES | {"max_position_embeddings": number})
        config.rope_parameters = {"sliding_attention": plain, "full_attention": plain | full}
        return Positions.of(torch.nn.Identity(), config).default

    assert limit({}) == 64
    assert limit({"rope_type": "linear", "factor": 8.0}) == 64  # Gemma 3's number includes it
    assert limit(YARN | {"original_max_position_embeddings": 64}) == 256


# sliding windows and ALiBi have no table either; n_ctx, seq_length and window sizes are no limits
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
def test_max_length_overrides_the_limit_of_a_model_without_a_table(model_type, sizes):
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
        # one row of its table is for padding, and it reads one position ahead
        ("prophetnet", {"vocab_size": 384, "hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2,
                        "decoder_ffn_dim": 48, "max_position_embeddings": NUMBER + 2}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*its output head is fed")
def test_a_table_is_never_read_beyond_its_end(model_type, sizes):
    torch.manual_seed(0)
    scorer = EndoRewardModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval())
    assert scorer.max_positions == scorer.positions.table == NUMBER
    right(scorer, NUMBER, max_length=1000)
    refused(scorer, NUMBER + 1, NUMBER, max_length=1000)
    refused(scorer, NUMBER + 1, NUMBER)


def test_the_shorter_table_of_model_and_reference_is_the_limit():
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


def test_a_table_in_a_vision_tower_does_not_limit_text():
    tower = torch.nn.ModuleDict({"vision_tower": torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(9, 4)})})
    assert Positions.of(tower, GemmaConfig(max_position_embeddings=NUMBER)) == Positions(NUMBER, None)
