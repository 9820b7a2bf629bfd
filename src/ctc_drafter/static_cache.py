"""A cache of fixed tensors that are written in place, for kernels and compilers that want stable addresses."""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

BLOCK = 256  # slots; sizes are multiples of it


class RoomyLayer(StaticLayer):
    """A `StaticLayer` that keeps every token, gives up rows of the batch, and moves to a larger tensor when full.

    transformers' own `StaticCache` drops what leaves a sliding window, which a rejected tree may need back, and
    fails when a tree does not fit behind the last token.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, slots: int) -> None:
        super().__init__(max_cache_len=0)
        self.reserve(slots)

    def get_seq_length(self) -> int:
        """Slots in use, as a number: the counter itself is changed in place by the next forward."""
        return int(self.cumulative_length) if self.is_initialized else 0

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` tokens in all; doubles, so that addresses seldom change."""
        if slots <= self.max_cache_len:
            return
        missing = -(-max(slots, 2 * self.max_cache_len) // BLOCK) * BLOCK - self.max_cache_len
        self.max_cache_len += missing
        if self.keys is not None and self.values is not None:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, missing))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]


def static_cache(layers: int, slots: int) -> Cache:
    """An empty cache of `RoomyLayer`s with that many slots or more; call `reserve` before each forward."""
    return Cache(layers=[RoomyLayer(slots) for _ in range(layers)])


def reserve(cache: Cache, tokens: int) -> int:
    """Makes room for `tokens` more in every layer; returns the slots that a mask must cover."""
    slots = cache.get_seq_length() + tokens
    for layer in cache.layers:
        layer.reserve(slots)
    return cache.layers[0].max_cache_len
