"""The check of a model's head: can the model be scored, and is its family's recipe right?

The check runs two forward passes over 2 rows of 8 tokens. In the first pass, hooks keep the head's output at the first
four positions and replace it by known values, +-2^-4 to 2^9, at the last four. The real positions test the matmul and
the bias. The known values test everything after them, even if the model's own logits are small: a softcap of 30 does
not change the logits of a randomly initialised model, but turns 512 into 30. The rows share their first four tokens and
differ afterwards, so in a causal model the logits at the real positions are equal. The second pass is a capture and
must give the same hidden states.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import EndoRewardError
from .gathered import weights_come_and_go
from .module import describe, find_head, is_compiled, is_dtensor, plain, uncompiled, why_not_plain
from .recipes import HeadRecipe

if TYPE_CHECKING:
    from ..vocab.shard_layout import VocabShard

REAL, KNOWN = 4, 4  # positions with real head outputs, and after them positions with known values
SAMPLED_ROWS = 4096  # rows of the head's weight to check: enough to catch a wrong matmul without a full fp32 copy
TF32_EPS = 2.0**-10  # a TF32 matmul keeps 10 bits


class Checked(Protocol):
    """The parts of a `Head` that the check uses."""

    module: nn.Module
    recipe: HeadRecipe

    @property
    def vocab_size(self) -> int | None: ...
    def capture(self) -> AbstractContextManager[Any]: ...


@torch.no_grad()
def self_check(model: nn.Module, head: Checked) -> str | None:
    """Return why the head's recipe cannot be used, or None. Raises EndoRewardError if the model cannot be scored."""
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
        # The ranks agree before the second pass, because all ranks must take part in the forward of a split model.
        return wrong or _agreed(_capture_mismatch(model, head, calls[0].hidden, tokens), calls[0].shard)


def _agreed(reason: str | None, shard: "VocabShard | None") -> str | None:
    if shard is None:
        return reason
    from ..vocab.shard_layout import agreed

    return agreed(reason, shard.group)


def logits_of(output: Any) -> Tensor:
    """Return the final logits (B, T, V) from a causal model's output, a ModelOutput or a tuple."""
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that turns the model's key cache off. Nothing reads the cache, and Bamba's fails."""
    return {"use_cache": False} if "use_cache" in inspect.signature(uncompiled(model).forward).parameters else {}


def check_tokens(model: nn.Module) -> Tensor:
    """Return token ids (2, 8) without special ids (padding, image, ...). The rows share their first half only."""
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
    """Return every special id in a config and its nested configs: bos_token_id, image_token_index, ..."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(key).endswith(("_id", "_ids", "_index")):
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and run compiled modules eagerly; restore each module's mode on exit.

    Compiling for the hooks and the 8 tokens of the check would take seconds and would not be reused.
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
    # Reformer draws random hash buckets. Both passes must draw the same, and the caller's random state must not change.
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        return model(input_ids=tokens, **without_cache(model))


def _known_values(shape: torch.Size, like: Tensor) -> Tensor:
    """Return head outputs +-2^-4, ..., +-2^9, exact in any dtype, that vary along each axis."""
    place = torch.arange(shape.numel(), device=like.device).reshape(shape) % 28
    sign = 1 - 2 * (place % 2)
    return (sign * torch.exp2(place // 2 - 4.0)).to(like.dtype)


class _Call(NamedTuple):
    """What one call of the head shows while it runs. FSDP2 gathers the weight only then."""

    hidden: Tensor
    odd: str | None
    """why the head may not compute hidden @ weight.T + bias"""
    rows: Tensor | None
    """(K,) indices of the sampled rows of the weight; None for an odd head"""
    weight: Tensor | None
    """(K, D) fp32"""
    bias: Tensor | None
    """(K,) fp32"""
    shard: "VocabShard | None"
    """the shard that the rows belong to, if the head is split"""

    @classmethod
    def of(cls, head: Checked, hidden: Tensor) -> "_Call":
        odd = why_not_plain(head.module)
        if odd is not None:
            return cls(hidden, odd, None, None, None, None)
        weight, bias, shard = head.module.weight, getattr(head.module, "bias", None), None
        if is_dtensor(weight):
            from ..vocab.shard_layout import head_here

            weight, bias, shard = head_here(weight, bias)
        start = shard.start if shard else 0
        size = len(weight) if head.vocab_size is None else max(0, min(len(weight), head.vocab_size - start))
        rows = torch.linspace(0, max(0, size - 1), min(size, SAMPLED_ROWS)).long().to(weight.device)
        bias = None if bias is None else bias[rows].float()
        return cls(hidden, None, start + rows, weight[rows].float(), bias, shard)


def _run_with_known_values(
    model: nn.Module, head: Checked, tokens: Tensor
) -> tuple[list[_Call], Tensor, Tensor | None]:  # fmt: skip
    """Return the head's calls, the final logits (2, 8, V) and the planted values (2, 4, rows)."""
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
    """Refuse a head whose output is split by columns: neither its recipe nor the model's logits can then be read."""
    weight = getattr(head.module, "weight", None)  # a head of several modules has none
    if is_dtensor(y) or (is_dtensor(weight) and isinstance(y, Tensor) and y.shape[-1] != weight.shape[0]):
        raise EndoRewardError(
            f"{describe(model)}: its output head gives each process a part of the logits, {type(y).__name__} "
            f"{tuple(y.shape)}, instead of a plain tensor of all {weight.shape[0]}: replicate them, for example with "
            "ColwiseParallel(output_layouts=Replicate())"
        )


def _refuse_unless_causal(model: nn.Module, logits: Tensor, tokens: Tensor) -> None:
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise EndoRewardError(
            f"{describe(model)} gives logits of shape {tuple(logits.shape)} for {tuple(tokens.shape)} "
            "tokens: expected (batch, tokens, vocabulary), as a causal language model gives"
        )
    one, other = logits[:, :REAL]
    if one.isnan().any():
        raise EndoRewardError(f"{describe(model)} gives NaN logits, although its weights are finite: try another dtype")
    change = torch.where(one == other, 0.0, one.float() - other.float()).abs().amax(-1)
    # Measured in float32, relative to the spread: 1e-6 for mixture-of-experts noise, 1e-2 for an untrained BERT.
    if (change > _noise(one)).float().median() == 1:
        raise EndoRewardError(
            f"{describe(model)} is not causal: its logits at a token change with later tokens "
            "(load a causal language model, or set is_decoder or causal in a decoder's config)"
        )


def _recipe_mismatch(head: Checked, call: _Call, logits: Tensor, known: Tensor) -> str | None:
    expected = head.recipe.finish(known.float())
    if expected.shape[-1] != logits.shape[-1]:
        return f"its logits have {logits.shape[-1]} entries where its head gives {expected.shape[-1]}"
    eps = max(torch.finfo(t.dtype).eps for t in (call.hidden, head.module.weight, logits))
    got = logits[:, REAL:].to(expected.device).float()
    if not ((got - expected).abs() <= 4 * eps * expected.abs() + 1e-6).all():
        return f"it does not apply {head.recipe} to its head's output"

    if not len(call.rows):
        return None  # this process holds only padding
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
        return f"it returns logits {tuple(logits.shape)} although its head got an empty input"
    again = seen.hidden.to(hidden.device)
    if again.shape != hidden.shape or ((again - hidden).float().abs().mean(-1) > _noise(hidden)).any():
        return "its hidden states differ when no logits are made"
    return None


def _noise(x: Tensor) -> Tensor:
    """Return the tolerance (...) between equal rows x (..., K).

    Mixture-of-experts layers round differently in another batch and, on a GPU, from run to run. Depth adds to this.
    """
    return max(4 * TF32_EPS, 32 * torch.finfo(x.dtype).eps) * x.float().std(-1)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
