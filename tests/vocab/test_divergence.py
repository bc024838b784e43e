"""The divergence of two distributions against the fp64 oracle, the oracle against the definition, and the limits."""

import math

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.vocab.divergence import chunked, reference

FAST = ("fused", "chunked")
IMPLS = (*FAST, "reference")
KINDS = ("forward-kl", "reverse-kl", "jsd")
INF = float("inf")
F64 = torch.float64


def oracle(student, teacher, kind="forward-kl", beta=0.5, mask=None, alpha=1.0, dtype=F64):
    p, q = (student, teacher) if kind == "reverse-kl" else (teacher, student)
    beta = beta if kind == "jsd" else None
    return reference.divergence(p, q, mask=mask, beta=beta, alpha=alpha, dtype=dtype)


def with_gradients(function, leaves, g):
    """Return function(*leaves) and the gradients of its sum weighted by g."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g.to(out))


def check(budget, student, teacher, impl, g=None, scale=1.0, **how):
    """Check value and both gradients of an implementation under the error budget."""
    g = torch.ones(student.shape[:-1], device=student.device) if g is None else g
    pair = student, teacher
    ours = with_gradients(lambda s, t: er.vocab_divergence(s, t, impl=impl, **how), pair, g)
    eager = with_gradients(lambda s, t: oracle(s, t, dtype=torch.float32, **how), pair, g)
    exact = with_gradients(lambda s, t: oracle(s, t, **how), [x.double() for x in pair], g)
    for name, one, other, right in zip(("value", "student", "teacher"), ours, eager, exact, strict=True):
        assert not one.isnan().any(), name
        if one.dtype == torch.bfloat16:  # the last rounding of a number between two is arbitrary
            other = right * (1 + torch.finfo(torch.bfloat16).eps)
        budget(one, other, right, scale=scale, name=name)
    return ours


def test_the_oracle_is_the_definition():
    """The roles of student and teacher, of beta, and of alpha, in Python floats."""
    z, t, alpha, beta = [1.0, 2.5, -1.0], [0.5, -2.0, 3.0], 0.7, 0.2
    pi, tau = ([math.exp(x / alpha) / sum(math.exp(y / alpha) for y in row) for x in row] for row in (z, t))
    m = [beta * b + (1 - beta) * a for a, b in zip(pi, tau, strict=True)]

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    wanted = {"forward-kl": kl(tau, pi), "reverse-kl": kl(pi, tau), "jsd": beta * kl(tau, m) + (1 - beta) * kl(pi, m)}
    rows = torch.tensor(z, dtype=F64), torch.tensor(t, dtype=F64)
    for kind, value in wanted.items():
        assert oracle(*rows, kind, beta, alpha=alpha).item() == pytest.approx(value, rel=1e-12)
        for impl in IMPLS:
            found = er.vocab_divergence(*(x.float() for x in rows), kind=kind, beta=beta, alpha=alpha, impl=impl)
            assert found.item() == pytest.approx(value, rel=1e-6) and found.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracles_gradients_are_finite_differences(kind):
    rows = [torch.randn(2, 5, dtype=F64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda s, t: oracle(s, t, kind, 0.3, alpha=0.6), rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 200])
def test_values_and_gradients(vocab, kind, impl, device, assert_within_budget):
    student, teacher = torch.randn(2, 2, 2, vocab, device=device) * 3
    mask = torch.tensor([[True, True], [False, True]], device=device)
    g = torch.randn(2, 2, device=device)
    beta = 0.1 if vocab == 200 else 0.5
    value, ds, dt = check(
        assert_within_budget, student, teacher, impl, g, scale=3.0, kind=kind, beta=beta, mask=mask, alpha=0.7
    )
    assert (value >= 0).all()
    assert all((x[~mask] == 0).all() for x in (value, ds, dt))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("vocab", "kind"), [(50257, "forward-kl"), (32001, "jsd")])
def test_real_vocabularies(kind, vocab, impl, device, assert_within_budget):
    """A peaked row, a row far below 0, which columns past the vocabulary would outweigh, and a common offset."""
    student, teacher = torch.randn(2, 3, vocab, device=device)
    student[0, 7], teacher[0, vocab - 1] = 80.0, 60.0
    student[1] -= 2e4
    teacher[1] -= 3e4
    student[2] += 1e6
    check(assert_within_budget, student, teacher, impl, scale=80.0, kind=kind, beta=0.3)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_give_exactly_zero_and_a_zero_gradient(kind, impl, device):
    student = torch.randn(2, 200, device=device) * 10
    student[1, ::3] = -INF
    value, ds, dt = with_gradients(
        lambda s, t: er.vocab_divergence(s, t, kind=kind, beta=0.3, impl=impl), (student, student), torch.ones(2)
    )
    assert not value.any() and not ds.any() and not dt.any()
    near = er.vocab_divergence(student, student + 1e-6 * torch.randn_like(student), kind=kind, impl=impl)
    assert (near >= 0).all(), "rounding must not show below 0"


def rows_with_holes(device):
    """Six pairs over 200 words: which of student and teacher excludes a word, none, or all of the second tile."""
    student, teacher = torch.randn(2, 6, 200, device=device)
    student[0, 5] = -INF
    teacher[1, 5] = -INF
    student[2, 5] = teacher[2, 5] = -INF
    student[3, 128:] = teacher[3, 128:] = -INF
    student[4, :150], teacher[4, 100:] = -INF, -INF  # no word in common
    teacher[5, 5] = -200.0  # its probability is 0 in float32, and no hole
    student[5, 9] = -INF
    teacher[5, 9] = -150.0  # positive, however small: the forward KL is infinite
    return student, teacher


@pytest.mark.parametrize("impl", IMPLS)
def test_excluded_words(impl, device, assert_within_budget):
    student, teacher = rows_with_holes(device)
    infinite = {"forward-kl": [0, 4, 5], "reverse-kl": [1, 4], "jsd": []}
    for kind, rows in infinite.items():
        value, ds, dt = check(assert_within_budget, student, teacher, impl, kind=kind, beta=0.3)
        assert value.isinf().nonzero().flatten().tolist() == rows
        assert not ds[rows].any() and not dt[rows].any() and ds.isfinite().all() and dt.isfinite().all()
        assert ds[2].any() and dt[3].any()
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert value[4].item() == pytest.approx(entropy, rel=1e-6), "JSD is at most the entropy of (beta, 1 - beta)"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_the_jsd_is_finite_at_the_ends_of_beta(beta, impl, device):
    """Each row has words whose log-ratio is above 20, of which e^-|u| - 1 rounds to -1."""
    student, teacher = torch.randn(2, 3, 140, device=device)
    student[0, 3] = teacher[1, 3] = 40.0
    student[2, 5], teacher[2, 9] = -INF, -INF
    value, ds, dt = with_gradients(
        lambda s, t: er.vocab_divergence(s, t, kind="jsd", beta=beta, impl=impl), (student, teacher), torch.ones(3)
    )
    exact = oracle(student.double(), teacher.double(), kind="jsd", beta=beta)
    torch.testing.assert_close(value.double(), exact, rtol=0.02, atol=0)
    assert ds.isfinite().all() and dt.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_all_minus_infinity(impl, device):
    student, teacher = torch.randn(2, 3, 140, device=device)
    student[0] = teacher[1] = -INF
    student[2] = teacher[2] = -INF
    beta = 0.3
    wanted = {
        "forward-kl": [INF, 0.0, 0.0],
        "reverse-kl": [0.0, INF, 0.0],
        "jsd": [-beta * math.log(beta), -(1 - beta) * math.log(1 - beta), 0.0],
    }
    for kind, values in wanted.items():
        value, ds, dt = with_gradients(
            lambda s, t, kind=kind: er.vocab_divergence(s, t, kind=kind, beta=beta, impl=impl),
            (student, teacher), torch.ones(3),
        )  # fmt: skip
        torch.testing.assert_close(value.cpu(), torch.tensor(values), rtol=1e-6, atol=0)
        assert not ds.any() and not dt.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_swallowed(impl, device):
    student, teacher = torch.randn(2, 3, 140, device=device)
    student[0, 3] = teacher[1, 135] = float("nan")
    for kind in KINDS:
        found = er.vocab_divergence(student, teacher, kind=kind, impl=impl)
        assert found.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("impl", FAST)
def test_words_masked_with_the_lowest_number(impl, device, assert_within_budget):
    student, teacher = torch.randn(2, 1, 140, device=device)
    student[:, 130:] = teacher[:, 130:] = torch.finfo(torch.float32).min
    for kind in ("reverse-kl", "jsd"):
        check(assert_within_budget, student, teacher, impl, kind=kind, alpha=0.5)


@pytest.mark.parametrize("impl", FAST)
def test_strides_dtypes_and_inputs(impl, device, assert_within_budget):
    """Two pitches, a transposed vocabulary and two dtypes; bfloat16 logits count for what they are."""
    wide = torch.randn(2, 3, 150, device=device)
    student, teacher = wide[:, :-1, 3:143], torch.randn(2, 140, 2, device=device).bfloat16().transpose(1, 2)
    before = wide.clone(), teacher.clone()
    for kind in ("forward-kl", "jsd"):
        check(assert_within_budget, student, teacher, impl, torch.randn(2, 1, device=device).expand(2, 2), kind=kind)
        equal = er.vocab_divergence(student, teacher.float(), kind=kind, impl=impl)
        assert torch.equal(er.vocab_divergence(student, teacher, kind=kind, impl=impl), equal)
    assert torch.equal(wide, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("impl", FAST)
def test_a_row_alone_has_the_bits_of_the_same_row_in_a_batch(impl, device):
    student, teacher = torch.randn(2, 3, 200, device=device)
    for kind in ("forward-kl", "jsd"):
        batch = er.vocab_divergence(student, teacher, kind=kind, beta=0.3, impl=impl)
        alone = [er.vocab_divergence(student[i], teacher[i], kind=kind, beta=0.3, impl=impl) for i in (0, 2)]
        assert torch.equal(batch[[0, 2]], torch.stack(alone))


def test_rows_of_many_chunks_have_the_same_bits_in_other_batches(device):
    """Seven chunks: torch's sum over them takes another order for the last rows of a batch."""
    student, teacher = torch.randn(2, 9, 50257, device=device)
    whole = er.vocab_divergence(student, teacher, kind="reverse-kl", impl="chunked")
    for part in (slice(0, 5), slice(5, 9), slice(8, 9)):
        found = er.vocab_divergence(student[part], teacher[part], kind="reverse-kl", impl="chunked")
        assert torch.equal(whole[part], found)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_none_needed(kind, impl, device):
    for rows, mask in ((0, None), (2, torch.zeros(2, dtype=torch.bool, device=device))):
        pair = [torch.full((rows, 50), float("nan"), device=device) for _ in range(2)]
        for x in with_gradients(
            lambda s, t, mask=mask: er.vocab_divergence(s, t, kind=kind, mask=mask, impl=impl),
            pair, torch.ones(rows, device=device),
        ):  # fmt: skip
            assert x.shape[0] == rows and not x.any()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_gives_the_same_gradient(kind, impl, device):
    student, teacher = torch.randn(2, 2, 60, device=device).unbind()
    student.requires_grad_()
    value = er.vocab_divergence(student, teacher, kind=kind, impl=impl).sum()
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_rows_beyond_32_bit_offsets(device):
    """Offsets of either side above 2^31 elements. On the CPU only the touched pages exist."""
    pitch, vocab = 2**30 + 64, 64
    storage = torch.empty(2 * pitch + vocab, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, vocab), (pitch, 1))
    near = torch.randn(3, vocab, device=device)
    far.copy_(torch.randn(3, vocab))
    g = torch.ones(3, device=device)
    for pair in ((far, near), (near, far)):
        leaves = [x.detach().requires_grad_() for x in pair]
        ours = er.vocab_divergence(*leaves, kind="jsd", impl="fused")
        grads = torch.autograd.grad(ours, leaves, g)
        right = with_gradients(lambda s, t: oracle(s, t, "jsd"), [x.detach().clone() for x in pair], g)
        for one, other in zip((ours, *grads), right, strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-2, atol=1e-5)


# ----------------------------------------------------------------------------------------------- from hidden states


HEADS = {"bias": 300, "teacher_bias": 300}
NUMBERS = {"logit_scale": 0.9, "softcap": 5.0, "teacher_logit_scale": 1.3, "teacher_softcap": 8.0}


def tensors(rows, device, dtypes=(torch.float32, torch.float32), vocab=300):
    return {
        name: (torch.randn(*shape, device=device) * size).to(dtype)
        for name, shape, size, dtype in (
            ("hidden", (rows, 24), 1, dtypes[0]), ("weight", (vocab, 24), 0.5, dtypes[0]),
            ("teacher_hidden", (rows, 17), 1, dtypes[1]), ("teacher_weight", (vocab, 17), 0.5, dtypes[1]),
            ("bias", (vocab,), 1, dtypes[0]), ("teacher_bias", (vocab,), 1, dtypes[1]),
        )
    }  # fmt: skip


def linear_oracle(numbers, kind, beta, mask, alpha, dtype):
    def call(hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias):
        student = hidden, weight, bias, numbers["logit_scale"], numbers["softcap"]
        teacher = (
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            numbers["teacher_logit_scale"],
            numbers["teacher_softcap"],
        )
        p, q = (student, teacher) if kind == "reverse-kl" else (teacher, student)
        how = {"mask": mask, "beta": beta if kind == "jsd" else None, "alpha": alpha, "dtype": dtype}
        return reference.linear_divergence(p, q, **how)

    return call


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states(kind, rows, device, assert_within_budget, monkeypatch):
    """Every head option, gradients of all six tensors, several tiles in both directions."""
    limits = chunked.limits_for(device)
    small = type(limits)(**{**vars(limits), "tile": 1024, "native_tile": 1024, "rows": 8, "rows_per_sweep": 20})
    monkeypatch.setattr(chunked, "limits_for", lambda device: small)
    given, g = tensors(rows, device), torch.randn(rows, device=device)
    mask = torch.rand(rows, device=device) > 0.3
    mask[0] = True

    def ours(*leaves):
        return er.linear_vocab_divergence(
            **dict(zip(given, leaves, strict=True)), **NUMBERS, kind=kind, beta=0.3, mask=mask, alpha=0.7
        )

    found = with_gradients(ours, given.values(), g)
    eager, exact = (
        with_gradients(
            linear_oracle(NUMBERS, kind, 0.3, mask, 0.7, dtype), [x.to(dtype) for x in given.values()], g
        )
        for dtype in (torch.float32, F64)
    )  # fmt: skip
    for name, a, b, c in zip(("value", *given), found, eager, exact, strict=True):
        assert_within_budget(a, b, c, scale=max(4.0, c.abs().max().item()), name=name)
    assert not found[0][~mask].any() and not found[1][~mask].any()


def test_two_dtypes_and_no_gradient_for_the_teacher(device, monkeypatch):
    """A teacher without a gradient costs no sweep of its own. Its dtype and width are its own."""
    from endoreward_fast.vocab.divergence import backward

    sweeps = []
    real = backward.sweep_gradients
    monkeypatch.setattr(backward, "sweep_gradients", lambda *a, **k: sweeps.append(a[0]._which) or real(*a, **k))
    given = tensors(30, device, (torch.float32, torch.bfloat16))
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
    value = er.linear_vocab_divergence(**given, kind="reverse-kl")
    grads = torch.autograd.grad(value.sum(), leaves)
    assert sweeps == [0], "the student is p of the reverse KL"
    plain = {"logit_scale": 1.0, "softcap": None, "teacher_logit_scale": 1.0, "teacher_softcap": None}
    exact = with_gradients(
        linear_oracle(plain, "reverse-kl", None, None, 1.0, F64),
        [x.detach().double() for x in given.values()], torch.ones(30, device=device),
    )  # fmt: skip
    for ours, right in zip((value, *grads), exact, strict=False):
        scale = right.abs().max().clamp(min=1)
        assert (ours - right).abs().max() < 0.02 * scale, "a bfloat16 matmul may round the teacher's logits"


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_weight_gets_both_gradients(kind, device, assert_within_budget):
    """Self-distillation from another context: one head, two hidden states; the same states give exactly 0."""
    one, other, weight = torch.randn(6, 16, device=device), torch.randn(6, 16, device=device), torch.randn(90, 16)
    weight = weight.to(device).requires_grad_()
    value = er.linear_vocab_divergence(one, weight, other, weight, kind=kind)
    (tied,) = torch.autograd.grad(value.sum(), weight)
    z = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(one.double() @ z.T, other.double() @ z.T, kind).sum(), z)
    assert_within_budget(tied, tied, exact, scale=16.0)
    same = er.linear_vocab_divergence(one, weight, one, weight, kind=kind)
    assert not same.any() and not torch.autograd.grad(same.sum(), weight)[0].any()


def test_the_weights_gradient_accumulates_in_float32(device):
    """1500 rows in three tiles, each adding 1/3 of an ulp of bfloat16: rounding after every tile would lose them."""
    rows, dim, vocab = 1500, 8, 40
    given = {
        "hidden": torch.randn(rows, dim, device=device).bfloat16(),
        "weight": torch.randn(vocab, dim, device=device).bfloat16(),
        "teacher_hidden": torch.randn(rows, dim, device=device).bfloat16(),
        "teacher_weight": torch.randn(vocab, dim, device=device).bfloat16(),
    }
    weight = given["weight"].requires_grad_()
    value = er.linear_vocab_divergence(**given).sum()
    (ours,) = torch.autograd.grad(value, weight)
    z = weight.detach().float().requires_grad_()
    wide = {name: x.detach().float() for name, x in given.items()} | {"weight": z}
    (right,) = torch.autograd.grad(er.linear_vocab_divergence(**wide).sum(), z)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - right).abs().max() <= 0.005 * right.abs().max()
