"""What a model's head is, as far as it shows without running: which module, of what kind, where its weights are."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EndoRewardError

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(model: nn.Module) -> str:
    """'llama' (LlamaForCausalLM)."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = type(uncompiled(model)).__name__
    return name if not model_type else f"model type {model_type!r} ({name})"


def find_head(model: nn.Module) -> nn.Module:
    """The model's one output embedding, or EndoRewardError saying why it is not a causal language model."""
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
            "load it with AutoModelForCausalLM, and hand over the model itself rather than a wrapper"
        )
    return head


def refuse_bad_weights(model: nn.Module, head: nn.Module) -> None:
    """EndoRewardError naming a parameter that was never loaded, or holds NaN or infinity: on all ranks that share the
    head alike."""
    fault, weight = _bad_weight(model), getattr(head, "weight", None)
    if is_dtensor(weight):
        from ..vocab.shards import agreed_by_its_shards

        fault = agreed_by_its_shards(fault, weight)
    if fault is not None:
        raise EndoRewardError(f"{describe(model)}: {fault}")


def _bad_weight(model: nn.Module) -> str | None:
    """The first such parameter here.

    Reads each weight once (15 GB/s on two CPU cores, any dtype; a sum in bfloat16 runs at 0.4) and waits for a
    device once. aminmax passes NaN on.
    """
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate brings the weights in
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
    """By name: importing torch.distributed.tensor takes half a second, and whoever has a DTensor has done so."""
    return "DTensor" in {kind.__name__ for kind in type(x).__mro__}


def plain(x: Tensor) -> Tensor:
    """A tensor that every rank holds whole, as itself and not as a DTensor."""
    if not is_dtensor(x):
        return x
    from ..vocab.shards import same_everywhere

    return same_everywhere(x)


def why_not_plain(head: nn.Module) -> str | None:
    """Why hidden @ weight.T + bias may not be what this head computes, by its kind; None if it is plain."""
    weight = getattr(head, "weight", None)
    kind = type(head)
    if kind.forward is not nn.Linear.forward:
        return f"its output head is a {kind.__module__}.{kind.__qualname__}, not a plain torch.nn.Linear"
    # transformers' tensor parallelism has a forward of its own around the layer's; self_check compares what comes out.
    if "forward" in vars(head) and not hasattr(head, "_hf_hook") and not is_dtensor(weight):
        return "the forward of its output head was replaced"
    if is_dtensor(weight):
        from ..vocab.shards import why_not_readable

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
    """The model inside torch.compile(model)'s wrapper, which takes any arguments and has a name of its own."""
    return model._modules.get("_orig_mod", model)


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this module runs code that torch.compile made: module.compile() or torch.compile(module)."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
