"""What `ChainCache` does to the layers of transformers' caches: copy, cut back, select and append rows.

A layer may hold slots (keys and values, one for each token), convolution states (the last few inputs) and recurrent
states (no slots at all: they can only be put back as a whole).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ctc_drafter.types import UserError

# Layers whose rows can be cut back apart; others, of a modelling file's own, are put back as a whole.
KNOWN = {
    *("DynamicLayer", "GrowingLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer"),
    *("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
}
SLOTTED = ("keys", "values", "indexer_keys")  # [B, ..., S, dim]
STATES = ("conv_states", "recurrent_states")  # number of the state -> tensor, or None before the first forward


def layer_slides(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False)) and hasattr(layer, "activate_past_recording")


def is_opaque(layer: Any) -> bool:
    """Whether only the modelling file knows what a layer holds."""
    return type(layer).__name__ not in KNOWN


def has_recurrent_states(layer: Any) -> bool:
    return any(state is not None for state in getattr(layer, "recurrent_states", {}).values())


def shallow(layer: Any) -> dict[str, Any]:
    """What a layer holds, with copies of its lists and dictionaries but not of their tensors."""
    return {name: copy.copy(value) if isinstance(value, dict | list) else value for name, value in vars(layer).items()}


def kept(layer: Any) -> dict[str, Any]:
    """What `cut` needs of a layer before a forward: all of an opaque one; states that are written in place."""
    if is_opaque(layer):
        return shallow(layer)
    return {
        name: {index: None if state is None else state.clone() for index, state in getattr(layer, name).items()}
        for name in STATES
        if hasattr(layer, name)
    }


def cut(layer: Any, before: dict[str, Any], drops: Sequence[int], size: int) -> None:
    """Takes the last `drops[b]` of the tokens that row b was fed, padding included, out of a layer again.

    size: tokens of the longest row afterwards. Of recurrent states and opaque layers a row drops all tokens or none.
    """
    if is_opaque(layer):
        if any(drops):
            vars(layer).update(before)
        return
    cut_slots(layer, drops, size)
    for index, new in getattr(layer, "conv_states", {}).items():
        if new is not None:
            layer.conv_states[index] = cut_convolution(
                new, before["conv_states"][index], layer.conv_kernel_size[index], drops
            )
    for index, new in getattr(layer, "recurrent_states", {}).items():
        if new is not None and any(drops):
            layer.recurrent_states[index] = by_row(drops, new, before["recurrent_states"][index])


def by_row(drops: Sequence[int], new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """Rows of `new [B, ...]` that drop nothing, and of `old` in the place of the others."""
    old = torch.zeros_like(new) if old is None else old
    rows = torch.tensor([drop == 0 for drop in drops], device=new.device)
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)


def cut_convolution(new: torch.Tensor, old: torch.Tensor | None, kernel: int, drops: Sequence[int]) -> torch.Tensor:
    """The last `kernel` inputs of a convolution `[B, C, T]` that stay; zeros where there are fewer, as before a text.

    Where nothing was recorded `new` is as wide as the kernel, and rows drop all tokens or none.
    """
    if new.shape[-1] == kernel and old is not None:
        return by_row(drops, new, old) if any(drops) else new
    return aligned(new.transpose(-1, -2), drops, kernel, filled=False).transpose(-1, -2).contiguous()


def aligned(states: torch.Tensor, drops: Sequence[int], slots: int, filled: bool = True) -> torch.Tensor:
    """The `slots` slots of `[B, ..., S, dim]` before the last `drops[b]` of each row.

    Where a row has fewer, its first slot is repeated, which a mask hides: of anything else its numbers might be none.
    With filled=False there are zeros instead.
    """
    ends = [states.shape[-2] - drop for drop in drops]
    if len(set(ends)) == 1 and ends[0] >= slots:
        return states.narrow(-2, ends[0] - slots, slots)
    index = torch.tensor([[end - slots + slot for slot in range(slots)] for end in ends], device=states.device)
    index = index.view(len(ends), *[1] * (states.dim() - 3), slots, 1)
    found = states.take_along_dim(index.clamp(min=0), -2)
    return found if filled else found.masked_fill(index < 0, 0)


def slots_of(layer: Any, size: int) -> int:
    """Slots that a layer holds when its longest row has `size` tokens."""
    return min(size, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else size


def set_slots(layer: Any, states: dict[str, torch.Tensor], size: int) -> None:
    """Puts tensors by name in their places."""
    for name, tensor in states.items():
        setattr(layer, name, tensor)
    if getattr(layer, "is_sliding", False):
        layer.cumulative_length = size


def slotted(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer that have slots, by name; none where it keeps none, or has not been asked yet."""
    found = {name: getattr(layer, name, None) for name in SLOTTED}
    return {name: tensor for name, tensor in found.items() if tensor is not None and tensor.dim() > 2}


def cut_slots(layer: Any, drops: Sequence[int], size: int) -> None:
    slots = slots_of(layer, size) if slotted(layer) else 0
    set_slots(layer, {name: aligned(tensor, drops, slots) for name, tensor in slotted(layer).items()}, size)


def select_rows(layer: Any, rows: torch.Tensor, size: int) -> None:
    """Leaves these rows of a layer, the longest of which has `size` tokens."""
    if is_opaque(layer):
        if rows.tolist() != [0]:
            raise UserError(f"the rows of a {type(layer).__name__} cannot be told apart; decode them alone")
        return
    for states in (getattr(layer, name, {}) for name in STATES):
        states.update({index: state[rows] for index, state in states.items() if state is not None})
    chosen = {name: tensor[rows] for name, tensor in slotted(layer).items()}
    stay = [0] * len(rows)
    set_slots(layer, {name: aligned(each, stay, slots_of(layer, size)) for name, each in chosen.items()}, size)


def append_rows(layer: Any, other: Any, size: int) -> None:
    """Puts the rows of another layer behind those of this one, the longest of which has `size` tokens."""
    for name in STATES:
        mine, theirs = getattr(layer, name, {}), getattr(other, name, {})
        joined = {index: torch.cat([state, theirs[index]]) for index, state in mine.items() if state is not None}
        if joined:
            setattr(layer, name, mine | joined)
    states = {}
    for name, tensor in slotted(layer).items():
        both = [aligned(each, [0] * len(each), slots_of(layer, size)) for each in (tensor, getattr(other, name))]
        states[name] = torch.cat(both)
    set_slots(layer, states, size)
