"""A block drafter at work on one batch: its context keys and values stay cached between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ctc_drafter.drafters.borrowed import Borrowed
from ctc_drafter.drafters.context import ContextCache, ContextSession
from ctc_drafter.drafters.layers import Context, DraftLayer, Rotation, newest_states
from ctc_drafter.drafters.sizes import BlockConfig
from ctc_drafter.types import Candidates


class BlockNetwork(Protocol):
    """The part of a `BlockModel` that a session runs."""

    config: BlockConfig

    @property
    def frames(self) -> int: ...
    @property
    def draft_layers(self) -> list[DraftLayer]: ...
    def context_states(self, features: torch.Tensor) -> torch.Tensor: ...
    def block_states(self, root: torch.Tensor, newest: torch.Tensor, embed: nn.Module) -> torch.Tensor: ...
    def run_layers(
        self, states: torch.Tensor, by: Rotation, contexts: Sequence[Context], mask: torch.Tensor | None
    ) -> torch.Tensor: ...
    def candidates(
        self, blocks: torch.Tensor, root: torch.Tensor, borrowed: Borrowed, nodes: int, floor: float = 0.0
    ) -> Candidates: ...


class BlockSession(ContextSession):
    """Slot s of a row holds the keys and values of the token at position s; blocks are written behind them."""

    def __init__(self, drafter: BlockNetwork, borrowed: Borrowed, batch_size: int):
        self.drafter, self.borrowed = drafter, borrowed
        weight = drafter.draft_layers[0].self_attn.k_proj.weight
        self.context = ContextCache(drafter.config, len(drafter.draft_layers), batch_size, weight)
        self.newest = weight.new_zeros(batch_size, drafter.config.hidden_size)

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        """One parallel pass over the block, then the search; see `DraftSession.propose`."""
        return self.drafter.candidates(self.blocks(root), root, self.borrowed, nodes, floor)

    def blocks(self, root: torch.Tensor) -> torch.Tensor:
        """Block outputs `[B, 1+F, H]` of root `int64 [B]`."""
        cache = self.context
        positions = cache.slots(1 + self.drafter.frames)
        end = cache.end
        mask = None
        if len(root) > 1:
            seen = torch.arange(end, device=root.device) <= positions[:, -1:]
            mask = seen[:, None, None, :].expand(-1, 1, positions.shape[1], -1)

        def context(index: int) -> Context:
            def join(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                cache.store(index, positions, keys, values)
                return cache.read(index, end)

            return join

        states = self.drafter.block_states(root, self.newest, self.borrowed.embed)
        contexts = [context(index) for index in range(len(self.drafter.draft_layers))]
        return self.drafter.run_layers(states, cache.rotation(positions), contexts, mask)

    def _take(self, cache: ContextCache, features: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
        """Returns the context states of the newest tokens, `[B, H]`; any, if the drafter does not carry them."""
        assert features is not None
        positions = cache.slots(features.shape[1])
        by = cache.rotation(positions)
        states = self.drafter.context_states(features)
        for index, layer in enumerate(self.drafter.draft_layers):
            cache.store(index, positions, *layer.self_attn.keys_values(states, by))
        cache.lengths = cache.lengths + counts
        return newest_states(states, counts.unsqueeze(1)).squeeze(1) if self.drafter.config.carry else states[:, 0]
