"""The CTC drafter at work on one batch: its context keys and values stay cached between steps."""

from __future__ import annotations

import torch

from ctc_drafter.drafters.block import BlockModel
from ctc_drafter.drafters.borrowed import Borrowed
from ctc_drafter.drafters.layers import Context, Rotation
from ctc_drafter.types import Candidates

GROWTH = 256  # slots added at a time


class CTCSession:
    """Slot s of a row holds the keys and values of the token at position s; blocks are written behind them."""

    def __init__(self, drafter: BlockModel, borrowed: Borrowed, batch_size: int):
        weight, config = drafter.fc.weight, drafter.config
        self.drafter, self.borrowed = drafter, borrowed
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        shape = (config.num_hidden_layers, 2, batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.cache = weight.new_zeros(shape)
        self.turns = drafter.rotation(torch.zeros(1, 0, dtype=torch.long, device=weight.device))

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Projects the features of new committed tokens once; see `DraftSession.extend`."""
        assert features is not None
        positions = self._slots(features.shape[1])
        by = self._rotation(positions)
        states = self.drafter.context_states(features)
        for index, layer in enumerate(self.drafter.draft_layers):
            self._store(index, positions, *layer.self_attn.keys_values(states, by))
        self.lengths = self.lengths + counts

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        """One parallel pass over the block, then the prefix search; see `DraftSession.propose`."""
        positions = self._slots(1 + self.drafter.config.frames)
        end = int(self.lengths.max()) + positions.shape[1]
        mask = None
        if len(root) > 1:
            seen = torch.arange(end, device=root.device) <= positions[:, -1:]
            mask = seen[:, None, None, :].expand(-1, 1, positions.shape[1], -1)

        def context(index: int) -> Context:
            def join(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                self._store(index, positions, keys, values)
                return self.cache[index, 0, :, :, :end], self.cache[index, 1, :, :, :end]

            return join

        states = self.borrowed.embed(self.drafter.block_tokens(root)).to(self.cache.dtype)
        contexts = [context(index) for index in range(len(self.drafter.layers))]
        blocks = self.drafter.run_layers(states, self._rotation(positions), contexts, mask)
        return self.drafter.candidates(blocks, root, self.borrowed, nodes, floor)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        lengths, cache = self.lengths, self.cache
        shape = list(cache.shape)
        shape[2] = len(counts)
        self.lengths, self.cache = torch.zeros_like(counts), cache.new_zeros(shape)
        self.extend(tokens, features, counts)
        missing = self.cache.shape[4] - cache.shape[4]
        self.cache = torch.cat([torch.nn.functional.pad(cache, (0, 0, 0, missing)), self.cache], 2)
        self.lengths = torch.cat([lengths, self.lengths])

    def select(self, rows: torch.Tensor) -> None:
        self.lengths, self.cache = self.lengths[rows], self.cache[:, :, rows]

    def _slots(self, count: int) -> torch.Tensor:
        """The next `count` positions of each row, `int64 [B, count]`, with room for them in the cache."""
        positions = self.lengths.unsqueeze(1) + torch.arange(count, device=self.lengths.device)
        missing = int(self.lengths.max()) + count - self.cache.shape[4]
        if missing > 0:
            shape = list(self.cache.shape)
            shape[4] = -(-missing // GROWTH) * GROWTH
            self.cache = torch.cat([self.cache, self.cache.new_zeros(shape)], 4)
            slots = torch.arange(self.cache.shape[4], device=positions.device).unsqueeze(0)
            self.turns = self.drafter.rotation(slots)
        return positions

    def _rotation(self, positions: torch.Tensor) -> Rotation:
        """`rotation` of positions `int64 [B, T]`, looked up."""
        cosines, sines = self.turns
        if len(positions) == 1:
            start, count = int(positions[0, 0]), positions.shape[1]
            return cosines[:, :, start : start + count], sines[:, :, start : start + count]
        return cosines[0, 0, positions].unsqueeze(1), sines[0, 0, positions].unsqueeze(1)

    def _store(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        index = positions[:, None, :, None].expand_as(keys)
        self.cache[layer, 0].scatter_(2, index, keys)
        self.cache[layer, 1].scatter_(2, index, values)
