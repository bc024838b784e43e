"""The public functions: every implementation against the fp64 oracle under the error budget, and error messages."""

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.vocab import ops, reference
from endoreward_fast.vocab.compiled import find_compiler

COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or find_compiler() is None,
        reason="impl='compiled' needs CPU tensors and a C++ compiler",
    ),
)
IMPLS = ("fused", "chunked", COMPILED, "reference")
F64 = torch.float64
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "everything": {"bias": True, "logit_scale": 0.3, "softcap": 3.0},
}
# name: (B, T, V, D). Among them are vocabularies and widths that no tile or vector divides, and single rows.
SHAPES = {"even": (2, 9, 128, 32), "ragged": (3, 7, 333, 70), "one": (1, 2, 65, 3), "wide": (1, 5, 1031, 123)}


def _case(shape, dtype, device, head):
    b, t, v, d = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    head = dict(head)
    if head.get("bias"):
        head["bias"] = normal(v)
    tokens = torch.randint(0, v, (b, t), generator=generator).to(device)
    mask = (torch.rand(b, t, generator=generator) > 0.4).to(device)
    return normal(b, t, d) * d**-0.5 * 3, normal(v, d), tokens, mask, head


def _doubles(head):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in head.items()}


def _fields(out):
    return {name: f for name, f in zip(out._fields, out, strict=True) if f is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", IMPLS)
def test_linear_statistics(shape, head, impl, device, assert_within_budget):
    hidden, weight, tokens, mask, head = _case(shape, torch.float32, device, HEADS[head])
    want = {"mask": mask, "alpha": 0.7, "entropy": True, "logit_mean": True}
    ours = er.linear_vocab_stats(hidden, weight, tokens, impl=impl, **want, **head)
    eager = reference.linear_vocab_stats(hidden, weight, tokens, **want, **head)
    oracle = reference.linear_vocab_stats(hidden.double(), weight.double(), tokens, dtype=F64, **want, **_doubles(head))
    for name, field in _fields(ours).items():
        assert field.dtype == torch.float32 and field.shape == tokens.shape
        assert_within_budget(field, getattr(eager, name), getattr(oracle, name), scale=10.0, name=name)
        assert field[~mask].eq(0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_statistics_are_exact_for_the_logits_given(shape, impl, dtype, device, assert_within_budget):
    hidden, weight, tokens, mask, _ = _case(shape, torch.float32, device, {})
    logits = (hidden @ weight.T).to(dtype)
    want = {"mask": mask, "alpha": 1.3, "entropy": True, "logit_mean": True}
    ours = er.vocab_stats(logits, tokens, impl=impl, **want)
    eager = reference.vocab_stats(logits, tokens, **want)
    oracle = reference.vocab_stats(logits, tokens, dtype=F64, **want)
    equal = er.vocab_stats(logits.float(), tokens, impl=impl, **want)
    for name, field in _fields(ours).items():
        assert_within_budget(field, getattr(eager, name), getattr(oracle, name), scale=10.0, name=name)
        assert torch.equal(field, getattr(equal, name)), "low-precision logits against equal fp32 ones"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(impl, dtype, device, assert_within_budget):
    hidden, weight, tokens, mask, _ = _case("ragged", dtype, device, {})
    ours = er.linear_token_rewards(hidden, weight, tokens, mask=mask, entropy=True, impl=impl)
    rounded = hidden @ weight.T  # as models return them
    eager = reference.token_rewards(rounded, tokens, mask=mask, entropy=True)
    oracle = reference.linear_token_rewards(
        hidden.double(), weight.double(), tokens, mask=mask, entropy=True, dtype=F64
    )
    ours_error, eager_error = (
        {n: (f - getattr(oracle, n)).abs().max().item() for n, f in _fields(out).items()} for out in (ours, eager)
    )
    for name, error in ours_error.items():
        rounds = impl in ("chunked", "compiled") and not _chunked_is_exact(hidden, weight)
        assert error <= (1.5 * eager_error[name] if rounds else 1e-4), (name, error, eager_error[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_hidden_with_a_low_precision_weight_gives_exact_logits(dtype, device, assert_within_budget):
    hidden, weight, tokens, mask, _ = _case("ragged", torch.float32, device, {})
    weight = weight.to(dtype)

    def run(module, precision=torch.float32, **kwargs):
        h, w = hidden.to(precision).requires_grad_(), weight.to(precision if kwargs else dtype).requires_grad_()
        out = module.linear_token_rewards(h, w, tokens, mask=mask, entropy=True, **kwargs)
        return out, torch.autograd.grad(out.reward.sum() + out.entropy.sum(), (h, w))

    ours, gradients = run(er)
    eager, eager_gradients = run(reference)
    oracle, oracle_gradients = run(reference, F64, dtype=F64)
    for name, field in _fields(ours).items():
        assert_within_budget(field, getattr(eager, name), getattr(oracle, name), scale=10.0, name=name)
    assert [g.dtype for g in gradients] == [torch.float32, dtype]
    assert_within_budget(gradients[0], eager_gradients[0], oracle_gradients[0], scale=10.0, name="dhidden")
    assert_within_budget(gradients[1], eager_gradients[1], oracle_gradients[1], scale=10.0, name="dweight")
    with pytest.raises(ValueError, match=f"the kernels take one of .*, not torch.float32 with {dtype}"):
        er.linear_token_rewards(hidden, weight, tokens, impl="fused")


def _chunked_is_exact(hidden, weight):
    from endoreward_fast.vocab.chunked_tiles import uses_native_matmul

    return hidden.device.type != "cpu" or not uses_native_matmul(hidden, weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("terminal", ["default", "none", "some"])
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_token_rewards(shape, impl, terminal, path, device, assert_within_budget):
    hidden, weight, tokens, mask, head = _case(shape, torch.float32, device, HEADS["everything"])
    want = {"mask": mask, "alpha": 0.8, "entropy": True}
    if terminal != "default":
        want["terminal"] = torch.zeros_like(mask) if terminal == "none" else torch.rand(mask.shape, device=device) > 0.5
    inputs = (hidden, weight)
    names, doubles = head, _doubles(head)
    oracle = reference.linear_token_rewards(*(x.double() for x in inputs), tokens, dtype=F64, **want, **doubles)
    eager = reference.linear_token_rewards(*inputs, tokens, **want, **names)
    if path == "logits":
        logits = reference.final_logits(*(x.double() for x in inputs), dtype=F64, **doubles)
        ours = er.token_rewards(logits.float(), tokens, impl=impl, **want)
    else:
        ours = er.linear_token_rewards(*inputs, tokens, impl=impl, **want, **names)
    for name, field in _fields(ours).items():
        assert_within_budget(field, getattr(eager, name), getattr(oracle, name), scale=10.0, name=name)
        assert field[~mask].eq(0).all() and field[:, 0].eq(0).all()
    assert (ours.logprob <= 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_packed_rows(impl, path, device, assert_within_budget):
    hidden, weight, tokens, _, _ = _case("ragged", torch.float32, device, {})
    offsets = torch.tensor([0, 4, 4, 9, 20, 21], device=device)
    oracle = reference.linear_token_rewards(hidden.double(), weight.double(), tokens, cu_seqlens=offsets, dtype=F64)
    eager = reference.linear_token_rewards(hidden, weight, tokens, cu_seqlens=offsets)
    args = (hidden, weight) if path == "linear" else (hidden @ weight.T,)
    fn = er.linear_token_rewards if path == "linear" else er.token_rewards
    ours = fn(*args, tokens, cu_seqlens=offsets.int(), impl=impl)
    assert_within_budget(ours.reward, eager.reward, oracle.reward, scale=10.0)
    assert ours.reward.flatten()[[0, 4, 9, 20]].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("path", ["logits", "linear", "logit rewards", "linear rewards"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(impl, path, masked, device, assert_within_budget):
    hidden, weight, tokens, mask, head = _case("ragged", torch.float32, device, HEADS["everything"])
    want = {"mask": mask if masked else None, "alpha": 0.7, "entropy": True}
    if "rewards" not in path:
        want["logit_mean"] = True
    name = {"logits": "vocab_stats", "linear": "linear_vocab_stats", "logit rewards": "token_rewards"}.get(
        path, "linear_token_rewards"
    )
    logits = (hidden @ weight.T).detach()

    def gradients(module, leaf_dtype, **extra):
        leaves = [logits] if "logit" in path else [hidden, weight, head["bias"]]
        leaves = [x.to(leaf_dtype).clone().requires_grad_() for x in leaves]
        settings = {} if "logit" in path else {"logit_scale": 0.3, "softcap": 3.0, "bias": leaves[2]}
        out = getattr(module, name)(*leaves[:2], tokens, **want, **settings, **extra)
        generator = torch.Generator().manual_seed(2)  # a different upstream gradient for every row and field
        weights = [torch.randn(tokens.shape, generator=generator).to(device, leaf_dtype) for _ in _fields(out)]
        sum((w * f.to(leaf_dtype)).sum() for w, f in zip(weights, _fields(out).values(), strict=True)).backward()
        return [x.grad for x in leaves]

    ours = gradients(er, torch.float32, impl=impl)
    eager = gradients(reference, torch.float32)
    oracle = gradients(reference, F64, dtype=F64)
    for i, (a, b, c) in enumerate(zip(ours, eager, oracle, strict=True)):
        assert_within_budget(a, b, c, scale=2.0, name=f"{path} gradient {i}")
    if masked and "rewards" not in path:
        assert ours[0][~mask].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_off_the_mask_may_hold_anything(impl, device):
    hidden, weight, tokens, mask, _ = _case("ragged", torch.float32, device, {})
    mask[:, 0] = False
    poison = torch.where(mask.unsqueeze(-1), hidden, torch.nan).requires_grad_()
    clean = hidden.clone().requires_grad_()
    strange = torch.where(mask, tokens, 10**9)
    outs = []
    for h, t in ((poison, strange), (clean, tokens)):
        w = weight.clone().requires_grad_()
        stats = er.linear_vocab_stats(h, w, t, mask=mask, entropy=True, impl=impl)
        logits = (h @ weight.T).detach()
        rows = er.vocab_stats(logits, t, mask=mask, entropy=True, impl=impl)
        (stats.lse.sum() + stats.target_logit.sum()).backward()
        outs.append([*stats[:3], *rows[:3], h.grad, w.grad])
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 333, 2**40, -101])
def test_a_target_outside_the_vocabulary(impl, bad, device):
    hidden, weight, tokens, _, _ = _case("ragged", torch.float32, device, {})
    tokens[1, 2] = bad
    calls = (
        lambda: er.linear_vocab_stats(hidden, weight, tokens, impl=impl),
        lambda: er.vocab_stats(hidden @ weight.T, tokens, impl=impl),
        lambda: er.linear_token_rewards(hidden, weight, tokens, impl=impl),
    )
    for call in calls:
        if device.type == "cpu":
            with pytest.raises(IndexError, match=rf"{bad}.*333"):
                call()
        else:
            out = call()
            assert out[0][1, 2].isnan() and out[0].isnan().sum() == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [333, -1])
def test_a_target_outside_the_vocabulary_gives_nan_where_no_check_runs(impl, bad, device, monkeypatch):
    """As on a GPU, and under torch.compile: NaN at that token and nowhere else."""
    lost = reference.outside_vocabulary

    def quiet(targets, mask, vocab):
        with monkeypatch.context() as inside:
            inside.setattr(torch.compiler, "is_compiling", lambda: True)
            return lost(targets, mask, vocab)

    monkeypatch.setattr(reference, "outside_vocabulary", quiet)
    monkeypatch.setattr(ops, "outside_vocabulary", quiet)
    hidden, weight, tokens, _, _ = _case("ragged", torch.float32, device, {})
    tokens[1, 2] = bad
    for out in (
        er.linear_vocab_stats(hidden, weight, tokens, entropy=True, logit_mean=True, impl=impl),
        er.vocab_stats(hidden @ weight.T, tokens, entropy=True, logit_mean=True, impl=impl),
        er.linear_token_rewards(hidden, weight, tokens, entropy=True, impl=impl),
        er.token_rewards(hidden @ weight.T, tokens, entropy=True, impl=impl),
    ):
        for name, field in _fields(out).items():
            assert field[1, 2].isnan() and field.isnan().sum() == 1, name


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_of_minus_100_are_tokens_off_the_mask(impl, device):
    hidden, weight, tokens, _, _ = _case("ragged", torch.float32, device, {})
    labelled = tokens.clone()
    labelled[0, :3] = labelled[1, 2] = -100
    ours = er.linear_token_rewards(hidden, weight, labelled, entropy=True, impl=impl)
    masked = er.linear_token_rewards(hidden, weight, tokens, mask=labelled != -100, entropy=True, impl=impl)
    for name, field in _fields(ours).items():
        assert torch.equal(field, getattr(masked, name)) and field[labelled == -100].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_changes_nothing(impl, default, device):
    hidden, weight, tokens, mask, _ = _case("ragged", torch.float32, device, {})

    def run():
        out = er.linear_token_rewards(hidden, weight, tokens, mask=mask, entropy=True, impl=impl)
        returns = er.rewards_to_go(out.reward, mask, gamma=0.9)
        return *out, *er.token_rewards(hidden @ weight.T, tokens, impl=impl)[:3], returns

    expected = run()
    torch.set_default_dtype(default)
    try:
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_reward_of_minus_infinity_behind_an_underflowed_discount():
    reward, mask = torch.zeros(1, 2000), torch.ones(1, 2000, dtype=torch.bool)
    reward[0, -1] = -torch.inf
    assert er.sequence_score(reward, mask, gamma=0.9) == 0
    to_go = er.rewards_to_go(reward, mask, gamma=0.9)
    assert to_go[0, 0] == 0 and to_go[0, -1] == -torch.inf and not to_go.isnan().any()
    assert er.sequence_score(reward, mask, gamma=0.9, floor=1e-3) == -torch.inf


def test_a_floor_above_one_weighs_undiscounted_rewards_too():
    ones = torch.ones(1, 3)
    assert er.sequence_score(ones, ones > 0, floor=2.0) == 6


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_ignores_float64_and_unknown_devices(impl):
    hidden, weight, targets = torch.randn(3, 8).double(), torch.randn(50, 8).double(), torch.arange(3)
    if impl != "fused":
        with torch.autocast("cpu", torch.bfloat16):
            inside = er.linear_vocab_stats(hidden, weight, targets, impl=impl)
        assert torch.equal(inside.lse, er.linear_vocab_stats(hidden, weight, targets, impl=impl).lse)
    if impl == "chunked":
        out = er.linear_vocab_stats(*(x.to("meta") for x in (hidden, weight, targets)), impl=impl)
        assert out.lse.shape == (3,)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_statistics_are_right_without_a_target(impl, device):
    hidden, weight, tokens, _, _ = _case("ragged", torch.float32, device, {})
    with_targets = er.linear_vocab_stats(hidden, weight, tokens, entropy=True, impl=impl)
    without = er.linear_vocab_stats(hidden, weight, torch.full_like(tokens, -100), entropy=True, impl=impl)
    assert torch.equal(with_targets.lse, without.lse) and torch.equal(with_targets.entropy, without.entropy)
    assert without.target_logit.eq(0).all() and not with_targets.target_logit.eq(0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_inputs_and_masks(impl, device):
    weight = torch.randn(33, 8, device=device, requires_grad=True)
    for shape in ((0,), (0, 4), (2, 0)):
        hidden = torch.randn(*shape, 8, device=device, requires_grad=True)
        tokens = torch.zeros(*shape, dtype=torch.long, device=device)
        out = er.linear_vocab_stats(hidden, weight, tokens, entropy=True, impl=impl)
        assert all(f.shape == shape for f in out[:3])
        if len(shape) == 2:
            assert er.linear_token_rewards(hidden, weight, tokens, impl=impl).reward.shape == shape
            assert er.token_rewards(hidden @ weight.T, tokens, impl=impl).reward.shape == shape
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    tokens = torch.zeros(2, 3, dtype=torch.long, device=device)
    none = torch.zeros(2, 3, dtype=torch.bool, device=device)
    linear = er.linear_token_rewards(hidden, weight, tokens, mask=none, entropy=True, impl=impl)
    stored = er.token_rewards(hidden @ weight.T, tokens, mask=none, entropy=True, impl=impl)
    assert all(f.eq(0).all() for f in (*linear, *stored))
    (linear.reward.sum() + stored.reward.sum()).backward()
    assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_one_row_without_leading_dimensions(device):
    logits = torch.randn(40, device=device)
    out = er.vocab_stats(logits, torch.tensor(3, device=device))
    torch.testing.assert_close(out.lse, torch.logsumexp(logits, -1))
    assert out.lse.shape == () and out.target_logit == logits[3]


def test_sequence_score():
    reward = torch.tensor([[9.0, 1.0, 2.0, 4.0], [9.0, 9.0, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    score = er.sequence_score
    assert score(reward, mask).tolist() == [7.0, 3.0, 0.0]
    torch.testing.assert_close(score(reward, mask, reduction="mean"), torch.tensor([7 / 3, 3.0, 0.0]))
    assert score(reward, mask, gamma=0.5).tolist() == [1 + 1 + 1, 3.0, 0.0]
    assert score(reward, mask, gamma=0.5, floor=0.5).tolist() == [1 + 1 + 2, 3.0, 0.0]
    assert score(reward.double(), mask).dtype == torch.float32
    assert score(torch.where(mask, reward, torch.nan), mask).tolist() == [7.0, 3.0, 0.0]


def test_rewards_to_go():
    reward = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]])
    mask = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    assert er.rewards_to_go(reward, mask).tolist() == [[0, 7, 6, 0, 4]]
    assert er.rewards_to_go(reward, mask, gamma=0.5).tolist() == [[0, 1 + 0.5 * 4, 4, 0, 4]]
    assert er.rewards_to_go(torch.where(mask, reward, torch.nan), mask, gamma=0.5).tolist() == [[0, 3, 4, 0, 4]]
    long, some = torch.randn(3, 37), torch.rand(3, 37) > 0.3
    expected, to_go = torch.zeros(3, 37), torch.zeros(3)
    for t in reversed(range(37)):
        to_go = torch.where(some[:, t], long[:, t] + 0.9 * to_go, to_go)
        expected[:, t] = torch.where(some[:, t], to_go, 0.0)
    torch.testing.assert_close(er.rewards_to_go(long, some, gamma=0.9), expected)
    assert er.rewards_to_go(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), gamma=0.9).shape == (2, 0)


def test_terminal_at():
    tokens, mask = torch.tensor([[2, 5, 2], [7, 5, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    assert er.terminal_at(tokens, mask, 2).tolist() == [[False, False, True], [False] * 3]
    assert er.terminal_at(tokens, mask, [2, 7]).tolist() == [[False, False, True], [True, False, False]]


HOLDS = r"mask holds \d+: expected bool, or integers 0 and 1"
REFUSALS = {
    "float mask": (lambda h, w, t: er.vocab_stats(h, t, mask=(t > 3).float()), r"mask is \(2, 4\).*float32.*bool"),
    "labels mask": (lambda h, w, t: er.token_rewards(h, t, mask=-100 * (t > 3)), "mask holds -100: expected bool"),
    "int terminal": (lambda h, w, t: er.linear_token_rewards(h, w, t, terminal=t + 2), "terminal holds [2-9]"),
    "list mask": (lambda h, w, t: er.sequence_score(h[..., 0], t.tolist()), "mask is a list: expected a tensor"),
    "mask's shape": (lambda h, w, t: er.sequence_score(h[..., 0], t[:1]), r"mask is \(1, 4\).*expected \(2, 4\)"),
    "weight": (lambda h, w, t: er.linear_vocab_stats(h, w[:, :-1], t), r"weight is \(50, 7\).*\(V, 8\)"),
    "weight dtype": (lambda h, w, t: er.linear_vocab_stats(h.half(), w, t), r"weight is .*float32.*float16"),
    "bias": (lambda h, w, t: er.linear_vocab_stats(h, w, t, bias=w[:3, 0]), r"bias is \(3,\).*\(50,\)"),
    "softcap": (lambda h, w, t: er.linear_vocab_stats(h, w, t, softcap=0.0), "softcap=0.0"),
    "targets": (lambda h, w, t: er.vocab_stats(h, t[:, 1:]), r"targets is \(2, 3\).*\(2, 4\)"),
    "int32": (lambda h, w, t: er.vocab_stats(h, t.int()), "targets is .*int32.*int64"),
    "mask": (lambda h, w, t: er.vocab_stats(h, t, mask=t), HOLDS),
    "terminal": (lambda h, w, t: er.token_rewards(h, t, terminal=t[:1] > 0), r"terminal is \(1, 4\)"),
    "tokens": (lambda h, w, t: er.token_rewards(h, t.flatten()), r"tokens is \(8,\).*\(2, 4\)"),
    "logits": (lambda h, w, t: er.token_rewards(h[0], t[0]), r"logits is \(4, 8\).*\(B, T, V\)"),
    "integers": (lambda h, w, t: er.vocab_stats(t, t), "logits is .*floating-point"),
    "alpha": (lambda h, w, t: er.vocab_stats(h, t, alpha=0.0), "alpha=0.0"),
    "offsets": (lambda h, w, t: er.token_rewards(h, t, cu_seqlens=torch.tensor([0, 9])), "cu_seqlens=.*B \\* T = 8"),
    "alpha tensor": (lambda h, w, t: er.vocab_stats(h, t, alpha=torch.ones(())), "alpha is a tensor"),
    "list": (lambda h, w, t: er.vocab_stats(h, t.tolist()), "targets is a list: expected a tensor"),
    "scale": (lambda h, w, t: er.linear_vocab_stats(h, w, t, logit_scale=float("nan")), "logit_scale=nan"),
    "eos": (lambda h, w, t: er.terminal_at(t, t > 0, None), "eos_token_id is None"),
    "ends": (lambda h, w, t: er.terminal_at(t, t, 3), HOLDS),
    "impl": (lambda h, w, t: er.vocab_stats(h, t, impl="fast"), "impl='fast'.*'fused'"),
    "float64": (lambda h, w, t: er.vocab_stats(h.double(), t, impl="fused"), "impl='fused' cannot run"),
    "reduction": (lambda h, w, t: er.sequence_score(h[..., 0], t > 0, reduction="max"), "reduction='max'"),
    "gamma": (lambda h, w, t: er.rewards_to_go(h[..., 0], t > 0, gamma=1.5), "gamma=1.5"),
    "reward mask": (lambda h, w, t: er.rewards_to_go(h[..., 0], t), HOLDS),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_refused_by_name(case):
    call, message = REFUSALS[case]
    hidden, weight, tokens = torch.randn(2, 4, 8), torch.randn(50, 8), torch.randint(0, 8, (2, 4))
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, tokens)


def test_fused_needs_a_device_and_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'fused' cannot run here.*'cpu'"):
        er.vocab_stats(torch.randn(2, 5), torch.zeros(2, dtype=torch.long), impl="fused")
    out = er.vocab_stats(torch.randn(2, 5), torch.zeros(2, dtype=torch.long))
    assert out.lse.isfinite().all(), "auto takes another way"


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_rewards_that_carry_a_gradient_are_no_views(impl):
    """FSDP2 warns of a module that returns views."""
    hidden, weight, tokens = torch.randn(2, 5, 8, requires_grad=True), torch.randn(20, 8), torch.arange(10).view(2, 5)
    out = er.linear_token_rewards(hidden, weight, tokens, entropy=True, impl=impl)
    assert not any(field._is_view() for field in out)
