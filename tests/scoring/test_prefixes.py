"""Shared prefixes: read once, and every number as it is without."""

import random
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from endoreward_fast import EndoRewardModel
from endoreward_fast.model import continuing
from endoreward_fast.rivals.judges import JUDGES
from endoreward_fast.scoring.batching import Room
from endoreward_fast.scoring.prefixes import DEPTH, LEAST_LENGTH, LEAST_SAVED, plan
from tiny_models import EOS, MODELS, TOKENIZER, VOCAB, build

CONTINUES = {
    "llama": MODELS["llama"],
    "gpt2": MODELS["gpt2"],
    "qwen3": lambda: build(Qwen3Config),
    "mistral": lambda: build(MistralConfig, sliding_window=6),
    "gemma2": MODELS["gemma2"],
    "mixtral": lambda: build(MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "bloom": lambda: build(BloomConfig, n_head=4, num_attention_heads=4),
}
DOES_NOT = {
    "mamba": lambda: build(MambaConfig, state_size=8, num_heads=None),
    "recurrent_gemma": lambda: build(RecurrentGemmaConfig, attention_window_size=8, lru_width=64),
    "jamba": lambda: build(
        JambaConfig, use_mamba_kernels=False, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8
    ),
}  # fmt: skip
OPTIONS = {"per_token": True, "entropy": True, "signals": "all"}


def ids(count, seed):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(prompt, completion, **more):
    return {"prompt_ids": prompt, "completion_ids": completion, **more}


SYSTEM = ids(14, 1)
QUESTIONS = [SYSTEM + ids(n, 10 + n) for n in (20, 9, 31)]
ANSWERS = [ids(n, 50 + n) for n in (7, 12, 3)]
ROWS = [
    *(row(q, [*a, EOS]) for q in QUESTIONS for a in ANSWERS),
    row(QUESTIONS[0], ANSWERS[0]),  # the first row without its end
    row(QUESTIONS[0], [*ANSWERS[0], EOS]),  # the first row again
    row(QUESTIONS[0], ANSWERS[0], terminal=False),
    row(QUESTIONS[0], ANSWERS[1][:5], terminal=False),  # a row that is a prefix of another
    row(QUESTIONS[1], [EOS]),  # nothing but an end
    row(QUESTIONS[1], []),
    row([], [*SYSTEM, *ids(8, 3)]),  # its scored tokens are the others' prompt
    row(QUESTIONS[2][:25], QUESTIONS[2][25:]),  # the prompt of one is the completion of another
    row(QUESTIONS[2], [*ANSWERS[1], EOS], completion_mask=[1] * 3 + [0] * 4 + [1] * 6),
    row(ids(30, 7), ids(9, 8)),  # nothing in common
    row(ids(3, 9), ids(4, 9)),
]


def unshared(scorer, rows, **options):
    """Rows as they are scored by themselves."""
    return [scorer.score([one], **options)[0] for one in rows]


def agree(found, wanted):
    for i, (ours, expected) in enumerate(zip(found, wanted, strict=True)):
        assert (ours.error, ours.flags, ours.num_tokens) == (expected.error, expected.flags, expected.num_tokens), i
        if expected.score is None:
            continue
        close = {"abs": 1e-4, "rel": 1e-5}
        assert ours.score == pytest.approx(expected.score, **close), i
        assert ours.logprob == pytest.approx(expected.logprob, **close), i
        if expected.signals:
            assert ours.signals == pytest.approx(expected.signals, **close), i
        if expected.tokens:
            assert (ours.tokens.ids, ours.tokens.texts) == (expected.tokens.ids, expected.tokens.texts), i
            for name in ("rewards", "logprobs", "values", "entropies"):
                assert getattr(ours.tokens, name) == pytest.approx(getattr(expected.tokens, name), **close), (i, name)


class Counted:
    """Within: the tokens that the model's body computes, padding included, and how often it runs."""

    def __init__(self, scorer, room=None):
        self.model, self.room = scorer.model, room
        self.tokens = self.passes = self.failed = 0

    def see(self, module, args, kwargs):
        shape = kwargs["input_ids"].shape
        past = kwargs.get("past_key_values")
        held = shape[0] * past.get_seq_length() if past is not None else 0
        if self.room is not None and shape.numel() + held > self.room:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.tokens, self.passes = self.tokens + shape.numel(), self.passes + 1

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self.see, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.fixture(scope="module", params=CONTINUES)
def scorer(request):
    return EndoRewardModel(CONTINUES[request.param](), TOKENIZER)


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


@pytest.fixture(autouse=True)
def short_prefixes_are_read_in_place_too(monkeypatch):
    """By default, so few tokens are copied. Gemma 2, Bloom and prefixes shorter than what is behind them still are."""
    monkeypatch.setattr(continuing, "LEAST_COPIED", 0)


# ------------------------------------------------------------------------------------------------------- the numbers
def test_every_number_is_what_it_is_without_sharing(scorer):
    assert scorer.obstacle_to_sharing() is None
    wanted = unshared(scorer, ROWS, **OPTIONS)
    for budget in (64, 200, 8192):
        with Counted(scorer) as counted:
            agree(scorer.score(ROWS, max_tokens_per_batch=budget, **OPTIONS), wanted)
        assert counted.tokens < 0.6 * sum(len(r["prompt_ids"] + r["completion_ids"]) for r in ROWS) or budget == 64


@pytest.mark.parametrize("options", [{}, {"reduction": "mean", "gamma": 0.9}, {"alpha": 0.7}])
def test_every_reduction_is_what_it_is_without_sharing(llama, options):
    agree(llama.score(ROWS, **options), unshared(llama, ROWS, **options))


def test_the_grouping_changes_no_score(llama):
    wanted = unshared(llama, ROWS)
    for seed in range(4):
        order = random.Random(seed).sample(range(len(ROWS)), len(ROWS))
        part = order[: len(order) - 3 * seed]
        agree(llama.score([ROWS[i] for i in part], max_tokens_per_batch=150), [wanted[i] for i in part])


def test_a_reference_model_shares_too(llama):
    other = EndoRewardModel(CONTINUES["qwen3"](), TOKENIZER)
    options = {"signals": "log-ratio", "reference": other}
    wanted = unshared(llama, ROWS, **options)
    with Counted(other) as counted:
        agree(llama.score(ROWS, **options), wanted)
    assert counted.tokens < 0.6 * sum(len(r["prompt_ids"] + r["completion_ids"]) for r in ROWS)


def test_texts_and_judges_are_what_they_are_without_sharing(llama):
    rows = [{"prompt": "Name a colour, any colour.", "completion": c} for c in ("red", "blue", "", "red", "redder")]
    agree(llama.score(rows, **OPTIONS), unshared(llama, rows, **OPTIONS))
    for name in ("verifier", "pointwise"):
        judge, short = JUDGES[name](llama, "{question} {answer} Good?"), rows[:2]
        wanted = [judge.score([r], max_tokens_per_batch=1)[0].score for r in short]
        assert [r.score for r in judge.score(short)] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", DOES_NOT)
def test_models_that_do_not_go_on_behind_a_cache_read_whole_rows_and_say_so_once(name):
    scorer = EndoRewardModel(DOES_NOT[name](), TOKENIZER)
    wanted = unshared(scorer, ROWS)
    with pytest.warns(UserWarning, match="reads every row whole") as said:
        agree(scorer.score(ROWS), wanted)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(scorer.score(ROWS), wanted)


@pytest.mark.parametrize("name", DOES_NOT)
@pytest.mark.filterwarnings("ignore:.*reads every row whole")
def test_a_question_is_read_once_for_all_replies_without_a_cache_too(name):
    scorer = EndoRewardModel(DOES_NOT[name](), TOKENIZER)
    scorer.obstacle_to_sharing()
    rows = [{"prompt": "Name a colour.", "completion": c} for c in ("red", "blue, or green")]
    judge = JUDGES["pointwise"](scorer, "{question} {answer} Good?")
    read = []
    handle = scorer.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    found = [r.score for r in judge.score(rows)]
    handle.remove()
    assert sum(read) == len(rows)
    wanted = [judge.score([r], max_tokens_per_batch=1)[0].score for r in rows]
    assert found == pytest.approx(wanted, abs=1e-4)


class OddHead(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_compiled_models_and_those_read_through_their_own_logits_read_whole_rows():
    compiled = EndoRewardModel(MODELS["llama"](), TOKENIZER)
    compiled.model.compile()
    with pytest.warns(UserWarning, match="it is compiled"):
        assert compiled.obstacle_to_sharing()
    model = MODELS["llama"]()
    wanted = EndoRewardModel(model, TOKENIZER).score(ROWS)
    odd = OddHead(64, VOCAB, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    with pytest.warns(UserWarning, match="using its full logits"):
        own = EndoRewardModel(model, TOKENIZER)
    with pytest.warns(UserWarning, match="read through its own logits"):
        agree(own.score(ROWS), wanted)


def test_nothing_is_asked_where_nothing_is_shared():
    scorer = EndoRewardModel(DOES_NOT["mamba"](), TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.score([row(ids(9, n), ids(5, n)) for n in range(20, 24)])


@pytest.mark.parametrize("broken", ["positions", "state", "mask"])
def test_a_model_that_goes_on_wrongly_is_found_out(broken):
    """Positions off by one, the last token of the prefix unseen, padding seen: the question to the model finds each."""
    scorer = EndoRewardModel(MODELS["llama"](), TOKENIZER)

    def wrong(module, args, kwargs):
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            if broken == "positions":
                kwargs["position_ids"] = kwargs["position_ids"] + 1
            mask = kwargs["attention_mask"] = kwargs["attention_mask"].clone()
            if broken == "state":
                mask[:, past.get_seq_length() - 1] = 0
            if broken == "mask":
                mask[:] = 1
        return args, kwargs

    wanted = unshared(scorer, ROWS)
    scorer.model.register_forward_pre_hook(wrong, with_kwargs=True)
    with pytest.warns(UserWarning, match="tokens have other states"):
        agree(scorer.score(ROWS), wanted)


def test_rows_whose_length_changes_their_rotary_frequencies_share_nothing():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build(LlamaConfig, max_position_embeddings=32, rope_parameters=rope)
    scorer = EndoRewardModel(model, TOKENIZER)
    start = ids(24, 1)
    rows = [row(start, ids(n, n)) for n in (3, 5, 8, 9, 20, 21, 22, 4)]
    wanted = [EndoRewardModel(model, TOKENIZER).score([one])[0] for one in rows]
    agree(scorer.score(rows), wanted)
    agree(scorer.score(rows[::-1]), wanted[::-1])


# ------------------------------------------------------------------------------------------------------ what is saved
def distinct(rows):
    """Tokens of the trie of rows; a last token that ends the episode needs no pass."""
    found = set()
    for r in rows:
        tokens = r["prompt_ids"] + r["completion_ids"]
        tokens = tokens[:-1] if r.get("terminal", True) else tokens
        found |= {tuple(tokens[: i + 1]) for i in range(len(tokens))}
    return len(found)


def group(count, prompt, answers, seed):
    start = ids(prompt, seed)
    return [row(start, [*ids(answers, seed * 100 + n), EOS]) for n in range(count)]


def test_each_distinct_token_is_computed_once(llama):
    system = ids(20, 99)
    nested = [row(system + r["prompt_ids"], r["completion_ids"]) for n in range(3) for r in group(4, 30, 15, 5 + n)]
    for rows in (group(8, 60, 16, 3), group(4, 50, 10, 4) + group(4, 50, 10, 5), nested):
        with Counted(llama) as counted:
            llama.score(rows)
        assert counted.tokens <= 1.02 * distinct(rows)


def test_a_prefix_is_read_once_however_small_the_batches_behind_it_are(llama):
    rows = group(12, 60, 16, 3)
    llama.score(rows)
    with Counted(llama) as counted:
        llama.score(rows, max_tokens_per_batch=240)
    assert counted.tokens <= 1.02 * distinct(rows) and counted.passes >= 7


def test_equal_rows_and_the_replies_of_a_judge_are_one_row(llama):
    prompt = ids(40, 5)
    for rows in ([row(prompt, [1, 2, EOS])] * 5, [row(prompt, [n]) for n in range(5)]):
        llama.score(rows)
        with Counted(llama) as counted:
            llama.score(rows)
        assert (counted.passes, counted.tokens) == (1, distinct(rows))


def test_rows_with_nothing_in_common_run_as_before(llama):
    rows = [row(ids(20, n), ids(10, n)) for n in range(200, 212)]
    with Counted(llama) as counted:
        llama.score(rows)
    assert (counted.passes, counted.tokens) == (1, 12 * 30)
    assert all(segment.alone for segment in plan([r["prompt_ids"] for r in rows]))


# ------------------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("room", [70, 100, 150, 260])
def test_where_memory_runs_out_with_a_cache_held_batches_are_halved_and_no_row_is_lost(llama, room):
    rows = [*group(6, 40, 16, 3), *ROWS, *group(1, 20, 12, 12)]
    wanted = [llama.score([one], max_tokens_per_batch=1)[0] for one in rows]
    llama.room = Room()
    try:
        with Counted(llama, room) as counted, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agree(llama.score(rows), wanted)
            assert counted.failed
            before = counted.failed
            agree(llama.score(rows), wanted)
        assert counted.failed - before <= 1 + (room < 100) * len(rows)
    finally:
        llama.room = Room()


def test_what_is_held_counts_in_the_budget(llama):
    """Rows that are read, with what is held before them, never exceed the budget, unless a row does by itself."""
    seen = []

    def see(module, args, kwargs):
        past = kwargs.get("past_key_values")
        held = past.get_seq_length() if past is not None else 0
        seen.append((kwargs["input_ids"].shape[0], held + kwargs["input_ids"].shape[1]))

    handle = llama.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        llama.score(group(16, 60, 16, 3) + group(5, 50, 10, 4), max_tokens_per_batch=400)
    finally:
        handle.remove()
    assert len(seen) > 4 and all(rows * width <= 400 for rows, width in seen)


def test_a_budget_of_one_token_runs_each_row_alone_to_the_bit():
    half = EndoRewardModel(MODELS["llama"]().bfloat16(), TOKENIZER)
    assert half.score(ROWS, max_tokens_per_batch=1) == [half.score([one])[0] for one in ROWS]


# ---------------------------------------------------------------------------------------------------------- the plan
def check(segments, rows, start=0, depth=0):
    assert depth < DEPTH
    ended = []
    for segment in segments:
        assert segment.start == start <= segment.stop
        if segment.behind:
            assert segment.stop - start >= LEAST_LENGTH
            prefix = rows[segment.row][: segment.stop]
            assert all(rows[i][: segment.stop] == prefix for i in segment.rows())
            assert (segment.stop - start) * (len(segment.rows()) - 1) >= LEAST_SAVED
            ended += check(segment.behind, rows, segment.stop, depth + 1)
        else:
            assert segment.stop == len(rows[segment.row])
            assert all(rows[i] == rows[segment.row][: len(rows[i])] for i in segment.riders)
            ended += segment.rows()
    return ended


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), max_size=30), st.integers(0, 40))
def test_every_row_ends_once_behind_its_own_prefix(rows, shared):
    rows = [[2] * shared + r for r in rows]
    assert sorted(check(plan(rows), rows)) == list(range(len(rows)))


def test_many_rows_that_each_begin_the_next_are_one():
    rows = [[1] * n for n in range(1, 3000)]
    (only,) = plan(rows)
    assert (only.row, only.start, only.stop, len(only.riders)) == (2998, 0, 2999, 2998)


def test_a_comb_of_rows_has_no_more_levels_than_allowed():
    rows = [[1] * n + [2, n] for n in range(10, 600)]
    assert sorted(check(plan(rows), rows)) == list(range(len(rows)))
