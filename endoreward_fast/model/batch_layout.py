"""The layout of a batch: padding on either side, or several sequences packed into one row.

A token can be scored if it and the token before it are real (not padding) and belong to one sequence. Only then has the
model seen the state in which the token was chosen. `lay_out` finds these tokens.

Padding on the right does not change the states of a causal model. Padding on the left does not if the model counts
positions from the first real token. Packing does not if the model keeps the attention of the sequences apart. The last
two depend on the model, so `LayoutCheck` tests it before the first such batch: a few tokens alone, and the same tokens
padded or packed, must give the same states. The test costs two small forward passes, once per model. On a sharded model
every process makes it at the same call.
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
    """The model's arguments for a batch, and which tokens may be scored."""

    inputs: dict[str, Tensor]
    """input_ids and, where needed, attention_mask and position_ids"""
    scorable: Tensor
    """(B, T) bool"""
    kind: str
    """"plain", "left-padded" or "packed" """


def lay_out(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Layout:
    """Return the layout of one batch, from (B, T) tensors.

    A new sequence begins wherever position_ids do not increase by one from a real token to the next (Hugging Face's
    convention for packed rows). Hugging Face models then separate the sequences by position_ids, but only if there is
    no attention_mask. So a packed batch has none: each padding token gets a position that makes it its own sequence.
    """
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scorable = attended & _shifted(attended)
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if position_ids is not None:
        follows = position_ids == position_ids.roll(1, 1) + 1
        if bool(((scorable & ~follows) | _restarts(attended, position_ids)).any()):
            # All padding gets the highest position, so that no padding token continues a sequence.
            highest = torch.where(attended, position_ids, 0).amax()
            inputs = {"input_ids": input_ids, "position_ids": torch.where(attended, position_ids, highest)}
            return Layout(inputs, scorable & follows, "packed")
        return Layout(inputs | {"position_ids": position_ids}, scorable, _padding(attended))
    kind = _padding(attended) if attention_mask is not None else "plain"
    if kind == "left-padded":
        inputs["position_ids"] = (attended.long().cumsum(1) - 1).clamp(min=0)
    return Layout(inputs, scorable, kind)


def _shifted(flags: Tensor) -> Tensor:
    """Return flags shifted right by one: flags[:, t - 1] at position t, False at position 0."""
    return torch.cat([torch.zeros_like(flags[:, :1]), flags[:, :-1]], 1)


def _restarts(attended: Tensor, position_ids: Tensor) -> Tensor:
    """Return (B, T) bool: real tokens whose position is not above that of the real token before them.

    Padding between the two is skipped.
    """
    place = torch.arange(attended.shape[1], device=attended.device)
    last = torch.where(attended, place, -1).cummax(1).values.roll(1, 1)
    last[:, :1] = -1
    return attended & (last >= 0) & (position_ids <= position_ids.gather(1, last.clamp(min=0)))


def _padding(attended: Tensor) -> str:
    return "left-padded" if bool((~attended[:, :1]).any()) else "plain"


class PaddingLast:
    """Moves the padding of rows (B, T) to the right, which does not change the states of a causal model.

    The moved rows are as wide as the longest: (B, longest).
    """

    def __init__(self, attention_mask: Tensor) -> None:
        attended = attention_mask.bool()
        self.shape, self.lengths = attended.shape, attended.sum(1)
        self.order = (~attended).int().argsort(dim=1, stable=True)[:, : int(attended.sum(1).amax())]

    def move(self, rows: Tensor) -> Tensor:
        """Return rows (B, T) with the padding on the right: (B, longest)."""
        return rows.gather(1, self.order.to(rows.device))

    def back(self, rows: Tensor) -> Tensor:
        """Return rows (B, longest) in their original layout (B, T), 0 at padding."""
        return rows.new_zeros(self.shape).scatter(1, self.order.to(rows.device), rows)


class LayoutCheck:
    """Tests which layouts a model reads correctly."""

    def __init__(self, model: nn.Module, states: States) -> None:
        """`states` runs the model on its arguments, and returns the input of its head (B, T, D), or its logits."""
        self.model = model
        self.states = states
        self.accepted = accepted_arguments(model)
        self.known: dict[tuple[str, int], bool] = {}

    def arguments(self, layout: Layout) -> dict[str, Tensor]:
        """Return the layout's arguments that the model's forward accepts."""
        return {name: value for name, value in layout.inputs.items() if name in self.accepted}

    def ask(self, kind: str, rows: int) -> None:
        """Test the model with a "left-padded", "packed" or "unplaced" batch, unless the result is known.

        "unplaced" is padded on the left, without position_ids. One row and several rows are tested separately.
        """
        if (kind, min(rows, 2)) not in self.known:
            self.known[kind, min(rows, 2)] = self._same_states(kind, min(rows, 2))

    def counts_from_padding(self, rows: int) -> bool:
        """Return whether the model counts positions from the padding if it gets no position_ids, as GPT-2 does."""
        self.ask("unplaced", rows)
        return not self.known["unplaced", min(rows, 2)]

    def refuse_if_known_wrong(self, kind: str, rows: int) -> None:
        """Raise EndoRewardError if a test has shown that such a batch changes the states of its tokens."""
        if self.known.get((kind, min(rows, 2)), True):
            return
        if kind == "packed":
            how = "keep the sequences of a packed row apart" + (
                " (flash attention does, one row at a time)" if rows > 1 and self.known.get((kind, 1)) else ""
            )
            raise EndoRewardError(f"{describe(self.model)} does not {how}: give it one sequence per row")
        raise EndoRewardError(f"{describe(self.model)} changes the states of rows padded on the left: pad on the right")

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
    """Return whether the states (T, D) of tokens among others equal those alone, up to rounding."""
    error = (among - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    # A leak gives an error of 1e-3 (tiny random models) to 1, and rounding one of about eps. The median, because a
    # token of a mixture of experts may be routed to another expert.
    tf32 = alone.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return bool(error.median() <= max(4e-3 if tf32 else 1e-4, 4 * torch.finfo(alone.dtype).eps))


def accepted_arguments(model: nn.Module) -> set[str]:
    """Return the names of the arguments of a model's forward, also inside PEFT's and torch.compile's wrappers."""
    base: Any = uncompiled(model)
    inner = base.get_base_model() if hasattr(base, "get_base_model") else base
    names = set(inspect.signature(inner.forward).parameters)
    return names if "input_ids" in names else names | {"input_ids", "attention_mask", "position_ids"}
