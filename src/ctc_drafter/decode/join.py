"""Puts new rows into a cache behind those that are there."""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer

from ctc_drafter.types import UserError


def join(cache: Cache, new: Cache) -> None:
    """Appends the rows of `new`; the shorter ones' missing slots lie beyond their length, where masks hide them."""
    for layer, other in zip(cache.layers, new.layers, strict=True):
        if layer.keys is None:  # shares another layer's keys
            continue
        if not isinstance(layer, DynamicLayer) or layer.is_sliding:  # slots are positions in neither
            raise UserError(f"rows cannot join a cache with a {type(layer).__name__}; decode them in batches instead")
        layer.keys = stacked(layer.keys, other.keys)
        layer.values = stacked(layer.values, other.values)


def stacked(states: torch.Tensor, new: torch.Tensor, slots: int = 2, rows: int = 0) -> torch.Tensor:
    """Both, one behind the other in dimension `rows`, filled up with zeros to the same length in `slots`."""
    size = max(states.shape[slots], new.shape[slots])
    filled = [pad(part, [0, 0] * (part.dim() - 1 - slots) + [0, size - part.shape[slots]]) for part in (states, new)]
    return torch.cat(filled, rows)
