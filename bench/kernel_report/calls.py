"""The public calls whose launches are reported."""

from collections.abc import Iterable
from dataclasses import dataclass
from unittest import mock

import torch

import endoreward_fast as er

from .archs import ARCHS, DTYPES
from .stand_in import Launch, on_device, recorded

VOCAB, DIM, BATCH, TOKENS = 151936, 256, 2, 8
# A width of 70, or rows of an odd number of logits, leave no pitch a multiple of 16 bytes.
ODD_VOCAB, ODD_DIM = 50257, 70
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWWISE = ("combine", "sum")
NAMES = {"logits_partials_kernel": "logits_forward", "linear_partials_kernel": "linear"}


@dataclass(frozen=True)
class Call:
    """A call of a public function. `full` asks for entropy and mean; a linear head then has bias and softcap.

    The divergence is KL, and JSD if full.
    """

    source: str  # logits, linear, chunked: a linear head through a workspace, or divergence: of two stored logits
    arch: str
    dtype: str
    full: bool
    aligned: bool = True


def calls(archs: Iterable[str] = ARCHS) -> list[Call]:
    out = []
    for arch in archs:
        for full in (False, True):
            for dtype in DTYPES:
                out.append(Call("logits", arch, dtype, full))
                out += [Call("linear", arch, dtype, full, aligned) for aligned in (True, False)]
        out += [Call("chunked", arch, dtype, True) for dtype in ("bf16", "fp32")]
        out += [Call("divergence", arch, dtype, full) for dtype in ("bf16", "fp32") for full in (False, True)]
        out.append(Call("divergence", arch, "bf16", True, aligned=False))
        out.append(Call("logits", arch, "bf16", False, aligned=False))
    return out


@dataclass(frozen=True)
class Planned:
    """A launch to compile, and the first call that makes it."""

    call: Call
    launch: Launch
    auto: bool  # whether the same call with impl="auto" makes it

    @property
    def kernel(self) -> str:
        return NAMES.get(self.launch.function, self.launch.function.removesuffix("_kernel"))


def plan(calls: list[Call]) -> list[Planned]:
    """Return each distinct launch of the calls."""
    out: list[Planned] = []
    for call in calls:
        # No kernel writes what torch reads later. Zeros are valid indices.
        with on_device(call.arch), mock.patch.object(torch, "empty", torch.zeros):
            with recorded() as found:
                _run(call, "chunked" if call.source == "chunked" else "fused")
            with recorded() as chosen:
                _run(call, "auto")
        for launch in found:
            planned = Planned(call, launch, launch in chosen)
            known = any(p.call.arch == call.arch and p.launch == launch for p in out)
            if not known and (call.aligned or not planned.kernel.endswith(ROWWISE)):  # these read no pitch
                out.append(planned)
    return out


def _run(call: Call, impl: str) -> None:
    vocab, dim = (VOCAB, DIM) if call.aligned else (ODD_VOCAB, ODD_DIM)
    dtype, rows = TORCH[call.dtype], (BATCH, TOKENS)
    tokens, mask = torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)
    extras = {"entropy": True, "logit_mean": True} if call.full else {}
    if call.source == "divergence":
        pair = (torch.empty(*rows, vocab, dtype=dtype, requires_grad=True) for _ in range(2))
        er.vocab_divergence(*pair, kind="jsd" if call.full else "reverse-kl", mask=mask, impl=impl).sum().backward()
        return
    if call.source == "logits":
        args = (torch.empty(*rows, vocab, dtype=dtype, requires_grad=True),)
        fn = er.vocab_stats if call.full else er.token_rewards
    else:
        args = (
            torch.empty(*rows, dim, dtype=dtype, requires_grad=True),
            torch.empty(vocab, dim, dtype=dtype, requires_grad=True),
        )
        if call.full:
            extras |= {"bias": torch.empty(vocab, dtype=dtype), "softcap": 30.0}
        fn = er.linear_vocab_stats if call.full else er.linear_token_rewards
    out = fn(*args, tokens, mask=mask, impl=impl, **extras)
    if call.source != "linear":  # its backward is the workspace's
        sum(field.sum() for field in out if field is not None).backward()
