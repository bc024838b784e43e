"""What a public call costs before the GPU works: launches, reads back to the host, and host time.

The calls run on a stand-in for an H100. Kernels of torch are counted by a dispatch mode: each operator that is no view
and no allocation counts as one launch, although some (nonzero, cumsum) make more. Launches of Triton are counted by its
cache hook.

Host time is processor time with Triton's launches stubbed: checks, Python, torch's operators on a few numbers, and the
preparation of each launch. Triton's own binder and the driver are not in it. torch.add of 16 numbers, measured between
the calls, is the yardstick.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import endoreward_fast as er

from .calls import DIM, VOCAB
from .stand_in import on_device, recorded

ARCH = "sm_90"
ROWS = (2, 32)
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
READS_BACK = {"nonzero", "_local_scalar_dense", "masked_select", "_unique2", "equal", "is_nonzero"}
CALLS, REPEATS = 20, 15


@dataclass(frozen=True)
class CallCost:
    call: str
    form: str  # plain, or masked with entropy
    triton: int
    torch: int
    read_backs: int
    host_us: float  # median
    host_us_quartiles: tuple[float, float]
    add_us: float  # torch.add in the same run, median

    @property
    def launches(self) -> int:
        return self.triton + self.torch


def costs() -> list[CallCost]:
    with on_device(ARCH), torch.no_grad():
        return [cost(name, form, call) for name, form, call in _calls()]


def _calls() -> list[tuple[str, str, Callable[[], object]]]:
    tokens = torch.zeros(ROWS, dtype=torch.long)
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[:, : ROWS[1] // 2] = False
    logits = (torch.empty(*ROWS, VOCAB, dtype=torch.bfloat16),)
    linear = (torch.empty(*ROWS, DIM, dtype=torch.bfloat16), torch.empty(VOCAB, DIM, dtype=torch.bfloat16))
    out = []
    for fn, args in (
        (er.vocab_stats, logits), (er.linear_vocab_stats, linear),
        (er.token_rewards, logits), (er.linear_token_rewards, linear),
    ):  # fmt: skip
        out.append((fn.__name__, "plain", lambda fn=fn, args=args: fn(*args, tokens)))
        out.append((fn.__name__, "masked", lambda fn=fn, args=args: fn(*args, tokens, mask=mask, entropy=True)))
    return out


def cost(name: str, form: str, call: Callable[[], object]) -> CallCost:
    with recorded() as triton, _Counted() as counted:
        call()
    (low, median, high), add = _host_time(call)
    return CallCost(
        name, form, len(triton), counted.launches, counted.read_backs, round(median, 1),
        (round(low, 1), round(high, 1)), round(add, 2),
    )  # fmt: skip


def _host_time(call: Callable[[], object]) -> tuple[list[float], float]:
    """Return the quartiles of a call and the median of torch.add, in microseconds, measured in turns."""
    from triton.runtime.jit import JITFunction

    a = torch.zeros(16)
    calls, adds = [], []
    with mock.patch.object(JITFunction, "run", lambda self, *args, **kwargs: None):
        call()
        for _ in range(REPEATS):
            calls.append(_processor_us(call))
            adds.append(_processor_us(lambda: torch.add(a, a)))
    return quantiles(calls), quantiles(adds)[1]


def _processor_us(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


class _Counted(TorchDispatchMode):
    """Counts what torch would launch on a GPU, inside of the package's own operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.read_backs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "endoreward_fast":
            from torch._library.custom_ops import OPDEFS

            with self:  # a mode is off while it handles an operator
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self.read_backs += name in READS_BACK
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        empty = isinstance(out, torch.Tensor) and not out.numel()
        self.launches += not (is_view or empty or name in ALLOCATES)
        return out
