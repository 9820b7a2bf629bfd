"""KV cache operations: growing and static layers, compaction, joining and removing rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ctc_drafter.target.row_cache import RowCache, RowExtent
from ctc_drafter.types import UserError

# Appends new rows to a cache.


def join(cache: Cache | RowCache, new: Cache | RowCache) -> None:
    """Appends the rows of `new`; the shorter ones' missing slots lie beyond their length, where masks hide them."""
    if isinstance(cache, RowCache):
        cache.join(new)
        return
    assert not isinstance(new, RowCache)
    for layer, other in zip(cache.layers, new.layers, strict=True):
        if layer.keys is None:  # shares another layer's keys
            continue
        if layer.is_sliding:  # its slots are no positions
            raise UserError(f"rows cannot join a cache with a {type(layer).__name__}; decode them in batches instead")
        put(layer, stacked(layer.keys, other.keys), stacked(layer.values, other.values))
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.copy_(torch.maximum(layer.cumulative_length, other.cumulative_length))


def extent(cache: Cache | RowCache) -> Extent | RowExtent:
    """The size of a cache, which a `join` may be cut back to."""
    return cache.extent() if isinstance(cache, RowCache) else Extent.of(cache)


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


# Rows that leave and come in place, for batches that stay full for long.


def keep_rows(cache: Cache | RowCache, order: Sequence[int]) -> None:
    """Leaves these rows, in this order: place p then holds what was row `order[p]`. See `gap_free_order`."""
    if isinstance(cache, RowCache):
        cache.batch_select_indices(torch.tensor(order))
        return
    for layer in cache.layers:
        if layer.keys is None:  # shares another layer's keys
            continue
        if isinstance(layer, GrowingLayer):
            layer.keep_rows(order)
        else:
            layer.batch_select_indices(torch.tensor(order, device=layer.keys.device))


def gap_free_order(places: Sequence[int]) -> list[int]:
    """These rows in an order that fills the gaps with the last ones, so that few rows move."""
    kept, count = set(places), len(places)
    behind = [place for place in places if place >= count]
    return [place if place in kept else behind.pop() for place in range(count)]


def add_rows(cache: Cache | RowCache, new: Cache | RowCache) -> None:
    """As `join`; growing layers write into the room of rows that have left, and copy the others only to grow."""
    if isinstance(cache, RowCache) or not takes_places(cache):
        join(cache, new)
        return
    assert not isinstance(new, RowCache)
    for layer, other in zip(cache.layers, new.layers, strict=True):
        if layer.keys is not None:
            layer.add_rows(other.keys, other.values)


def keeps_all(cache: Cache) -> bool:
    """Whether every layer holds each token's keys and values in a slot of its own."""
    return all(isinstance(layer, GrowingLayer | GrowableStaticLayer) for layer in cache.layers)


def filled(cache: Cache, other: Cache, rows: int, slots: int) -> Cache:
    """Fills an empty cache with the first slots of another one's only row, `rows` times."""
    for index, layer in enumerate(other.layers):
        if layer.keys is not None:
            states = (each[:, :, :slots].expand(rows, -1, -1, -1) for each in (layer.keys, layer.values))
            cache.update(*states, index)
    return cache


# Compaction: keeps only the accepted path in the target's cache.


def compact(
    cache: Cache | RowCache, lengths: torch.Tensor, first: int, path: torch.Tensor, counts: torch.Tensor
) -> None:
    """Moves the verified path behind each row's committed tokens and drops the rest.

    lengths `int64 [B]`: committed tokens per row before this step. The tree lies in slots `first` onwards,
    node i in slot `first + i`; path `int64 [B, 1+D]` and counts `int64 [B]` as in `Acceptance`. Row b's slots
    `lengths[b] .. lengths[b] + counts[b]` then hold the root and the accepted nodes, as a fresh prefill would.
    The cache keeps as many slots as the longest row needs.
    """
    if isinstance(cache, RowCache):
        cache.commit(counts.tolist())
        return
    steps = torch.arange(path.shape[1], device=path.device)
    source = first + path
    goal = lengths.unsqueeze(1) + torch.minimum(steps, counts.unsqueeze(1))  # padding rewrites the last node
    keep = int((lengths + counts).max()) + 1
    rows, columns = (source != goal).nonzero(as_tuple=True)
    moves = rows, source[rows, columns], goal[rows, columns]
    for layer in cache.layers:
        if layer.keys is None:  # shares another layer's keys
            continue
        if len(rows):
            move(layer.keys, *moves)
            move(layer.values, *moves)
        truncate(layer, keep)


def truncate(layer: CacheLayerMixin, slots: int) -> None:
    """Keeps the first `slots` slots. A static layer keeps its tensors, and counts anew."""
    if isinstance(layer, StaticLayer):
        layer.cumulative_length.fill_(slots)
    elif layer.keys.shape[2] > slots:
        layer.keys = layer.keys[:, :, :slots]
        layer.values = layer.values[:, :, :slots]


def shorten(cache: Cache, slots: int) -> None:
    """Keeps the first `slots` slots of every layer."""
    for layer in cache.layers:
        if layer.keys is not None:
            truncate(layer, slots)


def erase(cache: Cache | RowCache, slots: int) -> None:
    """Erases everything behind the first `slots` slots, as if it had never been computed.

    Free slots may be handed out, too, and a mask gives them weight 0; 0 times NaN is NaN, hence the zeros.
    """
    if isinstance(cache, RowCache):
        cache.undo()
        return
    for layer in cache.layers:
        if layer.keys is None:
            continue
        layer.keys[:, :, slots:] = 0
        layer.values[:, :, slots:] = 0
        truncate(layer, slots)


def move(states: torch.Tensor, rows: torch.Tensor, source: torch.Tensor, goal: torch.Tensor) -> None:
    """Copies slot `source[i]` of row `rows[i]` of states `[B, heads, S, dim]` to its slot `goal[i]`, in place; all
    `int64 [M]`.

    Only these slots are touched: `scatter_` copies all of a view that is not contiguous, there and back.
    """
    rows, source, goal = (index.to(states.device) for index in (rows, source, goal))
    states[rows, :, goal] = states[rows, :, source]


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
            indices = indices.to(self.keys.device)
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


@dataclass(frozen=True)
class Places:
    """Slots `int64 [B, T]` for the new tokens of each row, the rows' own numbers `int64 [B, 1]`, and the last slot of
    all, and one."""

    rows: torch.Tensor
    slots: torch.Tensor
    end: int


@contextmanager
def placed(cache: Cache, slots: torch.Tensor, end: int) -> Iterator[None]:
    """While open, new keys and values go to these slots `int64 [B, T]`, all of them below `end`, and not behind the
    longest row: rows of different lengths then need no moves. Of `GrowingLayer`s alone, see `takes_places`."""
    places = Places(torch.arange(len(slots), device=slots.device).unsqueeze(1), slots, end)
    for layer in cache.layers:
        layer.places = places
    try:
        yield
    finally:
        for layer in cache.layers:
            layer.places = None


def takes_places(cache: Cache) -> bool:
    """Whether all layers write where `placed` says."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new keys and values behind the old ones instead of copying both to a longer tensor.

    `keys` and `values` are views of the slots in use. Who replaces them (crops, reorders, selects rows) need not know:
    what no longer lies where it should is copied once. places: where the next ones go instead, see `placed`.
    """

    places: Places | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.buffers = [self.keys, self.values]

    def set(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes these in place of its own, which are let go at once."""
        self.keys, self.values = keys, values
        self.buffers = [keys, values]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices.to(self.keys.device))
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
        rows, start = old.shape[0], old.shape[2]
        end = start + new.shape[2] if self.places is None else max(start, self.places.end)
        room = self._room(which, old, rows, end)
        if self.places is None:
            room[:rows, :, start:end] = new
        else:
            room[:rows, :, start:end] = 0  # some rows do not come as far, and what a mask hides must be a number
            rows_of, slots = self.places.rows.to(room.device), self.places.slots.to(room.device)
            room[rows_of, :, slots] = new.transpose(1, 2)
        return room[:rows, :, :end]

    def _room(self, which: int, old: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
        """The buffer that `old` lies in, or a larger copy, with room for so many rows and slots."""
        room = self.buffers[which]
        if slots > room.shape[2] or old.data_ptr() != room.data_ptr() or not old.shape[0] <= rows <= room.shape[0]:
            slots = -(-slots // GROWTH) * GROWTH
            room = self.buffers[which] = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
            room[: old.shape[0], :, : old.shape[2]] = old
        return room

    def keep_rows(self, order: Sequence[int]) -> None:
        """See `cache.keep_rows`. Rows that move come from behind the last place that is kept."""
        for states in (self.keys, self.values):
            for place, row in enumerate(order):
                if place != row:
                    states[place] = states[row]
        self.keys, self.values = self.keys[: len(order)], self.values[: len(order)]

    def add_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `cache.add_rows`; keys and values `[R, heads, S, dim]`."""
        self.keys = self._add_rows(0, self.keys, keys)
        self.values = self._add_rows(1, self.values, values)

    def _add_rows(self, which: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        there, width, own = old.shape[0], old.shape[2], new.shape[2]
        rows, slots = there + new.shape[0], max(width, own)
        room = self._room(which, old, rows, slots)
        # What a mask hides has weight 0, and 0 times NaN is NaN: nothing of a row that has left may stay.
        room[:there, :, width:slots] = 0
        room[there:rows, :, own:slots] = 0
        room[there:rows, :, :own] = new
        return room[:rows, :, :slots]
