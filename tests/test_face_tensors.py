"""Arguments of the functions on tensors: no targets, masks of 0 and 1, and wrong token ids."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import endoreward_fast as er
from endoreward_fast.signals import linear_token_stats, token_stats
from endoreward_fast.vocab.compiled import find_compiler
from tiny_models import MODELS, TOKENIZER

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(params=["reference", "chunked", "fused", "compiled", "auto"])
def impl(request, device):
    if request.param == "compiled" and (device.type != "cpu" or find_compiler() is None):
        pytest.skip("impl='compiled' is for the CPU, with a C++ compiler")
    return request.param


@pytest.fixture
def tensors(device):
    hidden, weight = torch.randn(2, 5, 16, device=device), torch.randn(300, 16, device=device)
    return hidden, weight, torch.randint(0, 300, (2, 5), device=device)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_statistics_without_targets_equal_those_of_targets_of_minus_100(impl, tensors):
    hidden, weight, tokens = tensors
    none, wanted = torch.full_like(tokens, -100), {"entropy": True, "logit_mean": True, "impl": impl}
    for mask in (None, tokens > 100):
        out = er.linear_vocab_stats(hidden, weight, mask=mask, softcap=5.0, **wanted)
        same(out, er.linear_vocab_stats(hidden, weight, none, mask=mask, softcap=5.0, **wanted))
        assert not out.target_logit.any()
        same(er.vocab_stats(hidden, mask=mask, **wanted), er.vocab_stats(hidden, none, mask=mask, **wanted))
    row = er.vocab_stats(hidden[0, 0], impl=impl)
    assert row.lse.shape == () and row.entropy is None
    torch.testing.assert_close(er.vocab_stats(hidden, impl=impl).lse, hidden.logsumexp(-1))
    assert er.vocab_stats(hidden[:, :0], impl=impl).lse.shape == (2, 0)


def test_statistics_without_targets_have_the_gradient_of_logsumexp(impl, tensors):
    hidden, weight, _ = (x.requires_grad_() if x.is_floating_point() else x for x in tensors)
    for ours, eager in (
        (er.vocab_stats(hidden, impl=impl).lse, hidden.logsumexp(-1)),
        (er.linear_vocab_stats(hidden, weight, impl=impl).lse, (hidden @ weight.T).logsumexp(-1)),
    ):
        found = torch.autograd.grad(ours.square().sum(), (hidden, weight), allow_unused=True)
        for a, b in zip(
            found, torch.autograd.grad(eager.square().sum(), (hidden, weight), allow_unused=True), strict=True
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_statistics_without_targets_compile_with_fullgraph(tensors):
    hidden, weight, tokens = tensors

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(hidden, weight, mask):
        return er.vocab_stats(hidden, mask=mask).lse, er.linear_vocab_stats(hidden, weight, mask=mask).lse

    mask = (tokens > 100).long()
    torch.testing.assert_close(both(hidden, weight, mask)[0], torch.where(mask == 1, hidden.logsumexp(-1), 0.0))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_masks_may_be_integers_0_and_1(dtype, tensors):
    hidden, weight, tokens = tensors
    mask, ends = tokens % 3 > 0, tokens % 2 > 0
    reward = hidden[..., 0]
    for call in (
        lambda m, e: er.vocab_stats(hidden, tokens % 16, mask=m),
        lambda m, e: er.linear_vocab_stats(hidden, weight, mask=m),
        lambda m, e: er.token_rewards(hidden, tokens % 16, mask=m, terminal=e),
        lambda m, e: er.token_rewards(hidden, tokens % 16, mask=m, terminal=e, impl="reference"),
        lambda m, e: er.linear_token_rewards(hidden, weight, tokens, mask=m, terminal=e),
        lambda m, e: token_stats(hidden, tokens % 16, mask=m, terminal=e)[:7],
        lambda m, e: linear_token_stats(hidden, weight, tokens, mask=m, terminal=e)[:7],
        lambda m, e: [er.sequence_score(reward, m, reduction="mean", gamma=0.9)],
        lambda m, e: [er.rewards_to_go(reward, m, gamma=0.9)],
        lambda m, e: [er.terminal_at(tokens, m, [3, 5])],
    ):  # fmt: skip
        same(call(mask.to(dtype), ends.to(dtype)), call(mask, ends))
        for bad, said in (
            (mask.to(dtype) * 2, "mask holds 2: expected bool, or integers 0 and 1"),
            (mask.float(), r"mask is \(2, 5\) torch.float32 on \w+: expected \(2, 5\) bool, or integers 0 and 1"),
            (mask.tolist(), "mask is a list: expected a tensor"),
        ):
            if isinstance(bad, list) or bad.device.type == "cpu":
                with pytest.raises(ValueError, match=said):
                    call(bad, ends)


@pytest.fixture(scope="module")
def model():
    return er.EndoRewardModel(MODELS["llama"](), TOKENIZER)


def test_the_model_takes_the_same_masks(model):
    ids = torch.randint(5, 90, (2, 6))
    on = torch.tensor([[1, 1, 1, 1, 1, 0]] * 2)
    with torch.no_grad():
        wanted = model(ids, on.bool(), on.bool(), terminal=on.bool())
        for dtype in INTEGERS:
            given = on.to(dtype)
            torch.testing.assert_close(model(ids, on, given, terminal=given), wanted)
    for name in ("attention_mask", "completion_mask", "terminal"):
        for bad, said in (
            (on * 2, "holds 2"),
            (on * -100, "holds -100"),
            (on.float(), "float32"),
            (on.tolist(), "is a list"),
        ):
            with pytest.raises(ValueError, match=f"^{name} {said}|^{name} is .*{said}.*integers 0 and 1"):
                model(ids, **{name: bad})


@pytest.mark.parametrize(
    "given, said",
    [
        ([[1, 2]], "input_ids is a list: expected token ids, a tensor"),
        ("text", r"is text: .*for text call score\(rows\)"),
        (["text"], "is text"), (BatchEncoding({"input_ids": [[1, 2]]}), r"is a BatchEncoding: .*model\(\*\*inputs\)"),
        ({"input_ids": [[1, 2]]}, "is a dict"), (np.array([[1, 2]]), "is a ndarray"), (None, "is a NoneType"),
        (torch.tensor([[1, 2]]).int(), r"\(1, 2\) torch.int32 .*expected token ids, \(B, T\) int64"),
        (torch.tensor([[1.0, 2.0]]), "float32 .*int64"), (torch.tensor([1, 2]), r"\(2,\) torch.int64 .*\(B, T\) int64"),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_wrong_input_ids_are_named(model, given, said):
    for call in (model, model.stats):
        with pytest.raises(ValueError, match=said) as error:
            call(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("odd", [-1, -100, 384, 10**9])
def test_ids_outside_the_vocabulary_are_named(model, odd):
    for call in (model, model.stats):
        with pytest.raises(IndexError, match=rf"^input_ids holds {odd}, which is outside .*\[0, 384\)$"):
            call(torch.tensor([[1, odd, 2]]))


def test_what_is_no_number_is_named(tensors):
    hidden, weight, tokens = tensors
    reward, on = hidden[..., 0], tokens > 100
    for name, odd, call in (
        ("alpha", "1", lambda x: er.vocab_stats(hidden, alpha=x)),
        ("alpha", None, lambda x: er.token_rewards(hidden, tokens % 16, alpha=x)),
        ("softcap", "30", lambda x: er.linear_vocab_stats(hidden, weight, softcap=x)),
        ("logit_scale", [1], lambda x: er.linear_token_rewards(hidden, weight, tokens, logit_scale=x)),
        ("gamma", "0.9", lambda x: er.sequence_score(reward, on, gamma=x)),
        ("gamma", [0.9], lambda x: er.rewards_to_go(reward, on, gamma=x)),
        ("floor", "0", lambda x: er.sequence_score(reward, on, floor=x)),
        ("eos_token_id", "</s>", lambda x: er.terminal_at(tokens, on, x)),
        ("eos_token_id", ["</s>"], lambda x: er.terminal_at(tokens, on, x)),
        ("eos_token_id", None, lambda x: er.terminal_at(tokens, on, x)),
        ("eos_token_id", 2.5, lambda x: er.terminal_at(tokens, on, x)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name} is .*: expected ") as error:
            call(odd)
        assert "\n" not in str(error.value)
    assert er.vocab_stats(hidden, alpha=np.float32(2)).lse.isfinite().all()
    same([er.terminal_at(tokens, on, {3, 5})], [er.terminal_at(tokens, on, torch.tensor([3, 5]))])


@pytest.mark.parametrize(
    "given", [np.zeros((2, 5), bool), [[0] * 5] * 2, ((0,) * 5,) * 2], ids=lambda x: type(x).__name__
)
def test_what_makes_a_tensor_is_said(tensors, model, given):
    hidden, _, tokens = tensors
    for call in (
        lambda: er.vocab_stats(hidden, mask=given), lambda: er.token_rewards(hidden, tokens % 16, mask=given),
        lambda: er.rewards_to_go(hidden[..., 0], given), lambda: er.terminal_at(tokens, given, 3),
        lambda: model(torch.ones(2, 5, dtype=torch.long), completion_mask=given),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"mask is a \w+: expected a tensor; torch.as_tensor\(\w*mask\) makes one$"
        ):
            call()


def test_position_ids_and_empty_batches_are_named(model):
    ids = torch.randint(5, 90, (2, 6))
    for odd, said in (([[0, 1]], "is a list"), (torch.zeros(2, 6), "float32"), (torch.zeros(3, 6).long(), "expected")):
        with pytest.raises(ValueError, match=f"^position_ids.*{said}"):
            model(ids, position_ids=odd)
    for shape in ((0, 3), (2, 0)):
        with pytest.raises(ValueError, match=r"^input_ids is \(\d, \d\) .*at least one"):
            model(torch.zeros(shape, dtype=torch.long))


NOTHING = {
    "logits": lambda x, t: er.vocab_stats(None, t),
    "hidden": lambda x, t: er.linear_vocab_stats(None, x[0], t),
    "weight": lambda x, t: er.linear_token_rewards(x, None, t),
    "tokens": lambda x, t: er.token_rewards(x, None),
    "reward": lambda x, t: er.sequence_score(None, t > 0),
    "mask": lambda x, t: er.rewards_to_go(x[..., 0], None),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_tensor_that_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} is None: expected a tensor$"):
        NOTHING[name](torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64))
