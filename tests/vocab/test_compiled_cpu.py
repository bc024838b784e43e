"""impl="compiled", beyond the tests of every impl: when it compiles, its reproducibility, its conversions."""

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.functional import choose_impl
from endoreward_fast.vocab import compiled, reference

needs_compiler = pytest.mark.skipif(compiled.find_compiler() is None, reason="impl='compiled' needs a C++ compiler")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """Unload the library and use an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path / "endoreward_fast"
    compiled.library.cache_clear()


def some_call(impl):
    logits, targets = torch.randn(2, 40), torch.tensor([3, -100])
    return er.vocab_stats(logits, targets, impl=impl)


def test_without_a_compiler_it_raises_and_auto_still_works(fresh_library, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"impl='compiled' needs a C\+\+ compiler"):
        some_call("compiled")
    assert some_call("auto").lse.isfinite().all()


@needs_compiler
def test_a_compiler_that_fails_is_quoted(fresh_library, monkeypatch):
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-no-such-flag"))
    with pytest.raises(ValueError, match="no-such-flag"):
        some_call("compiled")
    assert list(fresh_library.iterdir()) == []


@needs_compiler
def test_it_is_built_once_and_only_when_asked_for(fresh_library, monkeypatch):
    some_call("auto")
    assert not fresh_library.exists()
    assert choose_impl("auto", torch.device("cpu"), torch.float32) == "chunked"
    some_call("compiled")
    (built,) = fresh_library.iterdir()
    compiled.library.cache_clear()  # as in a new process
    monkeypatch.setattr(compiled, "build", lambda *_: pytest.fail("built again"))
    for rows in range(1, 21):
        for dtype in DTYPES:
            logits = torch.randn(rows, 30 + rows, dtype=torch.float32).to(dtype)
            er.vocab_stats(logits, torch.zeros(rows, dtype=torch.long), impl="compiled")
    assert list(fresh_library.iterdir()) == [built]


@needs_compiler
def test_it_builds_without_a_writable_cache_folder(fresh_library):
    fresh_library.write_text("a file where the folder should be")
    assert some_call("compiled").lse.isfinite().all()


def test_it_refuses_other_devices():
    with pytest.raises(ValueError, match=r"impl='compiled' cannot run here: .* it runs on the CPU only"):
        choose_impl("compiled", torch.device("cuda"), torch.float32)


@needs_compiler
@pytest.mark.parametrize("vocab", [70, 5000, 50257])
def test_a_row_has_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(vocab):
    logits, targets = torch.randn(300, vocab) * 3, torch.randint(0, vocab, (300,))
    upstream = torch.randn(300)

    def run(rows):
        z = logits[rows].requires_grad_()
        out = er.vocab_stats(z, targets[rows], alpha=0.7, entropy=True, logit_mean=True, impl="compiled")
        (gradient,) = torch.autograd.grad(((out.lse + out.entropy) * upstream[rows]).sum(), z)
        return *out[:4], gradient

    everything, threads = run(slice(None)), torch.get_num_threads()
    for rows in [slice(i, i + 1) for i in (0, 17, 299)] + [slice(3, 3 + n) for n in (2, 15, 16, 17, 255, 257)]:
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), everything, strict=True))
    try:
        torch.set_num_threads(threads % 3 + 1)
        assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), everything, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_low_precision_number_is_read_as_torch_reads_it(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(1)
    read = er.vocab_stats(every, torch.zeros(65536, dtype=torch.long), impl="compiled").target_logit
    assert torch.equal(read.nan_to_num(7, posinf=1e39, neginf=-1e39), every[:, 0].float().nan_to_num(7, 1e39, -1e39))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_are_rounded_as_torch_rounds_them(dtype):
    """In a column with probability 0, the gradient is the upstream gradient of the target's logit, rounded once."""
    exponents = torch.arange(-30, 18).double()
    values = (2**exponents).unsqueeze(1) * torch.tensor(
        [1.0, 1.5, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-12]
    )
    values = torch.cat(
        [values.flatten(), -values.flatten(), torch.tensor([0.0, 65519.9, 65520.0, torch.inf, torch.nan])]
    )
    values = values.float()
    logits = torch.tensor([0.0, -300.0]).repeat(len(values), 1).to(dtype).requires_grad_()
    picked = er.vocab_stats(logits, torch.ones(len(values), dtype=torch.long), impl="compiled").target_logit
    (gradient,) = torch.autograd.grad(picked, logits, values)
    got, expected = gradient[:, 1], values.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7, 1e39, -1e39), expected.nan_to_num(7, 1e39, -1e39))


@needs_compiler
def test_the_exponential_is_accurate_over_its_range():
    """With one logit at 0 and one at x, the gradient matches float64 to a few units in the last place."""
    x = -torch.linspace(0, 100, 20001)
    logits = torch.stack([torch.zeros_like(x), x], 1)
    z = logits.clone().requires_grad_()
    out = er.vocab_stats(z, torch.zeros(len(x), dtype=torch.long), impl="compiled")
    (gradient,) = torch.autograd.grad(out.lse.sum(), z)
    oracle = torch.softmax(logits.double(), -1)
    relative = (gradient[:, 1] / oracle[:, 1] - 1).abs()[x > -87]
    assert relative.max() < 4e-7
    assert gradient[x < -88.5, 1].eq(0).all()


@needs_compiler
@pytest.mark.parametrize("alpha", [1e-3, 1e3])
@pytest.mark.parametrize("rows", [2, 300])
def test_strides_masks_and_temperatures_against_the_reference(alpha, rows, assert_within_budget):
    logits = torch.randn(3, rows + 2, 2 * 70)[:, 1:-1, ::2]
    targets, mask = torch.randint(0, 70, (3, rows)), torch.rand(3, rows) > 0.5
    want = {"mask": mask, "alpha": alpha, "entropy": True, "logit_mean": True}
    ours = er.vocab_stats(logits, targets, impl="compiled", **want)
    eager = er.vocab_stats(logits, targets, impl="reference", **want)
    oracle = reference.vocab_stats(logits, targets, dtype=torch.float64, **want)
    for name in ours._fields[:4]:
        fields = (getattr(out, name) for out in (ours, eager, oracle))
        assert_within_budget(*fields, scale=10 / alpha if name == "lse" else 10.0, name=name)
