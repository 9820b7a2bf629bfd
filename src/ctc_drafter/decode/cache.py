"""Keeps the accepted path in the target's cache, and nothing else."""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, StaticLayer


def compact(cache: Cache, lengths: torch.Tensor, first: int, path: torch.Tensor, counts: torch.Tensor) -> None:
    """Moves the verified path behind each row's committed tokens and drops the rest.

    lengths `int64 [B]`: committed tokens per row before this step. The tree lies in slots `first` onwards,
    node i in slot `first + i`; path `int64 [B, 1+D]` and counts `int64 [B]` as in `Acceptance`. Row b's slots
    `lengths[b] .. lengths[b] + counts[b]` then hold the root and the accepted nodes, as a fresh prefill would.
    The cache keeps as many slots as the longest row needs.
    """
    steps = torch.arange(path.shape[1], device=path.device)
    source = first + path
    goal = lengths.unsqueeze(1) + torch.minimum(steps, counts.unsqueeze(1))  # padding rewrites the last node
    keep = int((lengths + counts).max()) + 1
    in_place = torch.equal(source, goal)
    for layer in cache.layers:
        if layer.keys is None:  # shares another layer's keys
            continue
        if not in_place:
            move(layer.keys, source, goal)
            move(layer.values, source, goal)
        truncate(layer, keep)


def truncate(layer: CacheLayerMixin, slots: int) -> None:
    """Keeps the first `slots` slots. A static layer keeps its tensors, and counts anew."""
    if isinstance(layer, StaticLayer):
        layer.cumulative_length.fill_(slots)
    else:
        layer.keys = layer.keys[:, :, :slots]
        layer.values = layer.values[:, :, :slots]


def erase(cache: Cache, slots: int) -> None:
    """Takes out all that lies behind the first `slots` slots, as if it had never been computed.

    Static layers hand out their free slots, too, and a mask gives them weight 0; 0 times NaN is NaN, hence the zeros.
    """
    for layer in cache.layers:
        if layer.keys is None:
            continue
        if isinstance(layer, StaticLayer):
            layer.keys[:, :, slots:] = 0
            layer.values[:, :, slots:] = 0
        truncate(layer, slots)


def move(states: torch.Tensor, source: torch.Tensor, goal: torch.Tensor) -> None:
    """Copies slots `source [B, M]` of states `[B, heads, S, dim]` to slots `goal [B, M]`, in place."""
    shape = (-1, states.shape[1], -1, states.shape[3])
    taken = states.gather(2, source[:, None, :, None].expand(shape))
    states.scatter_(2, goal[:, None, :, None].expand(shape), taken)
