"""Puts new rows into a cache behind those that are there."""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ctc_drafter.layout import GrowingLayer
from ctc_drafter.types import UserError


def join(cache: Cache, new: Cache) -> None:
    """Appends the rows of `new`; the shorter ones' missing slots lie beyond their length, where masks hide them."""
    for layer, other in zip(cache.layers, new.layers, strict=True):
        if layer.keys is None:  # shares another layer's keys
            continue
        if layer.is_sliding:  # its slots are no positions
            raise UserError(f"rows cannot join a cache with a {type(layer).__name__}; decode them in batches instead")
        keys, values = stacked(layer.keys, other.keys), stacked(layer.values, other.values)
        if isinstance(layer, GrowingLayer):
            layer.hold(keys, values)
        else:
            layer.keys, layer.values = keys, values
        if isinstance(layer, StaticLayer):
            layer.max_cache_len = layer.keys.shape[2]
            layer.cumulative_length.copy_(torch.maximum(layer.cumulative_length, other.cumulative_length))


def stacked(states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Both `[B, heads, S, dim]`, one behind the other, filled up with zeros to the same number of slots."""
    slots = max(states.shape[2], new.shape[2])
    return torch.cat([pad(part, (0, 0, 0, slots - part.shape[2])) for part in (states, new)])
