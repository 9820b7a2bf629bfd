"""Keys and values of committed tokens, cached between the steps of a session."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.nn.functional import pad

from ctc_drafter.drafters.layers import Rotation, rotation
from ctc_drafter.drafters.sizes import LayerConfig

GROWTH = 256  # slots added at a time


class ContextCache:
    """Slot s of a row holds the keys and values of the token at position s, for each of `layers` draft layers.

    lengths `int64 [B]`: tokens that are in. What lies beyond is garbage, for drafts to write over. end: the last slot
    that `slots` gave out, and one.
    """

    def __init__(self, config: LayerConfig, layers: int, batch_size: int, like: torch.Tensor):
        self.config = config
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self.states = like.new_zeros(layers, 2, batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.turns, self.end = self._turns(0), 0

    def slots(self, count: int) -> torch.Tensor:
        """The next `count` positions of each row, `int64 [B, count]`, with room for them."""
        positions = self.lengths.unsqueeze(1) + torch.arange(count, device=self.lengths.device)
        self.end = int(self.lengths.max()) + count  # asked of a GPU once a step
        missing = self.end - self.states.shape[4]
        if missing > 0:
            shape = list(self.states.shape)
            shape[4] = -(-missing // GROWTH) * GROWTH
            self.states = torch.cat([self.states, self.states.new_zeros(shape)], 4)
            self.turns = self._turns(self.states.shape[4])
        return positions

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """`rotation` of positions `int64 [B, T]`, looked up."""
        cosines, sines = self.turns
        if len(positions) == 1:
            start, count = int(positions[0, 0]), positions.shape[1]
            return cosines[:, :, start : start + count], sines[:, :, start : start + count]
        return cosines[0, 0, positions].unsqueeze(1), sines[0, 0, positions].unsqueeze(1)

    def store(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values `[B, kv_heads, T, dim]` into slots `int64 [B, T]`."""
        index = positions[:, None, :, None].expand_as(keys)
        self.states[layer, 0].scatter_(2, index, keys)
        self.states[layer, 1].scatter_(2, index, values)

    def read(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, kv_heads, end, dim]` of the first slots."""
        return self.states[layer, 0, :, :, :end], self.states[layer, 1, :, :, :end]

    def empty(self, batch_size: int) -> ContextCache:
        """A new one of the same sizes for other rows."""
        return ContextCache(self.config, len(self.states), batch_size, self.states)

    def join(self, other: ContextCache) -> None:
        """Puts the rows of another one behind these; all of them or, where memory does not suffice, none."""
        longest = max(self, other, key=lambda each: each.states.shape[4])
        slots = longest.states.shape[4]
        both = [pad(each.states, (0, 0, 0, slots - each.states.shape[4])) for each in (self, other)]
        states, lengths = torch.cat(both, 2), torch.cat([self.lengths, other.lengths])
        self.states, self.lengths, self.turns = states, lengths, longest.turns

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only these rows, `int64 [R]`."""
        self.lengths, self.states = self.lengths[rows], self.states[:, :, rows]

    def _turns(self, slots: int) -> Rotation:
        positions = torch.arange(slots, device=self.lengths.device).unsqueeze(0)
        return rotation(positions, self.config.head_dim, self.config.rope_theta, self.states.dtype)


class ContextSession(ABC):
    """A `DraftSession` with a context cache of committed text and a state of each row's newest token, `[B, H]`."""

    context: ContextCache
    newest: torch.Tensor

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Takes new committed tokens in once; see `DraftSession.extend`."""
        self.newest = self._take(self.context, features, counts)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        new = self.context.empty(len(counts))
        newest = torch.cat([self.newest, self._take(new, features, counts)])
        self.context.join(new)
        self.newest = newest

    def select(self, rows: torch.Tensor) -> None:
        """See `DraftSession.select`."""
        self.context.select(rows)
        self.newest = self.newest[rows]

    @abstractmethod
    def _take(self, cache: ContextCache, features: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
        """Stores new tokens in the cache; returns the states of the newest ones, `[B, H]`."""
