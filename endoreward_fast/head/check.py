"""What a model shows before its head is trusted: that it can be scored, and that its recipe is right.

Two forward passes over 2 rows of 8 tokens. In the first, the head's output is kept at the first four
positions and replaced by known values, +-2^-4 to 2^9, at the last four. Real positions test the matmul and
the bias; the known values test everything after it however small the model's own logits are (a softcap of
30 does nothing to the logits of a randomly initialised model, but turns 512 into 30). The rows share their
first four tokens and differ afterwards, so in a causal model the real positions are equal. The second pass
is a capture, and has to give the same hidden states.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import EndoRewardError
from .gathered import weights_come_and_go
from .kind import describe, find_head, is_compiled, is_dtensor, plain, uncompiled, why_not_plain
from .recipes import HeadRecipe

if TYPE_CHECKING:
    from ..vocab.shards import VocabShard

REAL, KNOWN = 4, 4  # positions of the check's rows: real head outputs, then known ones
SAMPLED_ROWS = 4096  # of the head's weight: enough to catch a wrong matmul, no fp32 copy of a 256k vocabulary
TF32_EPS = 2.0**-10  # a float32 matmul on tensor cores keeps 10 bits


class Checked(Protocol):
    """What of a `Head` is checked."""

    module: nn.Module
    recipe: HeadRecipe

    @property
    def vocab_size(self) -> int | None: ...
    def capture(self) -> AbstractContextManager[Any]: ...


@torch.no_grad()
def self_check(model: nn.Module, head: Checked) -> str | None:
    """Why head's recipe cannot be used, or None. EndoRewardError if the model cannot be scored at all."""
    tokens = check_tokens(model)
    with left_as_it_was(model):
        calls, logits, known = _run_with_known_values(model, head, tokens)
        _refuse_unless_causal(model, logits, tokens)
        odd = calls[0].odd if calls and weights_come_and_go(model) else why_not_plain(head.module)
        if odd is not None:
            return odd
        if len(calls) != 1 or known is None:
            shapes = ", ".join(str(tuple(call.hidden.shape)) for call in calls) or "nothing"
            return f"its output head is fed {shapes}, not one (batch, tokens, size)"
        wrong = _agreed(_recipe_mismatch(head, calls[0], logits, known), calls[0].shard)
        # Only then: a forward pass of a split model is one that all ranks take part in.
        return wrong or _agreed(_capture_mismatch(model, head, calls[0].hidden, tokens), calls[0].shard)


def _agreed(reason: str | None, shard: "VocabShard | None") -> str | None:
    if shard is None:
        return reason
    from ..vocab.shards import agreed

    return agreed(reason, shard.group)


def logits_of(output: Any) -> Tensor:
    """Final logits (B, T, V) in what a causal model's forward returned: a ModelOutput or a tuple."""
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep a forward pass from building a cache of keys: nothing reads it, and Bamba's own fails."""
    return {"use_cache": False} if "use_cache" in inspect.signature(uncompiled(model).forward).parameters else {}


def check_tokens(model: nn.Module) -> Tensor:
    """Token ids (2, 8): the first half shared, the second not; none of them special (padding, image, ...)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    size = int(getattr(text, "vocab_size", 0) or getattr(find_head(model), "out_features", 256))
    special = _special_ids(config.to_dict()) if hasattr(config, "to_dict") else set()
    count = REAL + 2 * KNOWN
    stride = max(1, size // (4 * count))
    ids = [i for i in range(0, size, stride) if i not in special][-count:] or [0]
    ids = (ids * count)[:count]
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    shared, one, other = ids[:REAL], ids[REAL : REAL + KNOWN], ids[REAL + KNOWN :]
    return torch.tensor([shared + one, shared + other], device=device)


def _special_ids(config: dict[str, Any]) -> set[int]:
    """Every id that a config gives a meaning: bos_token_id, image_token_index, ..., nested ones included."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(key).endswith(("_id", "_ids", "_index")):
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and compiled modules run eagerly; afterwards each module has its own mode again.

    Compiling for the check's hooks and its 8 tokens would take seconds, and serve nothing else.
    """
    modes = {module: module.training for module in model.modules()}
    eager = torch.compiler.set_stance("force_eager") if any(map(is_compiled, modes)) else nullcontext()
    with eager:
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _forward(model: nn.Module, tokens: Tensor) -> Any:
    # Reformer draws its hash buckets at random: both passes draw the same, and the caller's state stays.
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        return model(input_ids=tokens, **without_cache(model))


def _known_values(shape: torch.Size, like: Tensor) -> Tensor:
    """Head outputs of all sizes, exact in any dtype: +-2^-4, ..., +-2^9, varying along each axis."""
    place = torch.arange(shape.numel(), device=like.device).reshape(shape) % 28
    sign = 1 - 2 * (place % 2)
    return (sign * torch.exp2(place // 2 - 4.0)).to(like.dtype)


class _Call(NamedTuple):
    """One call of the head, looked at while it runs: FSDP2 has its weight whole only then."""

    hidden: Tensor
    odd: str | None
    """why it may not compute hidden @ weight.T + bias"""
    rows: Tensor | None
    """(K,) which rows of the weight are kept here; None for an odd head"""
    weight: Tensor | None
    """(K, D) fp32"""
    bias: Tensor | None
    """(K,) fp32"""
    shard: "VocabShard | None"
    """whose the rows are, if they are not all here"""

    @classmethod
    def of(cls, head: Checked, hidden: Tensor) -> "_Call":
        odd = why_not_plain(head.module)
        if odd is not None:
            return cls(hidden, odd, None, None, None, None)
        weight, bias, shard = head.module.weight, getattr(head.module, "bias", None), None
        if is_dtensor(weight):
            from ..vocab.shards import head_here

            weight, bias, shard = head_here(weight, bias)
        start = shard.start if shard else 0
        size = len(weight) if head.vocab_size is None else max(0, min(len(weight), head.vocab_size - start))
        rows = torch.linspace(0, max(0, size - 1), min(size, SAMPLED_ROWS)).long().to(weight.device)
        bias = None if bias is None else bias[rows].float()
        return cls(hidden, None, start + rows, weight[rows].float(), bias, shard)


def _run_with_known_values(
    model: nn.Module, head: Checked, tokens: Tensor
) -> tuple[list[_Call], Tensor, Tensor | None]:  # fmt: skip
    """The head's calls; final logits (2, 8, V); the values planted at the end (2, 4, rows)."""
    calls: list[_Call] = []
    planted: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(_Call.of(head, plain(args[0])))

    def plant(module: nn.Module, args: tuple[Tensor, ...], y: Any) -> Any:
        _refuse_parts_of_logits(model, head, y)
        if not isinstance(y, Tensor) or y.dim() != 3 or y.shape[:2] != tokens.shape:
            return y
        planted.append(_known_values(y[:, REAL:].shape, y))
        return torch.cat([y[:, :REAL], planted[-1]], 1)

    handles = [head.module.register_forward_pre_hook(look), head.module.register_forward_hook(plant)]
    try:
        logits = logits_of(_forward(model, tokens))
    except EndoRewardError:
        raise
    except Exception as error:
        raise EndoRewardError(f"{describe(model)} does not run on token ids alone: {_one_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits, planted[0] if len(planted) == 1 else None


def _refuse_parts_of_logits(model: nn.Module, head: Checked, y: Any) -> None:
    """Neither the head's recipe nor the model's own logits can be read where each process has some columns of them."""
    weight = getattr(head.module, "weight", None)  # a head of several modules has none
    if is_dtensor(y) or (is_dtensor(weight) and isinstance(y, Tensor) and y.shape[-1] != weight.shape[0]):
        raise EndoRewardError(
            f"{describe(model)}: its output head gives each process a part of the logits, {type(y).__name__} "
            f"{tuple(y.shape)}, not a plain tensor of all {weight.shape[0]}: lay them out whole, as ColwiseParallel("
            "output_layouts=Replicate()) does"
        )


def _refuse_unless_causal(model: nn.Module, logits: Tensor, tokens: Tensor) -> None:
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise EndoRewardError(
            f"{describe(model)} gives logits of shape {tuple(logits.shape)} for {tuple(tokens.shape)} "
            "tokens; a causal language model gives (batch, tokens, vocabulary)"
        )
    one, other = logits[:, :REAL]
    if one.isnan().any():
        raise EndoRewardError(f"{describe(model)} gives NaN logits although its weights are finite")
    change = torch.where(one == other, 0.0, one.float() - other.float()).abs().amax(-1)
    # Seen in float32: mixture-of-experts noise 1e-6 of the spread, an untrained BERT 1e-2.
    if (change > _noise(one)).float().median() == 1:
        raise EndoRewardError(
            f"{describe(model)} is not causal: its logits at a token change with later tokens "
            "(an encoder, or a decoder whose config does not say is_decoder or causal?)"
        )


def _recipe_mismatch(head: Checked, call: _Call, logits: Tensor, known: Tensor) -> str | None:
    expected = head.recipe.finish(known.float())
    if expected.shape[-1] != logits.shape[-1]:
        return f"its logits have {logits.shape[-1]} entries where its head gives {expected.shape[-1]}"
    eps = max(torch.finfo(t.dtype).eps for t in (call.hidden, head.module.weight, logits))
    got = logits[:, REAL:].to(expected.device).float()
    if not ((got - expected).abs() <= 4 * eps * expected.abs() + 1e-6).all():
        return f"what it does to its head's output is not {head.recipe}"

    if not len(call.rows):
        return None  # what this process holds is all padding
    y = call.hidden[:, :REAL].to(call.rows.device).float() @ call.weight.T
    if call.bias is not None:
        y = y + call.bias
    expected = head.recipe.finish(y)
    got = logits[:, :REAL].to(y.device)[..., call.rows].float()
    size = expected.abs() + expected.std(-1, keepdim=True, correction=0)
    if not ((got - expected).abs() <= 4 * max(eps, TF32_EPS) * size).all():
        return "its logits are not hidden @ weight.T + bias"
    return None


def _capture_mismatch(model: nn.Module, head: Checked, hidden: Tensor, tokens: Tensor) -> str | None:
    try:
        with head.capture() as seen:
            logits = logits_of(_forward(model, tokens))
    except Exception as error:
        return f"it does not run without logits ({_one_line(error)})"
    if logits.shape[1] != seen.fed:
        return f"it makes logits {tuple(logits.shape)} from an empty head input"
    again = seen.hidden.to(hidden.device)
    if again.shape != hidden.shape or ((again - hidden).float().abs().mean(-1) > _noise(hidden)).any():
        return "its hidden states differ when no logits are made"
    return None


def _noise(x: Tensor) -> Tensor:
    """How far rows x (..., K) may lie from their like (...): mixture-of-experts layers round differently with other
    companions, and on a GPU from run to run, more so the deeper the model is."""
    return max(4 * TF32_EPS, 32 * torch.finfo(x.dtype).eps) * x.float().std(-1)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
