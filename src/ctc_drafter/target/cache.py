"""KV cache operations: growing and static layers, compaction, joining and removing rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ctc_drafter.types import UserError

# Appends new rows to a cache.


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
    """Size of a cache. rows; slots: of each layer; used: of each layer that counts its slots in a tensor."""

    rows: int
    slots: tuple[int, ...]
    used: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, cache: Cache) -> Extent:
        held = [layer for layer in cache.layers if layer.keys is not None]
        used = (layer.cumulative_length.clone() if isinstance(layer, StaticLayer) else None for layer in held)
        return cls(held[0].keys.shape[0], tuple(layer.keys.shape[2] for layer in held), tuple(used))

    def cut(self, cache: Cache) -> None:
        """Removes everything added since, such as the rows of a `join` that ran out of memory."""
        held = [layer for layer in cache.layers if layer.keys is not None]
        for layer, slots, used in zip(held, self.slots, self.used, strict=True):
            if layer.keys.shape[0] == self.rows:  # the join did not come as far
                continue
            put(layer, *(copied(states[: self.rows, :, :slots]) for states in (layer.keys, layer.values)))
            if used is not None:
                layer.cumulative_length.copy_(used)


def copied(states: torch.Tensor) -> torch.Tensor:
    """A copy that does not keep the larger tensor alive; the view itself where memory is too short."""
    try:
        return states.clone(memory_format=torch.contiguous_format)
    except torch.OutOfMemoryError:
        return states


def put(layer: CacheLayerMixin, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Sets the keys and values of a layer."""
    if isinstance(layer, GrowingLayer):
        layer.set(keys, values)
    else:
        layer.keys, layer.values = keys, values
    if isinstance(layer, StaticLayer):
        layer.max_cache_len = keys.shape[2]


def stacked(states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Both `[B, heads, S, dim]`, one behind the other, filled up with zeros to the same number of slots."""
    slots = max(states.shape[2], new.shape[2])
    return torch.cat([pad(part, (0, 0, 0, slots - part.shape[2])) for part in (states, new)])


# Compaction: keeps only the accepted path in the target's cache.


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
    """Erases everything behind the first `slots` slots, as if it had never been computed.

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


# A cache of fixed tensors that are written in place, for kernels and compilers that want stable addresses.

BLOCK = 256  # slots; sizes are multiples of it


class GrowableStaticLayer(StaticLayer):
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
    """An empty cache of `GrowableStaticLayer`s with that many slots or more; call `reserve` before each forward."""
    return Cache(layers=[GrowableStaticLayer(slots) for _ in range(layers)])


def reserve(cache: Cache, tokens: int) -> int:
    """Makes room for `tokens` more in every layer; returns the slots that a mask must cover."""
    slots = cache.get_seq_length() + tokens
    for layer in cache.layers:
        layer.reserve(slots)
    return cache.layers[0].max_cache_len


GROWTH = 256  # slots that a cache adds at a time


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new keys and values behind the old ones instead of copying both to a longer tensor.

    `keys` and `values` are views of the slots in use. Who replaces them (crops, reorders, selects rows) need not know:
    what no longer lies where it should is copied once.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.buffers = [self.keys, self.values]

    def set(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes these in place of its own, which are let go at once."""
        self.keys, self.values = keys, values
        self.buffers = [keys, values]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.is_initialized:
            self.set(self.keys, self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        start, room = old.shape[2], self.buffers[which]
        end = start + new.shape[2]
        if end > room.shape[2] or old.data_ptr() != room.data_ptr() or old.shape[0] != room.shape[0]:
            slots = -(-end // GROWTH) * GROWTH
            room = self.buffers[which] = new.new_empty(new.shape[0], new.shape[1], slots, new.shape[3])
            room[:, :, :start] = old
        room[:, :, start:end] = new
        return room[:, :, :end]
