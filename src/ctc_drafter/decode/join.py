"""Puts new rows into a cache behind those that are there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ctc_drafter.layout import GrowingLayer
from ctc_drafter.types import UserError


def join(cache: Cache, new: Cache) -> None:
    """Appends the rows of `new`; the shorter ones' missing slots lie beyond their length, where masks hide them."""
    for layer, other in zip(cache.layers, new.layers, strict=True):
        if layer.keys is None:  # shares another layer's keys
            continue
        if layer.is_sliding:  # its slots are no positions
            raise UserError(f"rows cannot join a cache with a {type(layer).__name__}; decode them in batches instead")
        put(layer, stacked(layer.keys, other.keys), stacked(layer.values, other.values))
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.copy_(torch.maximum(layer.cumulative_length, other.cumulative_length))


@dataclass(frozen=True)
class Extent:
    """What a cache holds. rows; slots: of each layer; used: of each layer that counts its slots in a tensor."""

    rows: int
    slots: tuple[int, ...]
    used: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, cache: Cache) -> Extent:
        held = [layer for layer in cache.layers if layer.keys is not None]
        used = (layer.cumulative_length.clone() if isinstance(layer, StaticLayer) else None for layer in held)
        return cls(held[0].keys.shape[0], tuple(layer.keys.shape[2] for layer in held), tuple(used))

    def cut(self, cache: Cache) -> None:
        """Takes out what has come since, such as the rows of a `join` that memory did not suffice for."""
        held = [layer for layer in cache.layers if layer.keys is not None]
        for layer, slots, used in zip(held, self.slots, self.used, strict=True):
            if layer.keys.shape[0] == self.rows:  # the join did not come as far
                continue
            put(layer, *(copied(states[: self.rows, :, :slots]) for states in (layer.keys, layer.values)))
            if used is not None:
                layer.cumulative_length.copy_(used)


def copied(states: torch.Tensor) -> torch.Tensor:
    """Apart from the larger tensor that it is a view of, which can go then; the view where memory is too short."""
    try:
        return states.clone(memory_format=torch.contiguous_format)
    except torch.OutOfMemoryError:
        return states


def put(layer: CacheLayerMixin, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Lets a layer hold these."""
    if isinstance(layer, GrowingLayer):
        layer.hold(keys, values)
    else:
        layer.keys, layer.values = keys, values
    if isinstance(layer, StaticLayer):
        layer.max_cache_len = keys.shape[2]


def stacked(states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Both `[B, heads, S, dim]`, one behind the other, filled up with zeros to the same number of slots."""
    slots = max(states.shape[2], new.shape[2])
    return torch.cat([pad(part, (0, 0, 0, slots - part.shape[2])) for part in (states, new)])
