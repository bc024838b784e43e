"""Identities that hold for any numbers: those of the theory, and those of batching, masking and packing.

Hypothesis draws the inputs, as in test_properties.py. test_mutations.py lists the broken copies on which these fail.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import endoreward_fast as er
from endoreward_fast.vocab import reference
from endoreward_fast.vocab.compiled import find_compiler
from property_cases import ALPHAS, DEVICE, F64, VOCABS, drawn

pytestmark = pytest.mark.device  # drawn on the device by property_cases.py

EPS32 = torch.finfo(torch.float32).eps
COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or find_compiler() is None,
        reason="impl='compiled' needs CPU tensors and a C++ compiler",
    ),
)
FAST = ("fused", "chunked", COMPILED)
ON = pytest.mark.parametrize("impl", FAST)
PATHS = pytest.mark.parametrize("path", ["logits", "linear"])
# name: keyword arguments of the head
HEADS = st.sampled_from([{}, {"bias": True}, {"logit_scale": 0.5, "softcap": 4.0, "bias": True}])


class Batch:
    """Finite fp32 inputs. With `grid`, small multiples of 1/4, so that float32 holds sums and products exactly."""

    def __init__(self, data, grid=False, min_t=2):
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
        self.b, self.t = data.draw(st.integers(1, 3)), data.draw(st.integers(min_t, 7))
        self.v, self.d = data.draw(VOCABS), data.draw(st.integers(1, 24))
        self.alpha = data.draw(ALPHAS)
        head = {} if grid else dict(data.draw(HEADS))
        self.hidden, self.weight = self.normal(self.b, self.t, self.d), self.normal(self.v, self.d) * 2 * self.d**-0.5
        if grid:
            self.hidden, self.weight = self.hidden.round(), (self.weight * 4).round() / 4
        self.bias = self.normal(self.v) if head.pop("bias", False) else None
        self.head = head
        self.tokens = self.integers(self.v, self.b, self.t)

    def normal(self, *size):
        return torch.randn(*size, generator=self.generator).to(DEVICE)

    def integers(self, high, *size):
        return torch.randint(0, high, size, generator=self.generator).to(DEVICE)

    def flags(self, *size, share=0.5):
        return (torch.rand(*size, generator=self.generator) < share).to(DEVICE)

    def logits(self):
        return reference.final_logits(self.hidden, self.weight, bias=self.bias, **self.head)

    def rewards(self, path, impl, *, hidden=None, weight=None, bias=None, tokens=None, **want):
        """Return the rewards of this batch, or of a variant of it, by either path. Both paths have the same logits."""
        hidden, tokens = self.hidden if hidden is None else hidden, self.tokens if tokens is None else tokens
        weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
        want = {"alpha": self.alpha, "entropy": True, "impl": impl, **want}
        if path == "linear":
            return er.linear_token_rewards(hidden, weight, tokens, bias=bias, **self.head, **want)
        rows = reference.final_logits(hidden, weight, bias=bias, dtype=F64, **self.head)
        return er.token_rewards(rows.float(), tokens, **want)


def assert_equal(a, b, where=None):
    """Assert bitwise equality, on the tokens `where` if given."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y) if where is None else torch.equal(x[where], y[where]), name


def assert_close(a, b, scale):
    torch.testing.assert_close(a, b, rtol=0, atol=32 * EPS32 * scale)


@ON
@PATHS
def test_rewards_up_to_a_terminal_token_sum_to_the_logprobs_and_the_first_value(impl, path):
    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        first = data.draw(st.integers(1, batch.t - 1))
        mask = torch.zeros_like(batch.tokens, dtype=torch.bool)
        mask[:, first:] = True
        out = batch.rewards(path, impl, mask=mask)
        expected = batch.alpha * out.logprob.double().sum(1) + out.value[:, first]
        scale = batch.t * (1 + batch.logits().abs().max().item())
        assert_close(out.reward.double().sum(1), expected, scale)

    check()


@ON
@PATHS
def test_a_constant_added_to_a_states_logits_changes_only_its_value(impl, path):
    """The constants are exactly representable, so the budget does not grow. The linear path has one for all states."""

    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data, grid=True)
        constant = data.draw(st.sampled_from([-(2.0**14), 3.0, 2.0**15]))
        plain = batch.rewards(path, impl)
        if path == "linear":
            moved = batch.rewards(path, impl, bias=torch.full((batch.v,), constant, device=DEVICE))
            value_change = torch.full_like(plain.value, constant)
        else:
            per_state = batch.integers(9, batch.b, batch.t, 1) + constant
            moved = er.token_rewards(
                batch.logits() + per_state, batch.tokens, alpha=batch.alpha, entropy=True, impl=impl
            )
            value_change = torch.cat([per_state[:, :1, 0], per_state[:, :-1, 0]], 1)
        assert_close(moved.logprob, plain.logprob, 10 / batch.alpha)
        assert_close(moved.entropy, plain.entropy, 10 / batch.alpha)
        assert_close((moved.value - plain.value)[:, 1:], value_change[:, 1:], 2 * abs(constant) + 10)

    check()


@ON
@PATHS
def test_the_order_of_the_vocabulary_does_not_matter(impl, path):
    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        order = torch.randperm(batch.v, generator=batch.generator).to(DEVICE)
        tokens = order.argsort()[batch.tokens]
        bias = None if batch.bias is None else batch.bias[order]
        ours = batch.rewards(path, impl, weight=batch.weight[order], bias=bias, tokens=tokens)
        scale = (1 + batch.logits().abs().max().item()) / min(1.0, batch.alpha)
        for a, b in zip(ours, batch.rewards(path, impl), strict=True):
            assert_close(a, b, scale)

    check()


@ON
@PATHS
def test_twice_the_logits_at_twice_the_temperature_is_the_same_policy(impl, path):
    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        once = batch.rewards(path, impl)
        scale, cap = batch.head.get("logit_scale", 1.0), batch.head.get("softcap")
        batch.head = {"logit_scale": 2 * scale, "softcap": cap and 2 * cap}
        twice = batch.rewards(path, impl, alpha=2 * batch.alpha)
        # Powers of two round nothing, but at alpha = 1 the chunked path has a shortcut that sums in another order.
        size = 0.0 if impl == "fused" else (1 + batch.logits().abs().max().item()) / min(1.0, batch.alpha)
        for name, factor in {"logprob": 1, "entropy": 1, "value": 2, "reward": 2}.items():
            assert_close(getattr(twice, name), factor * getattr(once, name), size)

    check()


BITWISE = pytest.mark.parametrize(("impl", "path"), [("fused", "logits"), ("fused", "linear"), ("chunked", "logits")])


@BITWISE
def test_a_concatenated_batch_equals_its_parts_bitwise(impl, path):
    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        cut = data.draw(st.integers(0, batch.b))
        whole = batch.rewards(path, impl)
        for part in (slice(None, cut), slice(cut, None)):
            assert_equal(
                batch.rewards(path, impl, hidden=batch.hidden[part], tokens=batch.tokens[part]),
                type(whole)(*(field[part] for field in whole)),
            )

    check()


@BITWISE
def test_packed_sequences_equal_separate_sequences_bitwise(impl, path):
    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        total = batch.b * batch.t
        cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=3)))
        offsets = torch.tensor([0, *cuts, total], device=DEVICE)
        hidden, tokens = batch.hidden.view(1, total, -1), batch.tokens.view(1, total)
        terminal = batch.flags(1, total, share=0.2) if data.draw(st.booleans()) else None
        packed = batch.rewards(path, impl, hidden=hidden, tokens=tokens, cu_seqlens=offsets, terminal=terminal)
        for start, end in itertools.pairwise(offsets.tolist()):
            span = slice(start, end)
            alone = batch.rewards(
                path, impl, hidden=hidden[:, span], tokens=tokens[:, span],
                terminal=None if terminal is None else terminal[:, span],
            )  # fmt: skip
            assert_equal(alone, type(packed)(*(field[:, span] for field in packed)))

    check()


@BITWISE
def test_masking_tokens_out_does_not_change_the_others(impl, path):
    @drawn(10)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        terminal, mask = batch.flags(batch.b, batch.t, share=0.3), batch.flags(batch.b, batch.t, share=0.7)
        fewer = mask & batch.flags(batch.b, batch.t, share=data.draw(st.sampled_from([0.0, 0.3, 0.8])))
        many, few = (batch.rewards(path, impl, mask=m, terminal=terminal) for m in (mask, fewer))
        assert_equal(many, few, fewer)
        assert all(field[~fewer].eq(0).all() for field in few)

    check()


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@PATHS
def test_gradients_match_finite_differences(impl, path):
    """In a random direction, against central differences of the fp64 oracle, which need no autograd."""

    @drawn(8)
    @given(st.data())
    def check(data):
        batch = Batch(data)
        want = {"alpha": batch.alpha, "entropy": True, "mask": batch.flags(batch.b, batch.t, share=0.8)}
        names = ["logits"] if path == "logits" else ["hidden", "weight"] + ["bias"] * (batch.bias is not None)
        leaves = [batch.logits().detach() if path == "logits" else getattr(batch, name) for name in names]
        upstream = [batch.normal(batch.b, batch.t) for _ in range(4)]
        direction = [batch.normal(*x.shape) * 0.5 for x in leaves]

        def loss(module, leaves, **kwargs):
            if path == "logits":
                out = module.token_rewards(*leaves, batch.tokens, **want, **kwargs)
            else:
                bias = leaves[2] if len(leaves) > 2 else None
                head = {**batch.head, **want, "bias": bias, **kwargs}
                out = module.linear_token_rewards(*leaves[:2], batch.tokens, **head)
            return sum((g.to(field.dtype) * field).sum() for g, field in zip(upstream, out, strict=True))

        ours = [x.clone().requires_grad_() for x in leaves]
        gradients = torch.autograd.grad(loss(er, ours, impl=impl), ours)
        slope = sum((g.double() * e.double()).sum() for g, e in zip(gradients, direction, strict=True))
        step = 1e-5
        up, down = (
            loss(reference, [x.double() + s * e.double() for x, e in zip(leaves, direction, strict=True)], dtype=F64)
            for s in (step, -step)
        )
        size = sum((g.double() * e.double()).abs().sum() for g, e in zip(gradients, direction, strict=True)).item()
        torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-5, atol=1e-5 * (1 + size))

    check()
