"""EndoRewardModel.score and rank, on tiny random models."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.scoring.batching import Room
from tiny_models import EOS, MODELS, ROWS, TOKENIZER, VOCAB, build, byte_tokenizer, expected_score, random_rows


@pytest.fixture(scope="module", params=MODELS)
def scorer(request):
    return EndoRewardModel(MODELS[request.param](), TOKENIZER)


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


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
    end = expected_score(scorer, [*TOKENIZER("Name a colour.")["input_ids"], TOKENIZER.eos_token_id], 14)
    assert results[2].score == pytest.approx(end[0], abs=1e-4) and results[2].flags == ("empty",)
    assert results[1].num_tokens == 41  # with its end of sequence
    assert all(result.error is None for result in results)


def test_a_score_does_not_depend_on_its_batch(scorer):
    apart = scorer.score(ROWS, max_tokens_per_batch=1)
    for budget in (60, 8192):
        for one, other in zip(apart, scorer.score(ROWS, max_tokens_per_batch=budget), strict=True):
            assert math.isclose(one.score, other.score, rel_tol=1e-4, abs_tol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_per_batch_gives_bitwise_the_score_of_the_row_alone(dtype):
    scorer = EndoRewardModel(MODELS["llama"]().to(dtype), TOKENIZER)
    assert scorer.score(ROWS, max_tokens_per_batch=1) == [scorer.score([row])[0] for row in ROWS]


def test_batches_keep_to_the_budget(llama, monkeypatch):
    shapes, counted = [], []
    inner = llama.rewards_of_padded

    def watch(input_ids, *args, **options):
        shapes.append(input_ids.numel())
        return inner(input_ids, *args, **options)

    monkeypatch.setattr(llama, "rewards_of_padded", watch)
    rows = [*ROWS, {"prompt_ids": [1], "completion_ids": []}]
    positions = [i for i, _ in llama.iter_scores(rows, max_tokens_per_batch=40, on_tokens=counted.append)]
    assert sorted(positions) == list(range(len(rows))) and positions[0] == 6  # a row without scored tokens comes first
    assert len(shapes) >= 3 and sum(shape > 40 for shape in shapes) == 1  # the 42-token row, alone
    assert sum(counted) == 17 + 42 + 15 + 6 + 8 + 32


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
        assert {len(column) for column in vars(table).values() if column is not None} == {result.num_tokens}
        assert math.isclose(sum(table.rewards), result.score, rel_tol=1e-4, abs_tol=1e-4)
        assert math.isclose(sum(table.logprobs), result.logprob, rel_tol=1e-4, abs_tol=1e-4)
        if "completion" in row:
            assert "".join(table.texts) == row["completion"] + "</s>"
    assert llama.score(ROWS)[0].tokens is None


def test_rank_puts_the_best_first_and_ties_in_order(llama):
    completions = ["one", "two", "three", "two", ""]
    ranked = llama.rank("Count:", completions)
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)
    assert all(r.completion == completions[r.index] for r in ranked)
    twins = [r.index for r in ranked if r.completion == "two"]
    assert twins == [1, 3]
    bare = EndoRewardModel(llama.model, byte_tokenizer(eos_token=None))
    *others, last = bare.rank("Count:", ["", "one", "two"])
    assert (last.completion, last.score) == ("", None) and None not in [r.score for r in others]
    with pytest.raises(EndoRewardError, match="completion 1: completion: wanted text"):
        llama.rank("Count:", ["one", 2])


def test_bad_rows_get_an_error_and_do_not_stop_others(llama):
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
    assert llama.score([row], max_length=10_000)[0] == whole
    long = ROWS[0] | {"prompt": "x" * 200}
    assert llama.score([long], max_length=10_000)[0].error is None  # rotary: the config's 128 is no limit
    table = EndoRewardModel(MODELS["gpt2"](), TOKENIZER)
    assert "limit is 128" in table.score([long], max_length=10_000)[0].error


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
def test_wrong_options_are_refused_before_any_row(llama, options, said):
    with pytest.raises(EndoRewardError, match=said):
        llama.iter_scores(ROWS, **options)


def test_an_unknown_option_is_named_with_the_one_that_was_meant(llama):
    with pytest.raises(EndoRewardError, match="no option 'temperature': did you mean 'alpha'"):
        llama.score(ROWS, temperature=1.0)


def test_nan_is_an_error_and_not_a_score():
    model = MODELS["gpt2"]()
    scorer = EndoRewardModel(model, TOKENIZER)
    with torch.no_grad():
        model.transformer.wpe.weight[10:] = math.nan  # after the check at load, as when training diverges
    rows = [{"prompt_ids": [1], "completion_ids": [2, 3]}, {"prompt": "a" * 20, "completion": "b"}]
    short, long = scorer.score(rows, max_tokens_per_batch=1)
    assert short.error is None and math.isfinite(short.score)
    assert long.score is None and "NaN" in long.error


def test_text_needs_a_tokenizer():
    scorer = EndoRewardModel(MODELS["llama"]())
    assert "text needs a tokenizer" in scorer.score(ROWS[:1])[0].error
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
    """A completion that ends with any of the model's end tokens gets no second one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    model = MODELS["llama"]()
    model.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids("<turn>")]
    scorer = EndoRewardModel(model, tokenizer)
    counts = [r.num_tokens for r in scorer.score([{"prompt": "a", "completion": c} for c in ("b", "b<turn>", "b</s>")])]
    assert counts == [2, 2, 2]


def test_rows_that_do_not_fit_into_memory_do_not_stop_others(llama):
    """The model has memory for 60 tokens, including padding."""
    texts = ["a" * n for n in (5, 10, 20, 30, 80)]
    rows = [{"prompt": "p", "completion": text} for text in texts]
    wanted, failed = llama.score(rows), []

    def room(module, args, kwargs):
        if kwargs["input_ids"].numel() > 60:
            failed.append(kwargs["input_ids"].shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = llama.model.register_forward_pre_hook(room, with_kwargs=True)
    llama.room = Room()
    try:
        with pytest.warns(UserWarning, match="batches are halved until they fit"):
            found = llama.score(rows)
        times = len(failed)
        llama.score(rows[:4])
        assert len(failed) == times  # the limit is kept
    finally:
        handle.remove()
        llama.room = Room()
    assert [row.score for row in found[:4]] == pytest.approx([row.score for row in wanted[:4]], abs=1e-4)
    assert found[4].score is None and found[4].num_tokens == wanted[4].num_tokens
    said = f"out of memory: {1 + wanted[4].num_tokens} tokens do not fit even alone; set max_length and truncate "
    assert found[4].error == said + "(--max-length, --truncate) to cut the row"


# --------------------------------------------------------------- completions with tokens that the policy did not choose
def test_completion_mask_marks_the_scored_tokens(llama):
    """The other tokens are context. The episode does not end before them."""
    prompt, completion, mask = [1, 2, 3], [4, 5, 6, 7, 8, EOS], [1, 1, 0, 0, 1, 1]
    row = {"prompt_ids": prompt, "completion_ids": completion}
    longer = {"prompt_ids": prompt * 9, "completion_ids": completion * 2}
    options = {"per_token": True, "entropy": True, "signals": "all"}
    whole, own, *_ = llama.score([row, row | {"completion_mask": mask}, longer], **options)
    for name in ("ids", "texts", "rewards", "logprobs", "values", "entropies"):
        wanted = [v for v, m in zip(getattr(whole.tokens, name), mask, strict=True) if m]
        found = getattr(own.tokens, name)
        assert list(found) == (wanted if name in ("ids", "texts") else pytest.approx(wanted, abs=1e-4)), name
    assert own.num_tokens == 4 and own.score == pytest.approx(sum(own.tokens.rewards), abs=1e-4)
    assert own.logprob == pytest.approx(sum(own.tokens.logprobs), abs=1e-4)
    assert own.signals["logprob"] == pytest.approx(own.logprob, abs=1e-4)
    [mean] = llama.score([row | {"completion_mask": torch.tensor(mask)}], reduction="mean", gamma=0.5)
    discounted = sum(0.5**h * r for h, r in enumerate(own.tokens.rewards))  # steps count scored tokens
    assert mean.score == pytest.approx(discounted / 4, abs=1e-4)


def test_completion_mask_is_cut_with_its_completion(llama):
    row = {"prompt_ids": [1, 2, 3, 4], "completion_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 0, 1]}
    [cut] = llama.score([row], max_length=7, truncate="completion", per_token=True)
    assert cut.tokens.ids == (6,)
    [cut] = llama.score([row], max_length=6, truncate="prompt", per_token=True)
    assert cut.tokens.ids == (6, 8)
    bare = EndoRewardModel(llama.model)
    [first] = bare.score([row | {"prompt_ids": [], "completion_mask": [1, 1, 0, 0]}], per_token=True)
    assert first.tokens.ids == (6,) and first.flags == ("first_token_unscored",)


@pytest.mark.parametrize(
    "mask, words",
    [([1], "1 entries, but completion_ids has 2"), ([2, 1], "0 and 1"), ("10", "0 and 1"), ([0, 0], "no token"),
     ([None, 1], "0 and 1")],
)  # fmt: skip
def test_a_completion_mask_that_does_not_fit_is_an_error(llama, mask, words):
    [score] = llama.score([{"prompt_ids": [1], "completion_ids": [2, 3], "completion_mask": mask}])
    assert score.score is None and words in score.error and "\n" not in score.error
