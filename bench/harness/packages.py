"""Adapters for packages that compute the same numbers. A package is imported when its peer is made, never installed.

Checked against the sources of liger-kernel 0.8.5, cut-cross-entropy 25.1.1, trl 1.16.0, quack-kernels 0.6.5 (with
nvidia-cutlass-dsl 4.8.1), verl 0.9.1 and skyrl 0.3.0. `Call.takes` is the part of a function's signature that its
adapter relies on; tests/bench/test_packages.py compares it with the source of an installed package.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.peers import Inputs, Peer, no_softcap

TRL_CHUNK = 32768  # as in TRL, where it is private
QUACK_CHUNK = 4096  # quack's default, and a multiple of 128, which its scaled-exp path needs
SCALED_CE = "LigerFusedLinearScaledCrossEntropyFunction"


@dataclass(frozen=True)
class Call:
    """One function of a package: where it is, the parameters that `run` passes by position or name, and how.

    `where` is one or more "module:name"; the first that can be imported is used.
    """

    where: tuple[str, ...]
    takes: str
    run: Callable[[Callable, Inputs], object]
    gives: str = "nll"
    obstacle: Callable[[Inputs], str | None] = lambda inputs: None
    about: tuple[tuple[str, object], ...] = ()

    def peer(self) -> Peer:
        function, missing = find(self.where)
        run = functools.partial(self.run, function)
        return Peer(run, gives=self.gives, missing=missing, obstacle=self.obstacle, **dict(self.about))


def find(where: tuple[str, ...]) -> tuple[Callable | None, str | None]:
    """Return (function, None), or (None, why none of the places can be imported)."""
    reasons = []
    for place in where:
        module, _, name = place.partition(":")
        try:
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            return found, None
        except Exception as error:  # an import may raise anything: no driver, another torch
            reasons.append(f"{module}: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:120]}")
    return None, "; ".join(reasons)


# ------------------------------------------------------------------------------------------------ what they cannot do


def hopper_bf16(i: Inputs) -> str | None:
    if i.targets.device.type != "cuda" or torch.cuda.get_device_capability(i.targets.device) != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    return "takes bfloat16 only" if i.hidden.dtype != torch.bfloat16 else no_softcap(i)


def on_cuda(i: Inputs) -> str | None:
    return no_softcap(i) if i.targets.device.type == "cuda" else "needs a CUDA GPU"


def liger_fallback(i: Inputs) -> str | None:
    hopper = i.targets.device.type == "cuda" and torch.cuda.get_device_capability(i.targets.device) == (9, 0)
    return "Liger takes its CuTe function on this GPU" if hopper else no_softcap(i)


def verl_shapes(i: Inputs) -> str | None:
    return "needs a hidden size divisible by 128" if i.shape.hidden % 128 else on_cuda(i)


def scaled_exp_shapes(i: Inputs) -> str | None:
    return "needs a vocabulary divisible by 128" if i.shape.vocab % 128 else hopper_bf16(i)


# ------------------------------------------------------------------------------------------------ Liger


def _liger_linear(reduction: str):
    def run(function, i: Inputs):
        return function(i.hidden, i.weight, i.targets, None, None, -100, 0.0, 0.0, reduction, i.shape.softcap)[0]

    return run


def _liger_scaled(entropy: bool):
    """Return run(function, inputs); the function has no bias, softcap or log-sum-exp, and bfloat16 entropy."""

    def run(function, i: Inputs):
        return function(i.hidden, i.weight, i.targets, 1.0, -100, 1, entropy)

    return run


def _liger_logits(function, i: Inputs):
    return function(i.logits, i.targets, None, -100, 0.0, 0.0, "none")[0]


LIGER_LINEAR = ("liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction.apply",)
LIGER_LINEAR_TAKES = (
    "_input weight target bias ce_weight ignore_index lse_square_scale label_smoothing reduction softcap"
)
LIGER_CUTE = (
    "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90:LigerFusedScaledCrossEntropySM90Function.apply",
)
LIGER_CUTILE = (f"liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy:{SCALED_CE}.apply",)
LIGER_FRONT = (f"liger_kernel.ops.fused_linear_scaled_cross_entropy:{SCALED_CE}.apply",)
SCALED_TAKES = "_input weight target temperature ignore_index m_tiles_per_cluster return_entropy"

# ------------------------------------------------------------------------------------------------ the others


def _cce(function, i: Inputs) -> Tensor:
    """Call it without its gradient filter, which drops the gradients of small probabilities."""
    return function(i.hidden, i.weight, i.targets, softcap=i.shape.softcap, reduction="none", filter_eps=None)


def _trl_linear(entropy: bool):
    def run(function, i: Inputs):
        outputs = ("entropy",) if entropy else ()
        logprob, h, *_ = function(
            i.hidden, i.weight, None, i.targets, 1.0, TRL_CHUNK, i.shape.softcap, 1.0, outputs
        )  # fmt: skip
        return (-logprob, h) if entropy else -logprob

    return run


def _trl_one_pass(function, i: Inputs):
    logprob, entropy = function(i.logits, i.targets)
    return -logprob, entropy


def _trl_selective(function, i: Inputs) -> Tensor:
    return -function(i.logits, i.targets)


def _quack_linear(function, i: Inputs) -> Tensor:
    return function(i.hidden, i.weight, None, i.targets, reduction="none")


def _quack_store_free(epilogue, i: Inputs):
    """Matmul whose epilogue gives the log-sum-exp and the target's logit, in quack's own untuned configuration."""
    out = epilogue(i.hidden, i.weight.mT, store_d=False, target=i.targets, tuned=False)
    return out["lse"], out["target_logit"]


def _quack_summed(function, i: Inputs) -> Tensor:
    return function(i.hidden, i.weight, i.targets, QUACK_CHUNK, -100, "sum", False, True)


def _quack_logits(function, i: Inputs) -> Tensor:
    return function(i.logits, i.targets, reduction="none")


def _verl(function, i: Inputs):
    logprob, entropy = function(i.hidden, i.weight, i.targets, 1.0, "none", None)
    return -logprob, entropy


VERL = (
    "verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy.apply",
    "skyrl.backends.skyrl_train.distributed.megatron.fused_linear_logprob_triton:LinearCrossEntropy.apply",
)
QUACK = "quack.linear_cross_entropy:"
TRL_TAKES = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
STORED = (("bytes_per_logit", 6.0),)

CALLS = {
    # from hidden states
    "liger-kernel": Call(LIGER_LINEAR, LIGER_LINEAR_TAKES, _liger_linear("none")),
    "liger-kernel, scaled, CuTe": Call(LIGER_CUTE, SCALED_TAKES, _liger_scaled(False), obstacle=hopper_bf16),
    "liger-kernel, scaled, cuTile": Call(LIGER_CUTILE, SCALED_TAKES, _liger_scaled(False), obstacle=on_cuda),
    "cut-cross-entropy, unfiltered": Call(
        ("cut_cross_entropy:linear_cross_entropy",), "e c targets softcap reduction filter_eps", _cce
    ),
    "TRL, chunked logprob": Call(("trl.kernels:ChunkedLogProbFunction.apply",), TRL_TAKES, _trl_linear(False)),
    "quack-kernels, logits stored": Call(
        (QUACK + "linear_cross_entropy_func",), "x weight bias target reduction", _quack_linear, about=STORED
    ),
    "quack-kernels, store-free": Call(
        ("quack.epilogue.library:lse_target_epi",), "A B store_d tuned", _quack_store_free, "stats", hopper_bf16
    ),
    "verl": Call(
        VERL, "hidden weight labels temperature reduction dist_process_group", _verl, "nll, entropy", verl_shapes
    ),
    # with entropy
    "liger-kernel, scaled, CuTe, entropy": Call(
        LIGER_CUTE, SCALED_TAKES, _liger_scaled(True), "nll, entropy", hopper_bf16
    ),
    "liger-kernel, scaled, cuTile, entropy": Call(
        LIGER_CUTILE, SCALED_TAKES, _liger_scaled(True), "nll, entropy", on_cuda
    ),
    "liger-kernel, scaled, torch fallback": Call(
        LIGER_FRONT, SCALED_TAKES, _liger_scaled(True), "nll, entropy", liger_fallback
    ),
    "TRL, chunked logprob, entropy": Call(
        ("trl.kernels:ChunkedLogProbFunction.apply",), TRL_TAKES, _trl_linear(True), "nll, entropy"
    ),
    # the gradient of the sum over rows
    "liger-kernel, summed": Call(LIGER_LINEAR, LIGER_LINEAR_TAKES, _liger_linear("sum"), "summed nll"),
    "quack-kernels, scaled exp, summed": Call(
        (QUACK + "chunked_linear_cross_entropy",),
        "x weight target chunk_size ignore_index reduction tuned use_scaled_exp",
        _quack_summed,
        "summed nll",
        scaled_exp_shapes,
    ),
    # from logits
    "liger-kernel, logits": Call(
        ("liger_kernel.ops.cross_entropy:LigerCrossEntropyFunction.apply",),
        "_input target weight ignore_index lse_square_scale label_smoothing reduction",
        _liger_logits,
    ),
    "quack-kernels, logits": Call(
        ("quack.cross_entropy:cross_entropy",), "x target reduction", _quack_logits, obstacle=on_cuda
    ),
    "TRL, one pass": Call(
        ("trl.kernels:selective_log_softmax_and_entropy",), "logits index", _trl_one_pass, "nll, entropy"
    ),
    "TRL, selective_log_softmax": Call(("trl.trainer.utils:selective_log_softmax",), "logits index", _trl_selective),
    "TRL, selective_log_softmax_and_entropy": Call(
        ("trl.trainer.utils:selective_log_softmax_and_entropy",), "logits index", _trl_one_pass, "nll, entropy"
    ),
}


def peers(*names: str) -> dict[str, Peer]:
    return {name: CALLS[name].peer() for name in names}
