"""`ChainCache`: state of targets that can follow a chain but no tree: a snapshot at committed text, and replay from it.

Recurrent states have no slots: what a rejected token did to them cannot be taken out again. So the state before a
forward is kept, the snapshot, and the forward reads

    [committed tokens that the snapshot has not seen] + [root, draft chain]

behind it. Where all of that is accepted the new state is the next snapshot; else the old one stays, and what was
accepted is read again by the next forward, which costs that it is longer, but no forward of its own. Attention layers
and convolutions remember each token apart: a target that has nothing else is cut back instead, and never reads again.

Rows of different length lie as transformers pads prompts, on the left: the newest token of each is in the last slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedConfig

from ctc_drafter.target.cache import GrowingLayer
from ctc_drafter.target.chain_layers import (
    append_rows,
    cut,
    has_recurrent_states,
    is_opaque,
    kept,
    layer_slides,
    select_rows,
    shallow,
    slotted,
)
from ctc_drafter.target.row_cache import RowCache, RowExtent
from ctc_drafter.types import TokenTree, UserError, Verification

# Unread tokens of a row beyond which its snapshot moves on.
LONGEST_REPLAY = 8


class Reader(Protocol):
    """The part of a `Target` that a cache needs."""

    @property
    def limit(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        allowed: torch.Tensor | None = None,
        *,
        layers: Sequence[int] = (),
        keep: torch.Tensor | None = None,
    ) -> Verification: ...


@dataclass
class Fed:
    """A forward that is not settled yet.

    rows: tokens of each row without padding. width: of all of them, padded on the right. before: see `kept`.
    accepted: how many of its tokens each row keeps, or None for none of any.
    """

    rows: list[list[int]]
    width: int
    before: list[dict[str, Any]]
    accepted: list[int] | None = None


class ChainCache(RowCache):
    """State of rows that are read together. seen: tokens in the snapshot of each row. unread: those committed since."""

    def __init__(self, inner: Cache, rows: int):
        self.inner = inner
        self.seen = [0] * rows
        self.unread: list[list[int]] = [[] for _ in range(rows)]
        self.fed: Fed | None = None

    @classmethod
    def empty(cls, config: PreTrainedConfig, rows: int) -> ChainCache:
        """The model's own kind of cache, before the first forward."""
        inner = DynamicCache(config=config)
        inner.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in inner.layers]
        for layer in inner.layers:
            if layer_slides(layer):
                layer.activate_past_recording()
        return cls(inner, rows)

    @property
    def replays(self) -> bool:
        """Whether rejected tokens cannot be taken out, so that a snapshot is kept and read behind again."""
        return any(is_opaque(layer) or has_recurrent_states(layer) for layer in self.inner.layers)

    # Reading

    def feed(
        self, target: Reader, rows: Sequence[list[int]], layers: Sequence[int] = (), keep: torch.Tensor | None = None
    ) -> Verification:
        """Reads tokens behind each row's snapshot, shorter rows padded with their last one; see `Target.forward`."""
        self.settle()
        width, size = max(map(len, rows)), max(self.seen)
        padded = [[*row, *[row[-1]] * (width - len(row))] for row in rows]
        seen = torch.tensor(self.seen, device=target.device).unsqueeze(1)
        positions = (seen + torch.arange(width, device=target.device)).clamp(max=target.limit - 1)
        # Without attention there is nothing to hide, and the first Mamba's single steps take no mask.
        ragged = len(set(self.seen)) > 1 and any(map(slotted, self.inner.layers))
        there = torch.arange(size + width, device=target.device) >= size - seen if ragged else None
        self.fed = Fed(list(rows), width, [kept(layer) for layer in self.inner.layers])
        tokens = torch.tensor(padded, device=target.device)
        return target.forward(tokens, positions, self.inner, there, layers=layers, keep=keep)

    def verify(self, target: Reader, tree: TokenTree, layers: Sequence[int] = ()) -> Verification:
        """See `RowCache.verify`."""
        sizes = tree.valid.sum(1).tolist()
        nodes = [row[:size] for row, size in zip(tree.tokens.tolist(), sizes, strict=True)]
        self.settle()
        if max(map(len, self.unread)) > LONGEST_REPLAY and len(set(map(len, self.unread))) > 1:
            self._catch_up(target)
        starts = [len(unread) for unread in self.unread]
        rows = [[*unread, *own] for unread, own in zip(self.unread, nodes, strict=True)]
        first, width = min(starts), max(map(len, rows))
        result = self.feed(target, rows, layers, torch.arange(first, width, device=target.device))
        columns = torch.tensor(
            [
                [start + min(node, size - 1) for node in range(tree.tokens.shape[1])]
                for start, size in zip(starts, sizes, strict=True)
            ],
            device=target.device,
        ).unsqueeze(2)
        features = result.features
        return Verification(
            result.logits.take_along_dim(columns - first, 1),
            None if features is None else features.take_along_dim(columns, 1),
        )

    def commit(self, counts: Sequence[int]) -> None:
        """See `RowCache.commit`."""
        assert self.fed is not None
        self.fed.accepted = [len(unread) + 1 + count for unread, count in zip(self.unread, counts, strict=True)]

    def take(self) -> None:
        """All tokens of the newest forward belong to their rows."""
        assert self.fed is not None
        self.fed.accepted = [len(row) for row in self.fed.rows]

    def undo(self) -> None:
        """See `RowCache.undo`."""
        if self.fed is not None:
            self.fed.accepted = None
        self.settle()

    def resting(self) -> set[int]:
        """See `RowCache.resting`. Rows that lag behind others are brought up by `_catch_up`."""
        self.settle()
        lengths = set(map(len, self.unread))
        return set(range(len(self.seen))) if len(lengths) == 1 and max(lengths) > LONGEST_REPLAY else set()

    def _catch_up(self, target: Reader) -> None:
        """Moves snapshots of several rows at once, by as many tokens as brings the most in all."""
        lengths = [len(unread) for unread in self.unread]
        step = max(set(lengths) - {0}, key=lambda size: (size * sum(length >= size for length in lengths), size))
        rows = [unread[:step] or [0] for unread in self.unread]
        self.feed(target, rows, keep=torch.zeros(1, dtype=torch.long, device=target.device))
        assert self.fed is not None
        # Of the rows that are shorter nothing is kept: what they have not read they read later.
        self.fed.accepted = [step if length >= step else 0 for length in lengths]
        rest = [unread[step:] if len(unread) >= step else unread for unread in self.unread]
        self.settle()
        self.unread = rest

    def settle(self) -> None:
        """Keeps what was accepted of the newest forward, and lets go of the rest."""
        if self.fed is None:
            return
        fed, self.fed = self.fed, None
        accepted = fed.accepted or [0] * len(self.seen)
        moves = [count if count == fed.width or not self.replays else 0 for count in accepted]
        seen = [there + count for there, count in zip(self.seen, moves, strict=True)]
        for layer, before in zip(self.inner.layers, fed.before, strict=True):
            cut(layer, before, [fed.width - count for count in moves], max(seen))
        self.seen = seen
        if fed.accepted is not None:
            spans = zip(fed.rows, moves, accepted, strict=True)
            self.unread = [row[start:end] for row, start, end in spans]
        for layer in self.inner.layers:  # convolutions of the first forward are padded only where nothing is recorded
            if hasattr(layer, "activate_past_recording") and not has_recurrent_states(layer) and any(seen):
                layer.activate_past_recording()

    # Rows

    def join(self, new: ChainCache) -> None:
        """See `RowCache.join`."""
        self.settle()
        new.settle()
        size = max(*self.seen, *new.seen)
        for layer, other in zip(self.inner.layers, new.inner.layers, strict=True):
            if is_opaque(layer):
                raise UserError(f"rows cannot join a cache with a {type(layer).__name__}; decode them alone")
            append_rows(layer, other, size)
        self.seen, self.unread = self.seen + new.seen, self.unread + new.unread

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See `RowCache.batch_select_indices`."""
        self.settle()
        rows = indices.tolist()
        self.seen, self.unread = [self.seen[row] for row in rows], [self.unread[row] for row in rows]
        for layer in self.inner.layers:
            select_rows(layer, indices, max(self.seen))

    def get_seq_length(self) -> int:
        """See `RowCache.get_seq_length`."""
        self.settle()
        return max(there + len(unread) for there, unread in zip(self.seen, self.unread, strict=True))

    def extent(self) -> ChainExtent:
        """See `RowCache.extent`."""
        self.settle()
        return ChainExtent(self.seen, self.unread, [shallow(layer) for layer in self.inner.layers])


@dataclass(frozen=True)
class ChainExtent(RowExtent):
    """The tensors before a `join`, which makes new ones."""

    seen: list[int]
    unread: list[list[int]]
    layers: list[dict[str, Any]]

    def cut(self, cache: ChainCache) -> None:
        """See `RowExtent.cut`."""
        cache.seen, cache.unread = self.seen, self.unread
        for layer, before in zip(cache.inner.layers, self.layers, strict=True):
            vars(layer).update(before)


class ApartCache(RowCache):
    """Rows that are read one by one, for models that read rows of different length wrongly when they lie together."""

    def __init__(self, rows: Sequence[ChainCache]):
        self.rows = list(rows)

    def verify(self, target: Reader, tree: TokenTree, layers: Sequence[int] = ()) -> Verification:
        """See `RowCache.verify`."""
        found = [row.verify(target, tree.rows(place, place + 1), layers) for place, row in enumerate(self.rows)]
        features = [each.features for each in found if each.features is not None]
        return Verification(torch.cat([each.logits for each in found]), torch.cat(features) if features else None)

    def commit(self, counts: Sequence[int]) -> None:
        """See `RowCache.commit`."""
        for row, count in zip(self.rows, counts, strict=True):
            row.commit([count])

    def undo(self) -> None:
        """See `RowCache.undo`."""
        for row in self.rows:
            row.undo()

    def resting(self) -> set[int]:
        """See `RowCache.resting`."""
        return {place for place, row in enumerate(self.rows) if row.resting()}

    def join(self, new: ApartCache) -> None:
        """See `RowCache.join`."""
        self.rows = self.rows + new.rows

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See `RowCache.batch_select_indices`."""
        self.rows = [self.rows[row] for row in indices.tolist()]

    def get_seq_length(self) -> int:
        """See `RowCache.get_seq_length`."""
        return max(row.get_seq_length() for row in self.rows)

    def extent(self) -> ApartExtent:
        """See `RowCache.extent`."""
        return ApartExtent(self.rows)


@dataclass(frozen=True)
class ApartExtent(RowExtent):
    """The rows before a `join`."""

    rows: list[ChainCache]

    def cut(self, cache: ApartCache) -> None:
        """See `RowExtent.cut`."""
        cache.rows = self.rows
