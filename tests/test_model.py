"""EndoRewardModel against the model's own full logits and the oracle, on tiny random models and the embedded one."""

import json
import math
import shutil
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from endoreward_fast import EndoRewardError, EndoRewardModel, terminal_at
from endoreward_fast.heads import without_cache
from endoreward_fast.loading import pocket_path
from endoreward_fast.reference import token_rewards as oracle

VOCAB = 384  # the head has a few rows more than the tokenizer, as real ones do
BOS, EOS, PAD = 256, 257, 258
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=BOS, eos_token_id=EOS,
    pad_token_id=PAD, initializer_range=0.3,
)  # fmt: skip


def build(config, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | changes)).eval()


def gpt2():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": lambda: build(LlamaConfig),
    "gemma2": lambda: build(Gemma2Config, final_logit_softcapping=5.0, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": gpt2,
}


def byte_tokenizer(**names):
    """A byte a token, no merges: what is tested here is not the tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module", params=MODELS)
def scorer(request):
    return EndoRewardModel(MODELS[request.param](), TOKENIZER)


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


def random_rows(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator) for n in lengths]


def alone(scorer, ids, **options):
    """The oracle on one row: full logits in float32, then the formulas."""
    with torch.no_grad():
        logits = scorer.model(input_ids=ids[None], **without_cache(scorer.model)).logits.float()
    return oracle(logits, ids[None], **options)


def same(ours, expected, tolerance=2e-5):
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        if b is not None:
            assert a.dtype == torch.float32
            scale = b.abs().max().clamp(min=1)
            assert (a - b).abs().max() <= tolerance * scale, name


# forward


@torch.no_grad()
def test_forward_is_the_oracle_on_full_logits(scorer):
    (ids,) = random_rows(17)
    mask = torch.arange(17) >= 5
    for options in ({}, {"entropy": True}, {"alpha": 0.5}, {"terminal": torch.zeros(1, 17, dtype=torch.bool)}):
        same(scorer(ids[None], **options), alone(scorer, ids, **options))
        same(scorer(ids[None], completion_mask=mask[None], **options), alone(scorer, ids, mask=mask[None], **options))
    assert scorer.head.linear


@torch.no_grad()
def test_full_logits_where_the_head_is_not_linear(llama):
    (ids,) = random_rows(9)
    model = MODELS["llama"]()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Softplus())
    with pytest.warns(UserWarning, match="full logits"):
        other = EndoRewardModel(model)
    assert not other.head.linear
    same(other(ids[None], entropy=True), alone(other, ids, entropy=True))


def padded(rows, side):
    width = max(len(row) for row in rows) + 2
    ids = torch.full((len(rows), width), PAD)
    attended = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        attended[i, start : start + len(row)] = 1
    return ids, attended


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(scorer, side):
    rows = random_rows(5, 19, 11, 2)
    ids, attended = padded(rows, side)
    for row_mask in (None, torch.ones_like(ids, dtype=torch.bool)):  # a mask that covers padding, too
        rewards = scorer(ids, attended, row_mask)
        for i, row in enumerate(rows):
            same(type(rewards)(*(f[i][attended[i].bool()][None] for f in rewards[:3]), None), alone(scorer, row))
        assert all((field[~attended.bool()] == 0).all() for field in rewards[:3])


@torch.no_grad()
def test_positions_of_left_padding_may_be_given(scorer):
    ids, attended = padded(random_rows(5, 9), "left")
    positions = (attended.cumsum(1) - 1).masked_fill(attended == 0, 1)  # as Hugging Face's generate makes them
    same(scorer(ids, attended, position_ids=positions), scorer(ids, attended))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_rows_are_their_sequences(family):
    scorer = EndoRewardModel(MODELS[family](), TOKENIZER)
    rows = random_rows(5, 12, 1, 7)
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    rewards = scorer(ids, position_ids=positions, entropy=True)
    parts = [field[0].split([len(row) for row in rows]) for field in rewards]
    for i, row in enumerate(rows):
        same(type(rewards)(*(part[i][None] for part in parts)), alone(scorer, row, entropy=True))
    # the same with an attention mask, padding between and behind, and two such rows
    gap = [torch.full((2,), PAD)]
    pads, zeros = [rows[0], *gap, rows[1], *gap], torch.zeros(2, dtype=torch.long)
    more = torch.cat(pads)[None].expand(2, -1)
    attended = torch.cat([torch.full((len(p),), int(p[0] != PAD)) for p in pads])[None].expand(2, -1)
    positions = torch.cat([torch.arange(5), zeros + 5, torch.arange(12), zeros])[None]
    again = scorer(more, attended, position_ids=positions)
    for row in again.reward:
        assert torch.allclose(row[:5], parts[0][0], atol=1e-4) and torch.allclose(row[7:19], parts[0][1], atol=1e-4)
        assert not row[5:7].any() and not row[19:].any()


@torch.no_grad()
def test_a_packed_sequence_may_begin_at_position_one_behind_padding():
    scorer = EndoRewardModel(MODELS["llama"]())
    one, two = random_rows(4, 5)
    ids = torch.cat([one, torch.tensor([PAD]), two])[None]
    attended = (ids != PAD).long()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    positions[0, 2:4] = torch.tensor([0, 1])
    rewards = scorer(ids, attended, position_ids=positions).reward
    assert torch.allclose(rewards[0, 5:], alone(scorer, two).reward[0], atol=1e-4)


def test_models_that_cannot_keep_sequences_apart_are_refused():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = EndoRewardModel(AutoModelForCausalLM.from_config(config))
    ids = torch.cat(random_rows(4, 5))[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(EndoRewardError, match=r"'mamba'.*packed row apart"):
        scorer(ids, position_ids=positions)
    scorer(ids, position_ids=torch.arange(9)[None])  # one sequence is fine


def test_models_that_need_padding_on_the_right_are_refused():
    model = MODELS["gpt2"]()
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None: forward(input_ids=input_ids, attention_mask=attention_mask)
    scorer = EndoRewardModel(model)
    (ids,) = random_rows(6)
    attended = torch.ones(1, 6, dtype=torch.long)
    whole = scorer(ids[None], attended)  # nothing is padded on the left: fine
    same(whole, alone(scorer, ids))
    attended[0, 0] = 0
    with pytest.raises(EndoRewardError, match="pad on the right"):
        scorer(ids[None], attended)


def test_gradients_are_those_of_full_logits(scorer):
    (ids,) = random_rows(8)
    weight = [p for p in scorer.model.parameters() if p.ndim == 2][-1]
    embedding = scorer.model.get_input_embeddings().weight

    def gradient(rewards):
        loss = (rewards.reward * torch.arange(8.0)).sum() + rewards.entropy.sum() + rewards.logprob[0, 3]
        return torch.autograd.grad(loss, (weight, embedding))

    ours = gradient(scorer(ids[None], entropy=True))
    logits = scorer.model(input_ids=ids[None], **without_cache(scorer.model)).logits
    for a, b in zip(ours, gradient(oracle(logits, ids[None], entropy=True)), strict=True):
        assert b.abs().max() > 1e-3 and (a - b).abs().max() <= 1e-4 * b.abs().max()


class Largest(TorchDispatchMode):
    """Records the most elements that any operation put out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def test_logits_never_exist():
    vocab, batch, length = 16384, 2, 48
    model = build(LlamaConfig, vocab_size=vocab, tie_word_embeddings=False)
    scorer = EndoRewardModel(model)
    ids = torch.stack(random_rows(length, length))
    weights = max(p.numel() for p in model.parameters())
    assert weights < batch * length * vocab  # else the bound below says nothing
    with Largest() as seen:
        rewards = scorer(ids)
    assert seen.numel <= weights
    rewards.reward.sum().backward()
    with Largest() as eager, torch.no_grad():
        model(input_ids=ids)
    assert eager.numel >= batch * length * vocab  # the instrument sees logits where there are some


def test_default_mask_and_terminal(llama):
    """All but the first token; the episode ends with the last; a mask's runs end episodes of their own."""
    (ids,) = random_rows(8)
    with torch.no_grad():
        rewards = llama(ids[None])
        assert (rewards.value[0] != 0).tolist() == [False] + [True] * 7
        total = rewards.logprob.sum() + rewards.value[0, 1]  # sum r = sum log pi + V(s_1)
        assert math.isclose(rewards.reward.sum(), total, rel_tol=1e-5)
        ids[4] = EOS
        mask = torch.ones(1, 8, dtype=torch.bool)
        ends = terminal_at(ids[None], mask, EOS)
        same(llama(ids[None], terminal=ends), alone(llama, ids, terminal=ends))


def test_integer_masks_are_taken_and_wrong_shapes_named(llama):
    ids = torch.stack(random_rows(6, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]] * 2)
    with torch.no_grad():
        assert torch.equal(llama(ids, completion_mask=mask).reward, llama(ids, completion_mask=mask.bool()).reward)
    for options, name in (
        ({"completion_mask": mask[:, 2:]}, "completion_mask"),
        ({"attention_mask": mask[:1]}, "attention_mask"),
        ({"terminal": mask.bool()[0]}, "terminal"),
        ({"position_ids": torch.zeros(3, 2, 6, dtype=torch.long)}, "position_ids"),
    ):
        with pytest.raises(ValueError, match=rf"{name} \("):
            llama(ids, **options)
    with pytest.raises(ValueError, match=r"input_ids \(6,\)"):
        llama(ids[0])


# score and rank

ROWS = [
    {"prompt": "What is 2 + 3?", "completion": " 5"},
    {"prompt": "a", "completion": "b" * 40},
    {"prompt": "Name a colour.", "completion": ""},
    {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, EOS]},
    {"prompt": "", "completion": "colour"},
    {"prompt": "x" * 30, "completion": "y"},
]


def expected_score(scorer, ids, start, **options):
    mask = torch.arange(len(ids)) >= start
    rewards = alone(scorer, torch.tensor(ids), mask=mask[None], **options)
    return rewards.reward.sum().item(), rewards.logprob.sum().item()


def test_scores_are_sums_over_the_completion(scorer):
    results = scorer.score(ROWS)
    letters = [TOKENIZER.convert_tokens_to_ids(c) for c in "colour"]
    for i, ids, start in (
        (3, [1, 2, 3, 4, 5, EOS], 3),
        (4, [TOKENIZER.bos_token_id, *letters, TOKENIZER.eos_token_id], 1),
    ):
        score, logprob = expected_score(scorer, ids, start)
        assert math.isclose(results[i].score, score, rel_tol=1e-4, abs_tol=1e-4)
        assert math.isclose(results[i].logprob, logprob, rel_tol=1e-4)
        assert results[i].num_tokens == len(ids) - start
    assert results[2].score == 0.0 and results[2].flags == ("empty",) and results[2].num_tokens == 0
    assert results[1].num_tokens == 41  # with its end of sequence
    assert all(result.error is None for result in results)


def test_a_score_does_not_depend_on_its_companions(scorer):
    apart = scorer.score(ROWS, max_tokens_per_batch=1)
    for budget in (60, 8192):
        for one, other in zip(apart, scorer.score(ROWS, max_tokens_per_batch=budget), strict=True):
            assert math.isclose(one.score, other.score, rel_tol=1e-4, abs_tol=2e-4)


def test_batches_keep_to_the_budget(llama, monkeypatch):
    shapes, counted = [], []
    inner = llama.rewards_of_padded

    def watch(input_ids, *args, **options):
        shapes.append(input_ids.numel())
        return inner(input_ids, *args, **options)

    monkeypatch.setattr(llama, "rewards_of_padded", watch)
    positions = [i for i, _ in llama.iter_scores(ROWS, max_tokens_per_batch=40, on_tokens=counted.append)]
    assert sorted(positions) == list(range(len(ROWS))) and positions[0] == 2  # the empty one needs no model
    assert len(shapes) >= 3 and sum(shape > 40 for shape in shapes) == 1  # the 42-token row, alone
    assert sum(counted) == sum(len(llama_ids) for llama_ids in ([0] * 17, [0] * 42, [0] * 6, [0] * 8, [0] * 32))


@pytest.mark.parametrize(
    "options", [{"reduction": "mean"}, {"gamma": 0.9}, {"gamma": 0.5, "floor": 0.2}, {"alpha": 2.0}]
)
def test_reductions_reach_the_score(llama, options):
    (whole,) = llama.score(ROWS[1:2], per_token=True, alpha=options.get("alpha", 1.0))
    rewards = torch.tensor(whole.tokens.rewards)
    weights = options.get("gamma", 1.0) ** torch.arange(len(rewards))
    expected = (rewards * weights.clamp(min=options.get("floor", 0.0))).sum()
    expected = expected / len(rewards) if options.get("reduction") == "mean" else expected
    assert math.isclose(llama.score(ROWS[1:2], **options)[0].score, expected, rel_tol=1e-4)


def test_per_token_tables_hold_the_scored_tokens(llama):
    for row, result in zip(ROWS, llama.score(ROWS, per_token=True), strict=True):
        table = result.tokens
        assert {len(column) for column in vars(table).values()} == {result.num_tokens}
        assert math.isclose(sum(table.rewards), result.score, rel_tol=1e-4, abs_tol=1e-4)
        assert math.isclose(sum(table.logprobs), result.logprob, rel_tol=1e-4, abs_tol=1e-4)
        if "completion" in row:
            assert "".join(table.texts) == (row["completion"] and row["completion"] + "</s>")
    assert llama.score(ROWS)[0].tokens is None


def test_rank_puts_the_best_first_and_ties_in_order(llama):
    completions = ["one", "two", "three", "two", ""]
    ranked = llama.rank("Count:", completions)
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)
    assert all(r.completion == completions[r.index] for r in ranked)
    twins = [r.index for r in ranked if r.completion == "two"]
    assert twins == [1, 3]
    with pytest.raises(EndoRewardError, match="completion 1: completion: wanted text"):
        llama.rank("Count:", ["one", 2])


def test_bad_rows_are_said_and_stop_no_other(llama):
    rows = [
        {"prompt": "x"},
        ROWS[0],
        {"prompt_ids": [1], "completion_ids": [VOCAB]},
        {"prompt": "x" * 200, "completion": "y"},
    ]
    rows += [{"prompt_ids": [-1], "completion_ids": [3]}]
    malformed, fine, unknown, long, negative = llama.score(rows)
    assert fine.score == pytest.approx(llama.score(ROWS[:1])[0].score) and fine.error is None
    assert malformed.score is None and "found prompt" in malformed.error
    assert unknown.score is None and str(VOCAB) in unknown.error and "vocabulary" in unknown.error
    assert long.score is None and "202 tokens, the limit is 128" in long.error
    assert negative.score is None and "token id -1" in negative.error


def test_truncation_is_reported_and_bootstraps(llama):
    row = {"prompt_ids": list(range(20)), "completion_ids": list(range(30, 50))}
    whole = llama.score([row])[0]
    (cut,) = llama.score([row], max_length=30, truncate="completion")
    ids = [*range(20), *range(30, 40)]
    score, _ = expected_score(llama, ids, 20, terminal=torch.zeros(1, 30, dtype=torch.bool))
    assert cut.flags == ("truncated", "bootstrapped") and cut.num_tokens == 10
    assert math.isclose(cut.score, score, rel_tol=1e-4, abs_tol=1e-4)
    (short,) = llama.score([row], max_length=30, truncate="prompt")
    assert short.flags == ("truncated",) and short.num_tokens == 20 and short.score != whole.score
    assert llama.score([row], max_length=10_000)[0] == whole  # the model's own limit still holds
    assert "limit is 128" in llama.score([ROWS[0] | {"prompt": "x" * 200}], max_length=10_000)[0].error


def test_scoring_leaves_modes_and_autograd_alone(llama):
    llama.train()
    llama.model.model.layers[0].eval()
    try:
        for _ in llama.iter_scores(ROWS[:2], max_tokens_per_batch=1):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert llama.training and llama.model.lm_head.training and not llama.model.model.layers[0].training
    finally:
        llama.eval()
    (ids,) = random_rows(5)
    llama(ids[None]).reward.sum().backward()
    assert llama.model.lm_head.weight.grad is not None
    llama.zero_grad()


def test_dropout_is_off_while_scoring():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5)
    scorer = EndoRewardModel(AutoModelForCausalLM.from_config(config), TOKENIZER).train()
    assert scorer.score(ROWS[:1])[0].score == scorer.score(ROWS[:1])[0].score


@pytest.mark.parametrize(
    "options, said",
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"floor": -1.0}, "floor=-1.0"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"truncate": "left"}, "truncate='left'"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_row(llama, options, said):
    with pytest.raises(EndoRewardError, match=said):
        llama.iter_scores(ROWS, **options)


def test_an_unknown_option_is_a_type_error(llama):
    with pytest.raises(TypeError, match="temperature"):
        llama.score(ROWS, temperature=1.0)


def test_nan_is_no_score():
    model = MODELS["gpt2"]()
    scorer = EndoRewardModel(model, TOKENIZER)
    with torch.no_grad():
        model.transformer.wpe.weight[10:] = math.nan  # after the check at load: a model gone wrong in training
    rows = [{"prompt_ids": [1], "completion_ids": [2, 3]}, {"prompt": "a" * 20, "completion": "b"}]
    short, long = scorer.score(rows, max_tokens_per_batch=1)
    assert short.error is None and math.isfinite(short.score)
    assert long.score is None and "NaN" in long.error


def test_text_needs_a_tokenizer():
    scorer = EndoRewardModel(MODELS["llama"]())
    assert "without one" in scorer.score(ROWS[:1])[0].error
    (ids,) = scorer.score(ROWS[3:4], per_token=True)
    assert ids.error is None and ids.tokens.texts == ("", "", "")


def test_a_larger_vocabulary_is_refused_unless_special():
    model = build(LlamaConfig, vocab_size=300)
    tokenizer = byte_tokenizer()
    assert len(tokenizer) < 300
    EndoRewardModel(model, tokenizer)
    tokenizer.add_tokens([f"<image{i}>" for i in range(50)], special_tokens=True)
    assert len(tokenizer) == 309
    scorer = EndoRewardModel(model, tokenizer)
    assert "vocabulary of 300" in scorer.score([{"prompt": "a<image49>", "completion": "b"}])[0].error
    tokenizer.add_tokens(["word"])
    with pytest.raises(EndoRewardError, match="310 tokens but the model's output head only 300"):
        EndoRewardModel(model, tokenizer)


def test_end_tokens_of_generation_count(llama):
    """A completion that ends its turn with any of the model's end tokens gets no second one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    model = MODELS["llama"]()
    model.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids("<turn>")]
    scorer = EndoRewardModel(model, tokenizer)
    counts = [r.num_tokens for r in scorer.score([{"prompt": "a", "completion": c} for c in ("b", "b<turn>", "b</s>")])]
    assert counts == [2, 2, 2]


# from_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    MODELS["llama"]().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_a_saved_model_scores_as_it_did(saved, llama):
    loaded = EndoRewardModel.from_pretrained(str(saved))
    for one, other in zip(loaded.score(ROWS), llama.score(ROWS), strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5)
    assert not loaded.model.training


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto", None])
def test_dtypes(saved, dtype):
    loaded = EndoRewardModel.from_pretrained(str(saved), dtype=dtype, device="cpu")
    expected = torch.float32 if dtype in ("auto", None) else torch.bfloat16
    assert loaded.head.weight.dtype == expected and loaded.device.type == "cpu"
    assert all(result.error is None for result in loaded.score(ROWS))


def test_without_a_tokenizer_a_warning_says_so(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved / name, tmp_path)
    with pytest.warns(UserWarning, match="no usable tokenizer"):
        scorer = EndoRewardModel.from_pretrained(str(tmp_path))
    assert scorer.score(ROWS[3:4])[0].error is None


def refused(name, said, **options):
    with pytest.raises(EndoRewardError, match=said) as caught:
        EndoRewardModel.from_pretrained(str(name), **options)
    assert "\n" not in str(caught.value) and (options or str(name) in str(caught.value))


def test_what_is_no_causal_model_is_refused_in_one_line(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(tmp_path / "absent", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot be loaded")
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "'t5', which is not a causal language model")
    tiny = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "not a causal language model")
    LlamaForSequenceClassification(LlamaConfig(**tiny)).save_pretrained(tmp_path / "classifier")
    refused(tmp_path / "classifier", "is a LlamaForSequenceClassification, which is not a causal language model")
    unnamed = tmp_path / "classifier" / "config.json"
    unnamed.write_text(json.dumps(json.loads(unnamed.read_text()) | {"architectures": None}))
    refused(tmp_path / "classifier", "checkpoint lacks 'lm_head.weight'")
    refused(saved, "device 'cuda:77' cannot be used", device="cuda:77")
    refused(saved, "dtype 'int3'", dtype="int3")
    shutil.copytree(saved, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\0" * 100)
    refused(tmp_path / "torn", "cannot be loaded")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "torn" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    refused(tmp_path / "torn", "cannot be loaded")


# The embedded model


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.mark.skipif(not (pocket_path() / "config.json").is_file(), reason="the embedded model is not in this checkout")
class TestPocket:
    def test_it_is_the_oracle_on_a_conversation(self, pocket):
        messages = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
        (result,) = pocket.score([{"messages": messages}], per_token=True)
        text = pocket.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        before = pocket.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*before, *result.tokens.ids]
        score, logprob = expected_score(pocket, ids, len(before))
        assert math.isclose(result.score, score, rel_tol=1e-4, abs_tol=1e-3)
        assert math.isclose(result.logprob, logprob, rel_tol=1e-4, abs_tol=1e-3)
        assert (
            "".join(result.tokens.texts) == " 5" + pocket.tokenizer.eos_token
        )  # the template opens a turn with a space

    def test_a_system_prompt_changes_the_score(self, pocket):
        row = {"prompt": "What is 2 + 3?", "completion": "5"}
        plain, steered = pocket.score([row]), pocket.score([row], system="Answer in one word.")
        assert plain[0].score != steered[0].score

    def test_text_beats_noise(self, pocket):
        ranked = pocket.rank(
            "The function returns the number of", [" items in the list.", " qzx vjk wq pzzt."], chat=False
        )
        assert ranked[0].index == 0
