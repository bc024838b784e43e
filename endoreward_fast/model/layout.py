"""Rows in a batch: padding on either side, or several sequences packed into one row.

A token can be scored if it and the token before it are real (not padding) and belong to one sequence: only then was
it chosen in a state that the model has seen. Which tokens those are is said here once, for every caller.

Padding on the right changes nothing in a causal model. Padding on the left does unless positions are counted from the
first real token, and packed sequences do unless attention is kept apart; both are the model's doing. So the first
time either could matter the model is asked: a few tokens alone, and the same tokens padded or packed, must give the
same states. The question costs two small forward passes, is put at the same call on every process of a sharded
model, and is put once.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EndoRewardError
from ..head.module import describe, uncompiled
from ..head.self_check import check_tokens, left_as_it_was

States = Callable[[dict[str, Tensor]], Tensor]


class Layout(NamedTuple):
    """What the model is called with, and which tokens may be scored."""

    inputs: dict[str, Tensor]
    """input_ids and, where needed, attention_mask and position_ids"""
    scorable: Tensor
    """(B, T) bool"""
    kind: str
    """"plain", "left-padded" or "packed" """


def lay_out(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Layout:
    """Arguments of one forward pass from (B, T) tensors.

    Where position_ids do not go on by one from a real token to the next, a new sequence begins (Hugging Face's
    convention for packed rows). Its attention is then told apart by the positions alone, which takes an absent
    attention_mask: padding becomes sequences of its own instead.
    """
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scorable = attended & _before(attended)
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if position_ids is not None:
        follows = position_ids == position_ids.roll(1, 1) + 1
        if bool(((scorable & ~follows) | _restarts(attended, position_ids)).any()):
            # At the highest position no padding token is followed by its successor.
            highest = torch.where(attended, position_ids, 0).amax()
            inputs = {"input_ids": input_ids, "position_ids": torch.where(attended, position_ids, highest)}
            return Layout(inputs, scorable & follows, "packed")
        return Layout(inputs | {"position_ids": position_ids}, scorable, _padding(attended))
    kind = _padding(attended) if attention_mask is not None else "plain"
    if kind == "left-padded":
        inputs["position_ids"] = (attended.long().cumsum(1) - 1).clamp(min=0)
    return Layout(inputs, scorable, kind)


def _before(flags: Tensor) -> Tensor:
    """flags[:, t - 1] at place t; False at the start."""
    return torch.cat([torch.zeros_like(flags[:, :1]), flags[:, :-1]], 1)


def _restarts(attended: Tensor, position_ids: Tensor) -> Tensor:
    """(B, T) bool: real tokens at a position no later than that of the last real one before them, over padding too."""
    place = torch.arange(attended.shape[1], device=attended.device)
    last = torch.where(attended, place, -1).cummax(1).values.roll(1, 1)
    last[:, :1] = -1
    return attended & (last >= 0) & (position_ids <= position_ids.gather(1, last.clamp(min=0)))


def _padding(attended: Tensor) -> str:
    return "left-padded" if bool((~attended[:, :1]).any()) else "plain"


class PaddingLast:
    """Rows (B, T) with every real token before the padding, as wide as the longest: no causal model minds that."""

    def __init__(self, attention_mask: Tensor) -> None:
        attended = attention_mask.bool()
        self.shape = attended.shape
        self.order = (~attended).int().argsort(dim=1, stable=True)[:, : int(attended.sum(1).amax())]

    def move(self, rows: Tensor) -> Tensor:
        """(B, T) -> (B, longest)"""
        return rows.gather(1, self.order.to(rows.device))

    def back(self, rows: Tensor) -> Tensor:
        """(B, longest) -> (B, T), 0 where nothing was."""
        return rows.new_zeros(self.shape).scatter(1, self.order.to(rows.device), rows)


class LayoutCheck:
    """What a model can be given, found out by asking it."""

    def __init__(self, model: nn.Module, states: States) -> None:
        """`states` runs the model: its arguments -> (B, T, size) of what its logits are made of, or the logits."""
        self.model = model
        self.states = states
        self.accepted = accepted_arguments(model)
        self.known: dict[tuple[str, int], bool] = {}

    def arguments(self, layout: Layout) -> dict[str, Tensor]:
        """The layout's arguments that this model has."""
        return {name: value for name, value in layout.inputs.items() if name in self.accepted}

    def ask(self, kind: str, rows: int) -> None:
        """Find out about "left-padded" or "packed" batches, of one row or of several, unless that is known.

        "unplaced" batches are padded on the left and come without position_ids.
        """
        if (kind, min(rows, 2)) not in self.known:
            self.known[kind, min(rows, 2)] = self._same_states(kind, min(rows, 2))

    def counts_from_padding(self, rows: int) -> bool:
        """Whether rows padded on the left get other states without position_ids: GPT-2's table of positions."""
        self.ask("unplaced", rows)
        return not self.known["unplaced", min(rows, 2)]

    def refuse_if_known_wrong(self, kind: str, rows: int) -> None:
        """EndoRewardError if this model does not give tokens in such a batch the states that they have alone."""
        if self.known.get((kind, min(rows, 2)), True):
            return
        if kind == "packed":
            how = "keep the sequences of a packed row apart" + (
                " (flash attention does, one row at a time)" if rows > 1 and self.known.get((kind, 1)) else ""
            )
            raise EndoRewardError(f"{describe(self.model)} does not {how}: give it one sequence per row")
        raise EndoRewardError(f"{describe(self.model)} gives other states to rows padded on the left: pad on the right")

    @torch.no_grad()
    def _same_states(self, kind: str, rows: int) -> bool:
        with left_as_it_was(self.model):
            one, two = check_tokens(self.model)[:, 4:]
            real = torch.cat([one, two])[None]
            count = real.shape[1]
            before = two.flip(0)[None]
            mixed = torch.cat([before, real], 1).expand(rows, -1)
            ones = torch.ones_like(mixed)
            if kind == "packed":
                positions = [torch.arange(n, device=real.device) for n in (before.shape[1], count)]
                layout = lay_out(mixed, None, torch.cat(positions).expand(rows, -1))
            else:
                ones[:, : before.shape[1]] = 0
                layout = lay_out(mixed, ones, None)
                if kind == "unplaced":
                    layout.inputs.pop("position_ids")
            alone = self.states(self.arguments(lay_out(real, None, None)))[0]
            among = self.states(self.arguments(layout))[:, -count:]
        return same_states(among, alone)


def same_states(among: Tensor, alone: Tensor) -> bool:
    """Whether tokens have the states (T, D) among others that they have alone, but for rounding."""
    error = (among - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    # A leak is from 1e-3 (tiny random models) to 1; rounding is of the order of eps. Experts may flip: the median.
    tf32 = alone.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return bool(error.median() <= max(4e-3 if tf32 else 1e-4, 4 * torch.finfo(alone.dtype).eps))


def accepted_arguments(model: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward, seen through PEFT's wrapper and torch.compile's."""
    base: Any = uncompiled(model)
    inner = base.get_base_model() if hasattr(base, "get_base_model") else base
    names = set(inspect.signature(inner.forward).parameters)
    return names if "input_ids" in names else names | {"input_ids", "attention_mask", "position_ids"}
