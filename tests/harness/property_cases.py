"""What test_properties.py and test_identities.py draw: tensors in every memory layout, heads, masks, packings, rows of
-inf; and the definitions of the design, written once more, one token at a time, in Python floats.
"""

import itertools
import math
from typing import NamedTuple
from unittest import mock

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from endoreward_fast.vocab import chunked_tiles, reference

F64 = torch.float64
EPS32 = torch.finfo(torch.float32).eps
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {
    # name: (shape of the storage, the view of it that has shape (b, t, v)); what lies between the elements is NaN
    "contiguous": (lambda b, t, v: (b, t, v), lambda x, b, t, v: x),
    "transposed": (lambda b, t, v: (b, v, t), lambda x, b, t, v: x.transpose(1, 2)),
    "batch inside time": (lambda b, t, v: (t, b, v), lambda x, b, t, v: x.transpose(0, 1)),
    "every other": (lambda b, t, v: (b, t, 2 * v), lambda x, b, t, v: x[..., ::2]),
    "padded pitch": (lambda b, t, v: (b, t, v + 3), lambda x, b, t, v: x[..., :v]),
    "slice of time": (lambda b, t, v: (b, t + 2, v), lambda x, b, t, v: x[:, 1 : t + 1]),
    "unaligned": (lambda b, t, v: (b * t * v + 1,), lambda x, b, t, v: x[1:].view(b, t, v)),
    "expanded batch": (lambda b, t, v: (1, t, v), lambda x, b, t, v: x.expand(b, t, v)),
    "expanded time": (lambda b, t, v: (b, 1, v), lambda x, b, t, v: x.expand(b, t, v)),
    "expanded vocabulary": (lambda b, t, v: (b, t, 1), lambda x, b, t, v: x.expand(b, t, v)),
}


def drawn(examples):
    """As many examples as the profile says, or `examples` under the fixed one, which `make test` takes."""
    fixed = settings().derandomize
    count = examples if fixed else settings().max_examples
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def laid_out(x, layout):
    """x (B, T, V) in a layout of memory. An expanded one keeps only the first of what it repeats."""
    shape_of, view_of = LAYOUTS[layout]
    storage = x.new_full(shape_of(*x.shape), torch.nan)
    view = view_of(storage, *x.shape)
    if layout.startswith("expanded"):
        storage.copy_(x[tuple(slice(n) for n in storage.shape)])
    else:
        view.copy_(x)
    return view


WHERE = ("tokens", "mask", "terminal", "cu_seqlens")


class Case(NamedTuple):
    """One draw. Linear: hidden, weight and bias; else logits. `want` holds mask, terminal, cu_seqlens and alpha."""

    tensors: dict
    head: dict
    tokens: torch.Tensor
    mask: torch.Tensor | None
    terminal: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    alpha: float
    upstream: list
    scale: float
    """the largest finite |z|, a common offset included"""
    spread: float
    """the largest difference of finite logits, / alpha: what entropies and log-probabilities are made of"""

    def __repr__(self) -> str:
        inputs = [f"{k} {tuple(x.shape)} {x.dtype} strides {x.stride()}" for k, x in self.tensors.items()]
        lists = [f"{k} {None if x is None else x.tolist()}" for k, x in self._asdict().items() if k in WHERE]
        return ", ".join([*inputs, *lists, f"{self.head}, alpha {self.alpha}, scale {self.scale:.3g}"])

    @property
    def rewards_want(self) -> dict:
        names = ("mask", "terminal", "cu_seqlens", "alpha")
        return {name: getattr(self, name) for name in names} | {"entropy": True}

    @property
    def stats_want(self) -> dict:
        return {"mask": self.mask, "alpha": self.alpha, "entropy": True, "logit_mean": True}

    def leaves(self, dtype=None) -> dict:
        """The floating-point inputs: as they lie in memory, or dense in another dtype."""
        return self.tensors if dtype is None else {k: x.to(dtype).contiguous() for k, x in self.tensors.items()}


ALPHAS = st.sampled_from([1.0, 1.0, 0.1, 0.75, 2.5, 20.0])
VOCABS = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 128, 129]), st.integers(1, 150))
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def rows(draw, generator):
    """(B, T), V, tokens, mask, terminal, cu_seqlens: everything but the numbers."""
    b, t, v = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(VOCABS)

    def random(*size):
        return torch.rand(*size, generator=generator)

    tokens = (random(b, t) * v).long()
    if draw(st.booleans()):
        tokens[random(b, t) < 0.2] = -100
    share = draw(st.sampled_from([None, None, 0.0, 0.5, 1.0]))
    mask = None if share is None else random(b, t) < share
    terminal = random(b, t) < 0.3 if draw(st.booleans()) else None
    cuts = draw(st.none() | st.lists(st.integers(0, b * t), max_size=4))
    offsets = None if cuts is None else torch.tensor([0, *sorted(cuts), b * t])
    on_device = (None if x is None else x.to(DEVICE) for x in (tokens, mask, terminal, offsets))
    return (b, t, v), *on_device


def _upstream(generator, shape):
    return [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(4)]


@st.composite
def logit_cases(draw, dtypes=FLOATS):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape, *where = draw(rows(generator))
    dtype = draw(st.sampled_from(dtypes))
    offsets = [0.0, 0.0, -2e4, 1e4] if dtype == torch.float16 else [0.0, 0.0, -2e4, 1e4, 1e6]
    z = torch.randn(shape, generator=generator, dtype=F64) * draw(st.sampled_from([0.01, 1.0, 3.0, 40.0]))
    z += draw(st.sampled_from(offsets))
    ruled_out = draw(st.sampled_from(["none", "none", "some", "a block", "rows", "all but one"]))
    if ruled_out == "some":
        z[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
    elif ruled_out == "a block":
        z[..., : shape[2] // 2] = -torch.inf
    elif ruled_out == "rows":
        z[torch.rand(shape[:2], generator=generator) < 0.3] = -torch.inf
    elif ruled_out == "all but one":
        z[..., 1:] = -torch.inf
    logits = laid_out(z.to(DEVICE, dtype), draw(st.sampled_from(list(LAYOUTS))))
    finite = logits.double()[logits.isfinite()]
    alpha = draw(ALPHAS)
    scale, spread = (finite.abs().max().item(), (finite.max() - finite.min()).item()) if finite.numel() else (1.0, 1.0)
    upstream = _upstream(generator, shape[:2])
    return Case({"logits": logits}, {}, *where, alpha, upstream, max(scale, 1.0), spread / alpha)


@st.composite
def linear_cases(draw, dtypes=FLOATS):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    (b, t, v), *where = draw(rows(generator))
    dtype = draw(st.sampled_from(dtypes))
    d = draw(st.one_of(st.sampled_from([70, 123]), st.integers(1, 40)))

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def draw_layout(x):
        x = x.to(DEVICE, dtype)
        return laid_out(x.view(-1, *x.shape[-2:]), draw(st.sampled_from(list(LAYOUTS)))).view(x.shape)

    tensors = {"hidden": normal(b, t, d) * d**-0.5, "weight": normal(1, v, d) * draw(st.sampled_from([0.1, 1.0, 5.0]))}
    tensors = {name: draw_layout(x) for name, x in tensors.items()}
    tensors["weight"] = tensors["weight"][0]
    if draw(st.booleans()):
        tensors["bias"] = draw_layout(normal(1, 1, v) * 2)[0, 0]
        if draw(st.booleans()):
            tensors["bias"] = tensors["bias"].float()
    head = {
        "logit_scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "softcap": draw(st.sampled_from([None, None, 1.0, 30.0])),
    }
    alpha = draw(ALPHAS)
    parts = {k: x.double() for k, x in tensors.items()}
    summed = parts["hidden"].abs() @ parts["weight"].abs().T + parts.get("bias", torch.zeros(1, device=DEVICE)).abs()
    scale = max(1.0, abs(head["logit_scale"]) * summed.max().item())
    return Case(tensors, head, *where, alpha, _upstream(generator, (b, t)), scale, 2 * scale / alpha)


def call(module, case, kind, leaves=None, **extra):
    """Compute `kind` ("stats" or "rewards") of a case from `leaves`. Default: the case's own inputs."""
    leaves = case.tensors if leaves is None else leaves
    name = {"stats": "vocab_stats", "rewards": "token_rewards"}[kind]
    want = case.stats_want if kind == "stats" else case.rewards_want
    if "logits" in leaves:
        return getattr(module, name)(leaves["logits"], case.tokens, **want, **extra)
    head = {"bias": leaves.get("bias"), **case.head}
    return getattr(module, f"linear_{name}")(leaves["hidden"], leaves["weight"], case.tokens, **head, **want, **extra)


def exact_logits():
    """Upcast bfloat16 on any CPU. With native units the chunked path, and with it every backward, rounds its logits.

    test_chunked.py tests that case.
    """
    return mock.patch.object(chunked_tiles, "uses_native_matmul", lambda hidden, weight: False)


def scale_of(case, field):
    """Return the magnitude of a field's summands. Entropy and logprob contain no common offset of the logits."""
    if field in ("entropy", "logprob"):
        return max(1.0, case.spread)
    return max(1.0, case.scale, case.scale / case.alpha)


# ------------------------------------------------------------------------------- section 2 of the design, by hand


def logits_by_definition(hidden, weight, bias, logit_scale, softcap) -> list[list[float]]:
    """z[row][a] = softcap tanh(logit_scale (hidden . weight_a + bias_a) / softcap), from nested lists."""

    def head(h, a):
        z = logit_scale * (math.fsum(x * y for x, y in zip(h, weight[a], strict=True)) + (bias[a] if bias else 0.0))
        return z if softcap is None else softcap * math.tanh(z / softcap)

    return [[head(h, a) for a in range(len(weight))] for h in hidden]


def stats_by_definition(z: list[float], target: int, alpha: float) -> tuple[float, float, float, float]:
    """(lse, target_logit, entropy, logit_mean) of one state."""
    q = 0.0 if target == -100 else z[target]
    mean = -math.inf if -math.inf in z else math.fsum(z) / len(z)
    top = max(z)
    if top == -math.inf:
        return -math.inf, q, 0.0, mean
    lse = top / alpha + math.log(math.fsum(math.exp((x - top) / alpha) for x in z))
    logp = [x / alpha - lse for x in z if x != -math.inf]
    return lse, q, -math.fsum(math.exp(x) * x for x in logp), mean


def rewards_by_definition(z, tokens, mask, terminal, cu_seqlens, alpha) -> list[tuple[float, float, float, float]]:
    """(reward, logprob, value, entropy) of each token, all sequences one after the other.

    z[i] is the state after token i, flat; z, tokens, mask and terminal are lists over B T tokens, (B, T) comes as the
    offsets cu_seqlens. A token that is not scored, or is -100, has zeros. alpha is a number, or a list over tokens.
    """
    alphas = alpha if isinstance(alpha, list) else [alpha] * len(tokens)
    out = [(0.0, 0.0, 0.0, 0.0)] * len(tokens)
    for first, end in itertools.pairwise(cu_seqlens):
        for i in range(first + 1, end):  # the first token was chosen in no state
            if not mask[i] or tokens[i] == -100:
                continue
            alpha = alphas[i]
            lse, q, entropy, _ = stats_by_definition(z[i - 1], tokens[i], alpha)
            last = i + 1 == end or not mask[i + 1] or tokens[i + 1] == -100
            ends = last if terminal is None else terminal[i]
            alpha_after = alpha if last else alphas[i + 1]  # that of the token chosen in the state after this one
            lse_after = stats_by_definition(z[i], -100, alpha_after)[0]
            value_after = 0.0 if ends or lse_after == -math.inf else alpha_after * lse_after
            dead = lse == -math.inf
            reward, logprob = (-math.inf, -math.inf) if dead else (q - value_after, q / alpha - lse)
            out[i] = reward, logprob, alpha * lse, entropy
    return out


def offsets_of(case: Case) -> list[int]:
    """Where sequences begin, in a packed batch or a plain one: a row of (B, T) begins one too."""
    b, t = case.tokens.shape
    packed = [] if case.cu_seqlens is None else case.cu_seqlens.tolist()
    return sorted({*range(0, b * t + 1, t), *packed})


def flat(x, default, count):
    return [default] * count if x is None else x.flatten().tolist()


def final_logits(case: Case, dtype=F64):
    """z (B, T, V) of a case, by the reference."""
    if "logits" in case.tensors:
        return case.tensors["logits"].to(dtype)
    leaves = case.leaves(dtype)
    return reference.final_logits(leaves["hidden"], leaves["weight"], bias=leaves.get("bias"), dtype=dtype, **case.head)
