"""The chunked path, forward and backward, against the fp64 oracle under the error budget, and its hard cases."""

from dataclasses import replace

import pytest
import torch

from endoreward_fast.vocab import chunked, chunked_tiles, reference
from endoreward_fast.vocab.rows import RowGrads

FIELDS = ("lse", "target_logit", "entropy", "logit_mean")
BF16 = torch.bfloat16


def stats_of(z, targets, alpha=1.0, entropy=True, logit_mean=True, mask=None):
    stats, _ = chunked.logits_forward(
        z.unsqueeze(0), targets, mask=mask, alpha=alpha, entropy=entropy, logit_mean=logit_mean
    )
    return stats


def backward_of(z, targets, stats, upstream, alpha=1.0, mask=None):
    grads = RowGrads(*upstream)
    return chunked.logits_backward(z.unsqueeze(0), targets, stats, grads, mask=mask, alpha=alpha).squeeze(0)


def linear_stats_of(hidden, weight, targets, entropy=False, logit_mean=False, **head):
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0} | head
    return chunked.linear_forward(hidden, weight, targets, entropy=entropy, logit_mean=logit_mean, **head)[0]


def linear_backward_of(hidden, weight, targets, stats, upstream, needs, **head):
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0} | head
    return chunked.linear_backward(hidden, weight, targets, stats, RowGrads(*upstream), needs=needs, **head)


def random_targets(rows, vocab):
    targets = torch.randint(0, vocab, (rows,))
    targets[::5] = -100
    return targets


def autograd(function, leaves, upstream):
    """Return the gradients of sum_f (upstream_f . function(leaves)_f) in the leaves' dtype."""
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    total = sum((field * g.to(field.dtype)).sum() for field, g in zip(out, upstream, strict=True) if g is not None)
    return torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])


def assert_rows_within_budget(ours, eager, oracle):
    """Assert the error budget of gradients. It holds for rows, because the last rounding of an element is arbitrary:

        max |ours - oracle| <= max |eager - oracle| + a unit in the last place of ours (float32: 16 units)

    The unit is that of the tensor's largest number, but at least that of 0.25, because the summands are of order 1.
    """
    units = (16 if ours.dtype in (torch.float32, torch.float64) else 1) * torch.finfo(
        torch.float32 if ours.dtype == torch.float64 else ours.dtype
    ).eps
    ours, eager, oracle = (x.double().view(len(x), -1) for x in (ours, eager, oracle))
    assert ours.isfinite().all()
    error, eager_error = (ours - oracle).abs().amax(1), (eager - oracle).abs().amax(1)
    excess = error - eager_error - units * oracle.abs().max().clamp(min=0.25)
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"row {worst}: error {error[worst]:.3e}, eager torch's {eager_error[worst]:.3e}"


def eager_budget(z, targets, alpha):
    """Return the statistics of eager torch in float32 and of the oracle in float64 for the same logits."""
    kwargs = {"alpha": alpha, "entropy": True, "logit_mean": True}
    return (
        reference.vocab_stats(z, targets, dtype=torch.float32, **kwargs)[:4],
        reference.vocab_stats(z, targets, dtype=torch.float64, **kwargs)[:4],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "alpha"), [(5, 50257, 1.0), (130, 8193, 0.7), (1, 129920, 1.0), (3, 7, 2.0)])
def test_stored_logits(assert_within_budget, rows, vocab, alpha, dtype):
    z, targets = (3 * torch.randn(rows, vocab)).to(dtype), random_targets(rows, vocab)
    ours, upstream = stats_of(z, targets, alpha), [torch.randn(rows) for _ in FIELDS]
    for name, got, eager, oracle in zip(FIELDS, ours[:4], *eager_budget(z, targets, alpha), strict=True):
        assert got.dtype == torch.float32
        assert_within_budget(got, eager, oracle, scale=30.0 if name == "lse" else 1.0, name=name)

    got = backward_of(z, targets, ours, upstream, alpha)

    def gradient(kind):
        return autograd(
            lambda x: reference.vocab_stats(x, targets, alpha=alpha, entropy=True, logit_mean=True, dtype=kind)[:4],
            [z.to(kind)],
            upstream,
        )[0]

    assert got.dtype == dtype
    assert_rows_within_budget(got, gradient(torch.float32).to(dtype), gradient(torch.float64))


HEADS = [
    {"rows": 40, "dim": 123, "vocab": 9001},
    {"rows": 600, "dim": 70, "vocab": 1500, "softcap": 3.0, "alpha": 0.5},
    {"rows": 7, "dim": 300, "vocab": 8200, "bias": True, "logit_scale": 0.25, "softcap": 1.0},
    {"rows": 1, "dim": 64, "vocab": 32001, "bias": True},
    {"rows": 65, "dim": 64, "vocab": 16500, "bias": True, "logit_scale": 1.5, "alpha": 2.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", HEADS, ids=lambda case: "-".join(map(str, case.values())))
def test_linear(assert_within_budget, case, dtype):
    rows, dim, vocab = case["rows"], case["dim"], case["vocab"]
    alpha = case.get("alpha", 1.0)
    parts = {"logit_scale": case.get("logit_scale", 1.0), "softcap": case.get("softcap")}
    hidden = torch.randn(rows, dim).to(dtype)
    weight = (torch.randn(vocab, dim) * 2 / dim**0.5).to(dtype)
    bias = torch.randn(vocab).to(dtype) if "bias" in case else None
    targets, upstream = random_targets(rows, vocab), [torch.randn(rows) for _ in FIELDS]

    def eager(h, w, b, kind):
        z = (h @ w.T).to(kind)  # in bfloat16, eager torch has rounded logits
        z = z if b is None else z + b
        z = z * parts["logit_scale"]
        if parts["softcap"] is not None:
            z = parts["softcap"] * torch.tanh(z / parts["softcap"])
        return reference.vocab_stats(z, targets, alpha=alpha, entropy=True, logit_mean=True, dtype=kind)[:4]

    def everything(kind):
        leaves = [x if x is None or kind == torch.float32 else x.to(kind) for x in (hidden, weight, bias)]
        return eager(*leaves, kind), autograd(lambda h, w, b=None: eager(h, w, b, kind), leaves, upstream)

    head = parts | {"bias": bias, "alpha": alpha}
    ours = linear_stats_of(hidden, weight, targets, entropy=True, logit_mean=True, **head)
    needs = (True, True, bias is not None)
    gradients = linear_backward_of(hidden, weight, targets, ours, upstream, needs, **head)
    eager_stats, eager_gradients = everything(torch.float32)
    oracle_stats, oracle_gradients = everything(torch.float64)
    for name, got, eager_field, oracle in zip(FIELDS, ours[:4], eager_stats, oracle_stats, strict=True):
        assert_within_budget(got, eager_field, oracle, scale=10.0, name=name)
    gradients = [g for g in gradients if g is not None]
    for got, eager_gradient, oracle in zip(gradients, eager_gradients, oracle_gradients, strict=True):
        assert got.dtype == dtype
        assert_rows_within_budget(got, eager_gradient, oracle)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_rule_is_only_about_speed(monkeypatch, native):
    """Both branches of `uses_native_matmul` give right results. Upcasting is accurate to float32 on any chip."""
    monkeypatch.setattr(chunked_tiles, "has_bf16_units", lambda: native)
    hidden, weight = torch.randn(40, 96).to(BF16), torch.randn(5000, 96).to(BF16)
    assert chunked_tiles.uses_native_matmul(hidden, weight) is native
    assert chunked_tiles.uses_native_matmul(hidden[:2], weight)
    assert not chunked_tiles.uses_native_matmul(hidden.float(), weight)
    assert not chunked_tiles.uses_native_matmul(hidden.half(), weight.half())
    targets = torch.arange(40)
    stats = linear_stats_of(hidden, weight, targets)
    oracle = reference.linear_vocab_stats(hidden, weight, targets, dtype=torch.float64)
    tolerance = 0.2 if native else 1e-4
    torch.testing.assert_close(stats.lse.double(), oracle.lse, atol=tolerance, rtol=0)
    torch.testing.assert_close(stats.target_logit.double(), oracle.target_logit, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------------- hard rows


def hard_rows():
    vocab = 20001
    z = torch.randn(8, vocab)
    z[0] = -torch.inf
    z[1, :9000] = -torch.inf  # a whole chunk
    z[2, ::2] = -torch.inf
    z[3] += 1e6
    z[4] -= 2e4
    z[5] = torch.finfo(torch.float32).min
    z[6] = -torch.inf
    z[6, -1] = 4.0  # only one action is possible
    z[7, 12345] = 300.0  # peaked
    return z, torch.tensor([5, 10000, 1, 7, 20000, 3, 20000, 12345])


def test_hard_rows(assert_within_budget):
    z, targets = hard_rows()
    ours = stats_of(z, targets)
    for name, got, eager, oracle in zip(FIELDS, ours[:4], *eager_budget(z, targets, 1.0), strict=True):
        rows = [row for row in range(len(z)) if name != "logit_mean" or row != 5]  # the sum of row 5 overflows
        assert_within_budget(got[rows], eager[rows], oracle[rows], name=name)
    lse, target_logit, entropy = ours[:3]
    assert lse[0] == -torch.inf and entropy[0] == 0
    assert entropy[6] == 0 and lse[6] == 4.0
    assert (entropy >= 0).all() and (entropy <= torch.tensor(float(z.shape[1])).log()).all()
    alive = lse.isfinite()
    assert (target_logit[alive] <= lse[alive]).all()


def test_a_common_offset_leaves_the_entropy_alone():
    """Bitwise, because the logits are multiples of 1/16 and stay exact when shifted."""
    z = (torch.randn(4, 20001) * 16).round() / 16
    targets = torch.zeros(4, dtype=torch.long)
    assert torch.equal(stats_of(z, targets)[2], stats_of(z + 1e6, targets)[2])


def test_gradients_of_hard_rows_are_finite_and_zero_for_impossible_actions():
    z, targets = hard_rows()
    targets[0] = -100
    stats = stats_of(z, targets)
    fives = torch.full((len(z),), 5.0)
    gradient = backward_of(z, targets, stats, (fives, fives, fives, None))
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()
    assert (gradient[2, ::2] == 0).all()


def test_all_minus_inf_bias_rows_in_the_linear_path():
    hidden, weight = torch.randn(3, 16), torch.randn(40, 16)
    targets = torch.tensor([-100, -100, -100])
    bias = torch.full((40,), -torch.inf)
    stats = linear_stats_of(hidden, weight, targets, entropy=True, bias=bias)
    assert (stats.lse == -torch.inf).all() and (stats.entropy == 0).all()
    ones = torch.ones(3)
    gradients = linear_backward_of(
        hidden, weight, targets, stats, (ones, ones, ones, None), (True, True, True), bias=bias
    )
    assert all((g == 0).all() for g in gradients)


def test_nan_stays_nan():
    z = torch.randn(2, 9000)
    z[1, 8500] = torch.nan
    lse, _, entropy = stats_of(z, torch.zeros(2, dtype=torch.long))[:3]
    assert lse[0].isfinite() and lse[1].isnan() and entropy[1].isnan()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "padded", "unaligned"])
def test_strides(layout):
    z = torch.randn(6, 9001)
    wide = torch.zeros(6, 9100)
    views = {
        "transposed": z.T.contiguous().T,
        "sliced": torch.stack([z, z], -1)[..., 0],
        "padded": wide[:, :9001].copy_(z),
        "unaligned": torch.cat([torch.zeros(1), z.flatten()])[1:].view(6, 9001),
    }
    targets, upstream = random_targets(6, 9001), [torch.randn(6) for _ in FIELDS]
    plain, ours = stats_of(z, targets), stats_of(views[layout], targets)
    assert all(torch.equal(a, b) for a, b in zip(plain[:6], ours[:6], strict=True))
    assert torch.equal(backward_of(z, targets, plain, upstream), backward_of(views[layout], targets, ours, upstream))


def test_a_row_alone_equals_the_row_in_a_batch_of_stored_logits():
    z, targets = torch.randn(300, 20001), random_targets(300, 20001)
    whole, one = stats_of(z, targets), stats_of(z[217:218], targets[217:218])
    assert all(torch.equal(a[217:218], b) for a, b in zip(whole[:6], one[:6], strict=True))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_a_row_has_the_same_bits_in_batches_of_any_size(size):
    """torch's sum over chunks has another order for the rows behind the last whole vector of the batch."""
    z, targets = 3 * torch.randn(11, 50257), random_targets(11, 50257)
    parts = [stats_of(*part) for part in zip(z.split(size), targets.split(size), strict=True)]
    for whole, *found in zip(stats_of(z, targets)[:6], *(part[:6] for part in parts), strict=True):
        assert torch.equal(whole, torch.cat(found))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_a_row_has_the_same_bits_for_any_number_of_threads(threads):
    """torch gives each thread a share of a tile; exp2 has other last bits behind the last whole vector of a share."""
    z, targets = torch.randn(37, 20003), random_targets(37, 20003)
    before, one = torch.get_num_threads(), stats_of(z[9:10], targets[9:10])
    try:
        torch.set_num_threads(threads)
        whole = stats_of(z, targets)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a[9:10], b) for a, b in zip(whole[:6], one[:6], strict=True))


def test_inputs_are_not_written_to_and_runs_repeat_bitwise():
    hidden, weight, bias = torch.randn(9, 32), torch.randn(2000, 32), torch.randn(2000)
    targets = random_targets(9, 2000)
    before = [x.clone() for x in (hidden, weight, bias, targets)]

    def run():
        head = {"bias": bias, "logit_scale": 0.5, "softcap": 5.0, "alpha": 0.7}
        stats = linear_stats_of(hidden, weight, targets, entropy=True, logit_mean=True, **head)
        upstream = [torch.linspace(-1, 1, 9)] * 4
        grads = linear_backward_of(hidden, weight, targets, stats, upstream, (True, True, True), **head)
        z = hidden @ weight.T
        kept = z.clone()
        stored = stats_of(z, targets, 0.7)
        stored_grad = backward_of(z, targets, stored, upstream, 0.7)
        assert torch.equal(z, kept)
        return [*stats[:6], *grads, *stored[:6], stored_grad]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, bias, targets), strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_requested_gradients_are_returned(needs):
    hidden, weight, bias = torch.randn(4, 8).to(BF16), torch.randn(50, 8).to(BF16), torch.randn(50).to(BF16)
    targets, zero = torch.arange(4), torch.zeros(4)
    stats = linear_stats_of(hidden, weight, targets, bias=bias)
    assert stats.entropy is None and stats.logit_mean is None
    gradients = linear_backward_of(hidden, weight, targets, stats, (zero + 1, zero, None, None), needs, bias=bias)
    assert [g is not None for g in gradients] == list(needs)


def test_bf16_gradients_by_separate_sweeps_equal_those_of_one_sweep(monkeypatch):
    """With more rows than a float32 accumulator holds, dhidden is computed in blocks and dweight in another sweep."""
    hidden, weight = torch.randn(50, 64).to(BF16), torch.randn(300, 64).to(BF16)
    targets, upstream = random_targets(50, 300), [torch.randn(50), torch.randn(50), None, None]

    def run():
        stats = linear_stats_of(hidden, weight, targets)
        return linear_backward_of(hidden, weight, targets, stats, upstream, (True, True, False))[:2]

    monkeypatch.setattr(chunked_tiles, "has_bf16_units", lambda: False)
    together = run()
    few = {"tile": 4096, "native_tile": 4096, "tall_tile": 4096, "rows": 16, "tall_rows": 16, "product": 64}
    small = replace(chunked_tiles.CPU_LIMITS, **few, copy=20 * 64, rows_per_sweep=32)
    monkeypatch.setattr(chunked_tiles, "CPU_LIMITS", small)
    for one, blocks in zip(together, run(), strict=True):
        torch.testing.assert_close(one, blocks, rtol=2**-7, atol=1e-4)


def test_no_rows():
    stats = stats_of(torch.randn(0, 100), torch.zeros(0, dtype=torch.long))
    assert all(field.shape == (0,) for field in stats[:6])
    stats = linear_stats_of(torch.randn(0, 8), torch.randn(100, 8), torch.zeros(0, dtype=torch.long))
    assert stats.lse.shape == (0,)


def test_rows_off_the_mask_are_zero_and_get_no_gradient():
    """Also if there are gaps between the sequences in memory, as in logits[:, :-1]."""
    padded, targets = torch.randn(2, 6, 9001), random_targets(10, 9001)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    upstream = RowGrads(*[torch.randn(10) for _ in FIELDS])
    for z in (padded[:, :-1], padded[:, :-1].contiguous()):
        want = {"alpha": 1.0, "entropy": True, "logit_mean": True}
        stats, _ = chunked.logits_forward(z, targets, mask=mask, **want)
        whole, _ = chunked.logits_forward(z, targets, mask=None, **want)
        for masked, plain in zip(stats[:6], whole[:6], strict=True):
            assert torch.equal(masked, torch.where(mask, plain, 0.0))
        gradient = chunked.logits_backward(z, targets, stats, upstream, mask=mask, alpha=1.0)
        plain = chunked.logits_backward(z, targets, whole, upstream, mask=None, alpha=1.0)
        assert torch.equal(gradient.flatten(0, 1), torch.where(mask[:, None], plain.flatten(0, 1), 0.0))
