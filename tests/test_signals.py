"""Every signal against its formula in float64 from the full softmax, and all signals from one pass."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from endoreward_fast import EndoRewardError, EndoRewardModel, signals
from endoreward_fast.head.head import without_cache
from endoreward_fast.signals import NEEDS, SIGNALS, linear_token_stats, select, token_stats
from endoreward_fast.vocab.reference import final_logits
from tiny_models import EOS, MODELS, ROWS, TOKENIZER, VOCAB, build, byte_tokenizer, random_rows

NO_NEEDS = [name for name, signal in SIGNALS.items() if not signal.needs]
OF_CALL = [name for name, signal in SIGNALS.items() if not any(NEEDS[need].of_row for need in signal.needs)]
B, T, D, V = 3, 9, 16, 70


def by_hand(z, tokens, mask, ends, alpha, reference):
    """Return {signal: (B, T)} in z's dtype, token by token as in the papers, of signals without needs of rows."""
    found = {name: torch.zeros(tokens.shape, dtype=z.dtype) for name in OF_CALL}
    for b, t in mask.nonzero().tolist():
        here, after, a = z[b, t - 1], z[b, t], tokens[b, t]
        pi = torch.softmax(here / alpha, 0)
        log_pi = torch.log_softmax(here / alpha, 0)

        def value(state, end=ends[b, t]):
            return 0.0 if end else alpha * torch.logsumexp(state / alpha, 0)

        uniform = torch.full_like(pi, 1 / len(pi))
        at = {
            "endogenous": here[a] - value(after),
            "centred": (here - here.mean())[a] - value(after - after.mean()),
            "logprob": log_pi[a],
            "mean-logprob": log_pi[a],
            "entropy": (pi * log_pi).sum(),
            "self-certainty": (uniform * (uniform.log() - log_pi)).sum(),
            "probability": pi[a],
            "log-ratio": log_pi[a] - reference[b, t],
        }
        at |= {"discounted-reward": at["endogenous"], "discounted-logprob": log_pi[a]}
        before = found["log-ratio"][b, :t]
        at["prefix-value"] = (before.sum() + at["log-ratio"]) / (mask[b, :t].sum() + 1)
        for name, number in at.items():
            found[name][b, t] = number
    return found


MEANS = {"mean-logprob", "entropy", "self-certainty", "probability"}
GAMMA = 0.93


def totals(found, mask):
    """Return {signal: (B,)} by the reduction of its source."""
    sums = {name: tokens.sum(1) for name, tokens in found.items()}
    scores = {name: s / mask.sum(1).clamp(min=1) if name in MEANS else s for name, s in sums.items()}
    weights = GAMMA ** (mask.cumsum(1) - 1).clamp(min=0).to(found["logprob"].dtype)  # 1 at the first scored token
    for name in ("discounted-reward", "discounted-logprob"):
        scores[name] = (found[name] * weights).sum(1)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    scores["prefix-value"] = found["prefix-value"].gather(1, last[:, None])[:, 0]
    return scores


def case(scale=4.0):
    hidden, weight, bias = torch.randn(B, T, D), torch.randn(V, D) * scale / D**0.5, torch.randn(V)
    tokens = torch.randint(0, V, (B, T))
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 3:], mask[1, 1:6], mask[2, 8:] = True, True, True
    reference = torch.where(mask, -torch.rand(B, T) * 9, 0.0)
    return hidden, weight, bias, tokens, mask, reference


def last_of_runs(mask):
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


ENDS = {"terminal": None, "bootstrapped": torch.zeros(B, T, dtype=torch.bool)}
HEADS = {"plain": {}, "softcap, bias, scale": {"softcap": 5.0, "logit_scale": 0.5}}


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("alpha", [1.0, 0.4, 2.5])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ends", ENDS)
def test_every_signal_matches_its_formula(assert_within_budget, device, impl, alpha, head, ends):
    hidden, weight, bias, tokens, mask, reference = case()
    options = HEADS[head] | ({"bias": bias} if HEADS[head] else {})
    terminal = ENDS[ends]
    stopped = last_of_runs(mask) if terminal is None else terminal
    exact, eager = (
        by_hand(final_logits(hidden, weight, **options, dtype=dtype), tokens, mask, stopped, alpha, reference.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )

    def put(x):
        return None if x is None else x.to(device)

    options = {name: put(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    where = {"mask": put(mask), "terminal": put(terminal), "alpha": alpha, "impl": impl}
    logits = final_logits(put(hidden), put(weight), **options)
    given = {
        "hidden": linear_token_stats(put(hidden), put(weight), put(tokens), **options, **where),
        "logits": token_stats(logits, put(tokens), **where),
    }
    scale = float(logits.abs().max()) / min(alpha, 1.0)
    for source, stats in given.items():
        for name in OF_CALL:
            signal = SIGNALS[name]
            needed = (put(reference),) if signal.needs_reference else ()
            per_token = signal.per_token(stats, *needed)
            assert per_token.dtype == torch.float32 and not per_token[~stats.mask].any(), name
            assert_within_budget(per_token, eager[name], exact[name], scale=scale, name=f"{name} from {source}")
            budget = {"scale": T * scale, "name": f"score {name} from {source}"}
            score = signal.score(stats, *needed)
            assert_within_budget(score, totals(eager, mask)[name], totals(exact, mask)[name], **budget)


def test_log_ratio_takes_beta():
    hidden, weight, _, tokens, mask, reference = case()
    stats = linear_token_stats(hidden, weight, tokens, mask=mask)
    ratio = signals.log_ratio(stats, reference)
    torch.testing.assert_close(signals.log_ratio(stats, reference, beta=0.1), 0.1 * ratio)
    assert not signals.log_ratio(stats, signals.logprob(stats)).any()
    unread = torch.where(mask, reference, torch.nan)
    assert torch.equal(signals.log_ratio(stats, unread), ratio)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_within_a_prompt_three_sums_rank_alike(alpha):
    """sum r = alpha sum log pi + V(s_1). The centred sum is less by mean(s_1). Both are constant within a prompt."""
    logits, tokens = torch.randn(2, 12, V, dtype=torch.float64) * 5, torch.randint(0, V, (2, 12))
    mask = torch.arange(12).expand(2, -1) >= 4
    stats = token_stats(logits, tokens, mask=mask, alpha=alpha)
    first = logits[:, 3].float()
    summed = {name: SIGNALS[name].score(stats) for name in ("endogenous", "centred", "logprob")}
    value = alpha * torch.logsumexp(first / alpha, -1)
    torch.testing.assert_close(summed["endogenous"], alpha * summed["logprob"] + value, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(summed["centred"], summed["endogenous"] - first.mean(-1), rtol=1e-5, atol=1e-4)


def test_a_constant_on_a_states_logits_changes_the_endogenous_reward_alone():
    logits, tokens = torch.randn(1, 8, V) * 3, torch.randint(0, V, (1, 8))
    open_ended = torch.zeros(1, 8, dtype=torch.bool)
    shifted = logits + torch.randn(1, 8, 1) * 20
    one, other = (token_stats(z, tokens, terminal=open_ended) for z in (logits, shifted))
    for name in NO_NEEDS:
        a, b = SIGNALS[name].per_token(one), SIGNALS[name].per_token(other)
        assert torch.allclose(a, b, atol=1e-4) == (name not in ("endogenous", "discounted-reward")), name


# --- underflow, infinities and rounding


def test_certainty_where_every_probability_but_one_underflows(assert_within_budget):
    logits = torch.randn(1, 3, V) * 400
    tokens = logits.argmin(-1).roll(1, 1)
    stats = token_stats(logits, tokens)
    pi = torch.softmax(logits, -1)
    assert (V * pi == 0).sum() > 2 * V and (-(V * pi).log().mean(-1)).isinf().all()  # the plain formula fails
    exact, eager = (
        by_hand(logits.to(dtype), tokens, stats.mask, last_of_runs(stats.mask), 1.0, torch.zeros(1, 3))
        for dtype in (torch.float64, torch.float32)
    )
    for name in NO_NEEDS:
        ours = SIGNALS[name].per_token(stats)
        assert_within_budget(ours, eager[name], exact[name], scale=float(logits.abs().max()), name=name)
    assert exact["probability"].max() < 1e-100 and not signals.token_probability(stats).any()
    assert SIGNALS["logprob"].score(stats) < -500  # its exp underflows to 0


def test_no_signal_is_nan_where_logits_are_minus_infinity():
    logits = torch.randn(5, 4, V)
    tokens = torch.randint(1, V, (5, 4))
    logits[0, 1, tokens[0, 2]] = -torch.inf  # the token chosen is ruled out
    logits[1, 1] = -torch.inf  # nothing can be chosen
    logits[2, :, 0] = -torch.inf  # no state allows this word
    logits[3, 3] = -torch.inf  # nothing can follow
    open_ended = torch.zeros(5, 4, dtype=torch.bool)
    for terminal in (None, open_ended):
        for impl in ("reference", "chunked"):
            stats = token_stats(logits, tokens, terminal=terminal, impl=impl)
            found = {name: SIGNALS[name].per_token(stats) for name in NO_NEEDS}
            reference = torch.where(stats.mask, -1.0, 0.0)
            reference[1, 2] = reference[2, 2] = -torch.inf
            found |= {name: SIGNALS[name].per_token(stats, reference) for name in ("log-ratio", "prefix-value")}
            for name, tokenwise in found.items():
                needed = (reference,) if SIGNALS[name].needs else ()
                assert not tokenwise.isnan().any() and not SIGNALS[name].score(stats, *needed).isnan().any(), name
            for name in ("endogenous", "centred", "logprob", "log-ratio"):
                assert found[name][0, 2] == found[name][1, 2] == -torch.inf, name
            assert found["probability"][0, 2] == found["probability"][1, 2] == 0
            assert found["self-certainty"][1, 2] == 0 and found["entropy"][1, 2] == 0
            assert found["self-certainty"][2, 1] == torch.inf  # KL(uniform || pi) where pi is 0 for a word
            assert torch.equal(found["centred"][2], found["endogenous"][2])  # the mean is -inf and not subtracted
            assert found["endogenous"][3, 3] == logits[3, 2, tokens[3, 3]]  # a dead end is terminal
            assert found["log-ratio"][2, 2] == torch.inf
            scored = {name: SIGNALS[name].score(stats) for name in NO_NEEDS}
            assert scored["logprob"][4].isfinite() and scored["self-certainty"][4].isfinite()


def test_a_ruled_out_token_outweighs_an_unbounded_ratio():
    logits, tokens = torch.randn(1, 4, V), torch.randint(0, V, (1, 4))
    logits[0, 0, tokens[0, 1]] = -torch.inf
    stats = token_stats(logits, tokens)
    reference = torch.tensor([[0.0, -torch.inf, -torch.inf, -1.0]])
    assert signals.log_ratio(stats, reference)[0, 1:3].tolist() == [-torch.inf, torch.inf]
    assert SIGNALS["log-ratio"].score(stats, reference).item() == -torch.inf


def test_bounds_hold_whatever_rounding_does():
    """logprob <= 0, probability <= 1, certainty >= 0."""
    tokens = torch.full((1, 400), 5)
    flat = token_stats(torch.rand(1, 400, 1).mul(50).repeat(1, 1, V), tokens, alpha=0.7)
    rounded = flat.lse - flat.logit_mean / 0.7 - math.log(V)
    assert (rounded[flat.mask] < 0).sum() > 50  # by a unit in the last place of lse
    certainty = signals.self_certainty(flat)
    assert (certainty >= 0).all() and certainty.max() < 1e-4
    assert torch.allclose(signals.negative_entropy(flat)[0, 1:], torch.tensor(-math.log(V)))
    peaked = token_stats(torch.zeros(1, 400, V).index_fill(2, torch.tensor([5]), 60.0), tokens)
    for stats in (peaked, peaked._replace(lse=torch.where(peaked.mask, peaked.lse.nextafter(torch.tensor(0.0)), 0.0))):
        assert not signals.logprob(stats).any() and torch.equal(signals.token_probability(stats) == 1, stats.mask)


def test_gradients_are_those_of_the_formulas():
    hidden, weight, _, tokens, mask, reference = case(1.0)
    ends = last_of_runs(mask)

    def gradient(score):
        return torch.autograd.grad(score.sum(), (hidden, weight))

    for name in OF_CALL:
        signal = SIGNALS[name]
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        needed = (reference,) if signal.needs_reference else ()
        ours = gradient(signal.score(linear_token_stats(hidden, weight, tokens, mask=mask, alpha=0.8), *needed))
        exact = totals(by_hand(final_logits(hidden, weight), tokens, mask, ends, 0.8, reference), mask)[name]
        for a, b in zip(ours, gradient(exact), strict=True):
            assert b.abs().max() > 1e-3, name
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_shapes_are_checked():
    hidden, weight, _, tokens, mask, _ = case()
    with pytest.raises(ValueError, match="tokens"):
        linear_token_stats(hidden, weight, tokens[:, 1:])
    with pytest.raises(ValueError, match="mask"):
        token_stats(hidden, tokens.clamp(max=D - 1), mask=mask[:1])
    assert linear_token_stats(hidden[:, :0], weight, tokens[:, :0]).lse.shape == (B, 0)


# --- signals of a model


@pytest.fixture(scope="module", params=MODELS)
def scorer(request):
    return EndoRewardModel(MODELS[request.param](), TOKENIZER)


@pytest.fixture(scope="module")
def llama():
    return EndoRewardModel(MODELS["llama"](), TOKENIZER)


@torch.no_grad()
def expected(scorer, ids, start, ends, alpha, reference=None):
    """Return {signal: score} of one row from the full logits of the model and of a second model."""

    def logits_of(model):
        return model(input_ids=ids[None], **without_cache(model)).logits.double()

    mask = torch.arange(len(ids))[None] >= start
    terminal = last_of_runs(mask) if ends else torch.zeros_like(mask)
    other = torch.zeros(mask.shape, dtype=torch.float64)
    if reference is not None:
        log_pi = torch.log_softmax(logits_of(reference.model) / alpha, -1)
        other[:, 1:] = log_pi[:, :-1].gather(-1, ids[None, 1:, None]).squeeze(-1)
    return totals(by_hand(logits_of(scorer.model), ids[None], mask, terminal, alpha, other), mask)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scores_of_rows(scorer, alpha):
    """Padded batches, a softcap, and completions that end or are cut off."""
    second = EndoRewardModel(MODELS["gpt2"](), TOKENIZER)
    lengths = ((4, 9, True), (3, 30, False), (11, 2, True))
    rows = [(torch.cat(random_rows(a, b)), a, whole) for a, b, whole in lengths]
    texts = [
        {"prompt_ids": ids[:a].tolist(), "completion_ids": ids[a:].tolist(), "terminal": whole}
        for ids, a, whole in rows
    ]
    results = scorer.score(texts, signals="all", reference=second, alpha=alpha)
    for (ids, start, whole), result in zip(rows, results, strict=True):
        assert list(result.signals) == OF_CALL and result.signal_errors is None
        for name, value in expected(scorer, ids, start, whole, alpha, second).items():
            assert math.isclose(result.signals[name], value, rel_tol=1e-4, abs_tol=1e-4), name
        assert math.isclose(result.signals["endogenous"], result.score, rel_tol=1e-6)
        assert math.isclose(result.signals["logprob"], result.logprob, rel_tol=1e-5, abs_tol=1e-5)


def test_one_forward_and_one_pass_over_the_vocabulary(llama, monkeypatch):
    calls = {"model": 0, "reference": 0, "vocabulary": 0}
    second = EndoRewardModel(MODELS["gpt2"](), TOKENIZER)

    def count(what):
        calls[what] += 1

    inner = signals.stats.linear_vocab_stats
    monkeypatch.setattr(signals.stats, "linear_vocab_stats", lambda *a, **o: count("vocabulary") or inner(*a, **o))
    monkeypatch.setattr(
        "endoreward_fast.model.reader.linear_token_rewards", lambda *a, **o: pytest.fail("the vocabulary is read twice")
    )
    rows = [ROWS[0], ROWS[2]]  # of similar length, so they are one batch
    hooks = [llama.model.register_forward_hook(lambda *_: count("model"))]
    llama.score(rows, signals="all")
    assert calls == {"model": 1, "reference": 0, "vocabulary": 1}
    monkeypatch.undo()
    hooks.append(second.model.register_forward_hook(lambda *_: count("reference")))
    llama.score(rows, signals="all", reference=second)
    assert calls["model"] == 2 and calls["reference"] == 1
    for hook in hooks:
        hook.remove()


def test_signals_do_not_change_scores(llama):
    plain = llama.score(ROWS, per_token=True)
    for one, other in zip(plain, llama.score(ROWS, per_token=True, signals=["entropy", "centred"]), strict=True):
        assert one.signals is None and list(other.signals) == ["entropy", "centred"]
        assert math.isclose(one.score, other.score, rel_tol=1e-6) and one.flags == other.flags
        assert one.tokens.rewards == pytest.approx(other.tokens.rewards, rel=1e-6, abs=1e-6)
    assert other.signals["entropy"] < 0
    empty = llama.score(ROWS[2:3], signals="all")[0]
    assert empty.flags == ("empty",) and set(empty.signals) == set(NO_NEEDS) and empty.num_tokens == 1
    nothing = llama.score(ROWS[2:3], signals="all", append_eos=False)[0]
    assert nothing.score is None and nothing.signals is None and "nothing to score" in nothing.error


def test_the_reduction_of_scores_does_not_apply_to_signals(llama):
    (mean,) = llama.score(ROWS[:1], signals=("endogenous",), reduction="mean")
    assert math.isclose(mean.signals["endogenous"], mean.score * mean.num_tokens, rel_tol=1e-5)


@torch.no_grad()
def test_stats_have_the_layout_of_forward(scorer):
    rows = random_rows(5, 19, 11)
    ids = torch.full((3, 20), EOS)
    attended = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 20 - len(row) :], attended[i, 20 - len(row) :] = row, 1
    rewards = scorer(ids, attended, entropy=True)
    stats = scorer.stats(ids, attended)
    for ours, theirs in zip(stats.rewards(), rewards, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.mask, rewards.logprob != 0)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    if scorer.model.config.model_type != "gpt2":
        same = scorer.stats(packed, position_ids=positions).rewards()
        torch.testing.assert_close(same.reward, scorer(packed, position_ids=positions).reward, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_linear_is_read_from_its_logits():
    model = MODELS["llama"]()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Softplus())
    with pytest.warns(UserWarning, match="full logits"):
        other = EndoRewardModel(model)
    (ids,) = random_rows(9)
    row = {"prompt_ids": ids[:3].tolist(), "completion_ids": ids[3:].tolist()}
    found = other.score([row], signals="all")[0].signals
    for name, value in expected(other, ids, 3, True, 1.0).items():
        assert SIGNALS[name].needs or math.isclose(found[name], value, rel_tol=1e-4, abs_tol=1e-4), name


# --- names, and the second model


def test_names_are_selected_and_unknown_names_refused(llama):
    assert select("all", given=["reference"]) == tuple(SIGNALS)
    assert select("all") == tuple(name for name, signal in SIGNALS.items() if not signal.needs_reference)
    assert select("entropy, logprob,entropy") == ("entropy", "logprob")
    assert select(()) == ()
    with pytest.raises(EndoRewardError, match=r"unknown signal 'entropi'.*endogenous, centred.*log-ratio"):
        select("entropy,entropi", given=["reference"])
    with pytest.raises(EndoRewardError, match="'log-ratio' compares two models"):
        llama.iter_scores(ROWS, signals="log-ratio")
    hidden, weight, _, tokens, _, _ = case()
    with pytest.raises(EndoRewardError, match="'log-ratio' needs `reference`, the second model's"):
        SIGNALS["log-ratio"].score(linear_token_stats(hidden, weight, tokens))


def test_the_table_cannot_be_written_to():
    with pytest.raises(TypeError):
        SIGNALS["mine"] = SIGNALS["entropy"]
    with pytest.raises(AttributeError):
        SIGNALS["entropy"].reduction = "sum"


def test_a_second_model_with_other_words_is_refused(llama):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["word"])
    other = EndoRewardModel(MODELS["llama"](), tokenizer)
    with pytest.raises(EndoRewardError, match=r"the model's vocabulary .* is not the reference model's .*'word'"):
        EndoRewardModel(MODELS["llama"](), tokenizer).iter_scores(ROWS, signals="all", reference=llama)
    assert llama.score(ROWS[:1], signals="all", reference=other)[0].error is None  # the reference may know more words


def test_the_second_models_limits_apply(llama):
    short = EndoRewardModel(build(LlamaConfig, max_position_embeddings=20), TOKENIZER)
    results = llama.score(ROWS[:2], signals="all", reference=short)
    assert results[0].error is None and results[0].signals["log-ratio"] == pytest.approx(0, abs=1e-5)
    assert "42 tokens, the limit is 20" in results[1].error
    fewer = EndoRewardModel(build(LlamaConfig, vocab_size=300), TOKENIZER)
    (odd,) = llama.score([{"prompt_ids": [1], "completion_ids": [2, 310]}], signals="all", reference=fewer)
    assert odd.error == "token id 310 is not in the model's vocabulary of 300"


def test_the_second_model_runs_without_dropout_and_keeps_its_mode(llama):
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5)
    second = EndoRewardModel(AutoModelForCausalLM.from_config(config), TOKENIZER).train()
    one, other = (llama.score(ROWS[:1], signals="all", reference=second)[0].signals for _ in range(2))
    assert one == other and second.training and second.model.transformer.drop.training
