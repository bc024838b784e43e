"""Find a model's head and inspect it without running it: its module, its kind and its weights."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EndoRewardError

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(model: nn.Module) -> str:
    """Return the model's name for messages: model type 'llama' (LlamaForCausalLM)."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = type(uncompiled(model)).__name__
    return name if not model_type else f"model type {model_type!r} ({name})"


def find_head(model: nn.Module) -> nn.Module:
    """Return the model's output embedding. Raises EndoRewardError if it is not a causal language model."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise EndoRewardError(
            f"{describe(model)} is an encoder-decoder, not a causal language model: load a decoder-only model"
        )
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if isinstance(head, nn.ModuleList):
        raise EndoRewardError(f"{describe(model)} has {len(head)} output heads; one vocabulary is needed")
    if not isinstance(head, nn.Module):
        raise EndoRewardError(
            f"{describe(model)} has no output embedding, so it is not a causal language model: "
            "load it with AutoModelForCausalLM, and pass the model itself rather than a wrapper"
        )
    return head


def refuse_bad_weights(model: nn.Module, head: nn.Module) -> None:
    """Raise EndoRewardError if a parameter was never loaded or holds NaN or infinity. Names the parameter.

    All ranks that share a head raise if one does.
    """
    fault, weight = _bad_weight(model), getattr(head, "weight", None)
    if is_dtensor(weight):
        from ..vocab.shard_layout import agreed_by_its_shards

        fault = agreed_by_its_shards(fault, weight)
    if fault is not None:
        raise EndoRewardError(f"{describe(model)}: {fault}")


def _bad_weight(model: nn.Module) -> str | None:
    """Describe the first parameter of this process that was never loaded or holds NaN or infinity.

    Reads each weight once and waits for each device once. aminmax keeps NaN and reads 15 GB/s on two CPU cores in any
    dtype; a sum in bfloat16 reads 0.4 GB/s.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate loads the weights on demand
    finite: dict[torch.device, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not offloaded:
            return f"parameter {name!r} was never loaded (meta device)"
        local = parameter.detach()
        local = local.to_local() if hasattr(local, "to_local") else local  # this process's shard of a DTensor
        plain = local.dtype in PLAIN_DTYPES and type(local) in (Tensor, nn.Parameter)
        if plain and local.numel() and not local.is_meta:
            finite.setdefault(local.device, {})[name] = torch.stack(local.aminmax()).isfinite().all()
    for found in finite.values():
        for name, fine in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            if not fine:
                return f"parameter {name!r} has NaN or infinite values"
    return None


def is_dtensor(x: Any) -> bool:
    """Return whether x is a DTensor. Compares names: importing torch.distributed.tensor takes half a second."""
    return "DTensor" in {kind.__name__ for kind in type(x).__mro__}


def plain(x: Tensor) -> Tensor:
    """Return x as a plain tensor if it is a DTensor that every rank holds whole."""
    if not is_dtensor(x):
        return x
    from ..vocab.shard_layout import same_everywhere

    return same_everywhere(x)


def why_not_plain(head: nn.Module) -> str | None:
    """Return why this head may compute something else than hidden @ weight.T + bias; None if it is a plain Linear."""
    weight = getattr(head, "weight", None)
    kind = type(head)
    if kind.forward is not nn.Linear.forward:
        return f"its output head is a {kind.__module__}.{kind.__qualname__}, not a plain torch.nn.Linear"
    # The tensor parallelism of transformers wraps the layer's forward. self_check compares the output.
    if "forward" in vars(head) and not hasattr(head, "_hf_hook") and not is_dtensor(weight):
        return "the forward of its output head was replaced"
    if is_dtensor(weight):
        from ..vocab.shard_layout import why_not_readable

        return why_not_readable(weight, getattr(head, "bias", None))
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return f"the weight of its output head is a {type(weight).__name__}, not a plain tensor"
    if weight.is_meta:
        return "the weight of its output head is offloaded"
    if weight.dtype not in PLAIN_DTYPES:
        return f"the weight of its output head is quantised ({weight.dtype})"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"the weight of its output head is sharded away, shape {tuple(weight.shape)}"
    return None


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of torch.compile(model), which hides its name and arguments."""
    return model._modules.get("_orig_mod", model)


def is_compiled(module: nn.Module) -> bool:
    """Return whether module.compile() or torch.compile(module) was applied to this module."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
