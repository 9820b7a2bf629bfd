"""EAGLE at work: a context cache of committed pairs, and a tree that the layer grows behind it, depth by depth."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ctc_drafter.drafters.borrowed import Borrowed, head_logits
from ctc_drafter.drafters.context import ContextCache
from ctc_drafter.drafters.expand import expand
from ctc_drafter.drafters.layers import Rotation
from ctc_drafter.drafters.pairs import PairLayer
from ctc_drafter.drafters.sizes import LayerConfig
from ctc_drafter.types import Candidates


class PairNetwork(Protocol):
    """The part of an `EagleDrafter` that a session runs."""

    config: LayerConfig
    layer: PairLayer
    norm: nn.Module

    def fused(self, features: torch.Tensor) -> torch.Tensor: ...
    def keys_values(
        self, tokens: torch.Tensor, fused: torch.Tensor, by: Rotation, embed: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class EagleSession:
    """See `DraftSession`. Keeps keys and values of committed pairs, and the feature `[B, H]` of each newest token."""

    def __init__(self, drafter: PairNetwork, borrowed: Borrowed, batch_size: int):
        self.drafter, self.borrowed = drafter, borrowed
        like = next(drafter.layer.parameters())
        self.context = ContextCache(drafter.config, 1, batch_size, like)
        self.newest = like.new_zeros(batch_size, drafter.config.hidden_size)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.newest = self._take(self.context, self.newest, tokens, features, counts)

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        return propose(self.drafter, self.borrowed, self.context, self.newest, root, nodes, floor)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        new = self.context.empty(len(counts))
        newest = self._take(new, self.newest.new_zeros(len(counts), self.newest.shape[1]), tokens, features, counts)
        newest = torch.cat([self.newest, newest])
        self.context.join(new)
        self.newest = newest

    def select(self, rows: torch.Tensor) -> None:
        self.context.select(rows)
        self.newest = self.newest[rows]

    def _take(
        self,
        cache: ContextCache,
        newest: torch.Tensor,
        tokens: torch.Tensor,
        features: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        """Stores new pairs; newest `[B, H]`: the features of the tokens before them. Returns those of the last ones."""
        assert features is not None
        positions = cache.slots(tokens.shape[1])
        fused = torch.cat([newest.unsqueeze(1), self.drafter.fused(features)], 1)
        by = cache.rotation(positions)
        cache.store(0, positions, *self.drafter.keys_values(tokens, fused[:, :-1], by, self.borrowed.embed))
        cache.lengths = cache.lengths + counts
        return fused.gather(1, counts.view(-1, 1, 1).expand(-1, 1, fused.shape[2]))[:, 0]


def propose(
    drafter: PairNetwork,
    borrowed: Borrowed,
    cache: ContextCache,
    newest: torch.Tensor,
    root: torch.Tensor,
    nodes: int,
    floor: float = 0.0,
) -> Candidates:
    """The best prefixes after root `int64 [B]`, with the context in the cache and its last features `[B, H]`."""
    step = Rollout(drafter, borrowed, cache, newest)
    return expand(step, root, nodes=nodes, depth=drafter.config.draft_length, floor=floor)


class Rollout:
    """A `Step`: what comes after prefixes whose ancestors it was asked about before.

    states `[B, W, H]`: features of the prefixes asked last. seen `bool [B, W, M]`: which of the M nodes so far are on
    the way to each of them. Node i of a row lies in slot `lengths + i`, whatever its position.
    """

    def __init__(self, drafter: PairNetwork, borrowed: Borrowed, cache: ContextCache, newest: torch.Tensor):
        self.drafter, self.borrowed, self.cache = drafter, borrowed, cache
        self.states = newest.unsqueeze(1)
        self.seen = torch.zeros(len(newest), 1, 0, dtype=torch.bool, device=newest.device)

    def __call__(self, prefixes: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        drafter, cache = self.drafter, self.cache
        states, seen = self.states, self.seen
        batch, width, size = prefixes.shape
        if places is not None:
            states = states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[2]))
            seen = seen.gather(1, places.unsqueeze(-1).expand(-1, -1, seen.shape[2]))
        own = torch.eye(width, dtype=torch.bool, device=seen.device).expand(batch, -1, -1)
        seen = torch.cat([seen, own], 2)
        count = seen.shape[2]
        slots = cache.slots(count)[:, count - width :]
        by = cache.rotation(cache.lengths.unsqueeze(1) + size - 1)
        pairs = drafter.layer.pairs(self.borrowed.embed(prefixes[:, :, -1]).to(states.dtype), states)
        cache.store(0, slots, *drafter.layer.self_attn.keys_values(pairs, by))
        end = int(cache.lengths.max()) + count
        states = drafter.layer(states, pairs, by, *cache.read(0, end), visible(cache.lengths, seen, end))
        self.states, self.seen = states, seen
        logits = head_logits(self.borrowed.head, drafter.norm(states).flatten(0, 1))
        return logits.unflatten(0, (batch, width))


def visible(lengths: torch.Tensor, seen: torch.Tensor, end: int) -> torch.Tensor:
    """`bool [B, 1, W, end]`: each prefix sees its row's context, and its own way there."""
    count = seen.shape[2]
    node = torch.arange(end, device=seen.device) - lengths.unsqueeze(1)
    on_the_way = seen.gather(2, node.clamp(0, count - 1).unsqueeze(1).expand(-1, seen.shape[1], -1))
    return ((node < 0).unsqueeze(1) | (on_the_way & (node < count).unsqueeze(1))).unsqueeze(1)
