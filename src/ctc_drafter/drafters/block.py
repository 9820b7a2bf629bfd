"""`BlockModel` and `BlockSession`: one parallel pass over a block of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ctc_drafter.drafters.base import Committed, DraftSession
from ctc_drafter.drafters.layers import (
    Context,
    ContextSession,
    CosSin,
    DraftKVCache,
    DraftLayer,
    LayerConfig,
    RMSNorm,
    cos_sin,
    newest_states,
)
from ctc_drafter.drafters.lm_head import DraftHead, head_logits
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.types import Candidates, UserError

# The network of block drafters: one parallel pass over a block fills F frames.
#
# A block is [embedding of the root, F masks] at the positions of the tokens they may become. It attends to itself
# and to projections of the target's features for every committed token. Embeddings and LM head are the target's.

# Entries of the masks of a batch that exist at a time. A CPU's kernel makes floats of them: 256 MB.
MASK_AT_A_TIME = 2**26


class BlockConfig(LayerConfig):
    """A drafter that fills a block of masks.

    Args:
        mask_token_id: vocabulary token whose embedding stands in every frame of the block.
        carry: whether a map of the newest committed token's context state is added to every place of the block.
        carry_rank: rank of what that map has beside for each place alone, 0 for nothing (`Carry`).
        carry_root: whether a map of the root's embedding, of its own and of the same rank, is added likewise.
        convolution: whether convolutions mix neighbouring places of the block (`drafters/convolution.py`).
    """

    model_type = "block_drafter"

    mask_token_id: int = 0
    carry: bool = False
    carry_rank: int = 0
    carry_root: bool = False
    convolution: bool = False

    def check(self) -> None:
        super().check()
        if self.carry_rank < 0:
            raise UserError(f"carry_rank is {self.carry_rank}; give a rank, or 0 for one map for all places")
        if self.carry_rank and not self.carry:
            raise UserError(f"carry_rank is {self.carry_rank} without carry; set carry, or carry_rank to 0")
        if self.carry_root and not self.carry:
            raise UserError("carry_root is set without carry; set both, or none")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"mask_token_id {self.mask_token_id} must lie below vocab_size ({self.vocab_size})")


class Carry(nn.Linear):
    """What a vector adds to the places of a block: the newest committed token's context state, or the root's embedding.

    One map for all places; with a rank also a vector and a map of that rank for each place, which start at zero. The
    masks of a block are alike, so that without them its frames differ by their rotary positions alone. Heads that
    share no map, as Medusa's (Cai et al., 2024), are the case of full rank.
    """

    def __init__(self, size: int, places: int, rank: int):
        super().__init__(size, size, bias=False)
        self.down = nn.Linear(size, rank, bias=False) if rank else None
        self.up = nn.Parameter(torch.zeros(places, rank, size)) if rank else None
        self.own = nn.Parameter(torch.zeros(places, size)) if rank else None

    def forward(self, carried: torch.Tensor, places: int | None = None) -> torch.Tensor:
        """`[..., P, H]` of carried `[..., H]`, for the first `places`, by default all; P is 1 if all get the same."""
        shared = super().forward(carried).unsqueeze(-2)
        if self.down is None or self.up is None or self.own is None:
            return shared
        apart = torch.einsum("...r,prh->...ph", self.down(carried), self.up[:places])
        return shared + self.own[:places] + apart


class BlockModel(TrainableDrafter):
    """Draft layers: from target features to block outputs. Concrete drafters add what reads them."""

    config_class = BlockConfig
    config: BlockConfig

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        features = config.hidden_size * len(config.target_layer_ids)
        self.fc = nn.Linear(features, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config, config.convolution) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        carry = config.hidden_size, 1 + self.frames, config.carry_rank
        self.carry = Carry(*carry) if config.carry else None
        self.carry_root = Carry(*carry) if config.carry_root else None

    @property
    def frames(self) -> int:
        """Masks of a block: a frame for each drafted token."""
        return self.config.draft_length

    @property
    def draft_layers(self) -> list[DraftLayer]:
        return cast(list[DraftLayer], list(self.layers))

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""
        return BlockSession(self, self.prepared(embed, head), batch_size)

    @torch.no_grad()
    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """The last norm starts as the target's. Of the root nothing is carried at first, so that a drafter that was
        trained without goes on as it was."""
        if norm_scale is not None:
            self.norm.weight.copy_(norm_scale)
        if self.carry_root is not None:
            self.carry_root.weight.zero_()

    def context_states(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[B, T, K]` to what the draft layers attend to, `[B, T, H]`."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    def block_tokens(self, root: torch.Tensor) -> torch.Tensor:
        """root `int64 [...]` to the block's input `[..., 1+F]`: the root, then masks."""
        block = root.new_full((*root.shape, 1 + self.frames), self.config.mask_token_id)
        block[..., 0] = root
        return block

    def block_states(self, root: torch.Tensor, newest: torch.Tensor, embed: nn.Module) -> torch.Tensor:
        """What goes into the layers, `[..., 1+F, H]`, of root `int64 [...]` and the context state of the token before
        it, `[..., H]`. What both say of the next tokens need not pass through attention then."""
        states = embed(self.block_tokens(root)).to(self.fc.weight.dtype)
        first = states[..., 0, :]
        if self.carry is not None:
            states = states + self.carry(newest, 1 + self.frames)
        return states if self.carry_root is None else states + self.carry_root(first, 1 + self.frames)

    def rotation(self, positions: torch.Tensor) -> CosSin:
        return cos_sin(positions, self.config.head_dim, self.config.rope_theta, self.fc.weight.dtype)

    def run_layers(
        self, states: torch.Tensor, rotary: CosSin, contexts: Sequence[Context], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Block states `[B, T, H]` through all layers and the last norm."""
        for layer, context in zip(self.draft_layers, contexts, strict=True):
            states = layer(states, rotary, context, mask, 1 + self.frames)  # fewer in `bench --depths`
        return self.norm(states)

    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """Block outputs `[B, A, 1+F, H]` at many anchors at once, for training.

        features `[B, T, K]` and tokens `int64 [B, T]` of right-padded rows; anchors `int64 [B, A]`. The block
        of anchor p has root `tokens[p]` and sees the features of the tokens before p, and itself.

        Anchors go through the layers some at a time, so that no more than `MASK_AT_A_TIME` is held of their masks, and
        if they do, again in the backward pass.
        """
        length = tokens.shape[1]
        slots = torch.arange(length, device=tokens.device)
        context, rotary = self.context_states(features), self.rotation(slots.expand(len(tokens), -1))
        before = [layer.self_attn.keys_values(context, rotary) for layer in self.draft_layers]
        roots, newest = tokens.gather(1, anchors), newest_states(context, anchors)
        some = anchors_at_a_time(len(tokens), length, 1 + self.frames)
        if some >= anchors.shape[1]:
            return self._some_blocks(anchors, roots, newest, before, embed)
        parts = zip(*(each.split(some, 1) for each in (anchors, roots, newest)), strict=True)
        again = partial(checkpoint, self._some_blocks, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*part, before, embed) for part in parts], 1)

    def _some_blocks(
        self,
        anchors: torch.Tensor,
        roots: torch.Tensor,
        newest: torch.Tensor,
        before: Sequence[tuple[torch.Tensor, torch.Tensor]],
        embed: nn.Module,
    ) -> torch.Tensor:
        """Block outputs `[B, A, 1+F, H]`. roots `int64 [B, A]`; newest `[B, A, H]`; before: each layer's keys and
        values `[B, kv_heads, T, dim]` of the context."""
        size = 1 + self.frames
        mask = block_mask(anchors, before[0][0].shape[2], size)
        positions = (anchors.unsqueeze(-1) + torch.arange(size, device=anchors.device)).flatten(1)
        states = self.block_states(roots, newest, embed).flatten(1, 2)

        def behind(keys: torch.Tensor, values: torch.Tensor) -> Context:
            return lambda own_keys, own: (torch.cat([keys, own_keys], 2), torch.cat([values, own], 2))

        outputs = self.run_layers(states, self.rotation(positions), [behind(*each) for each in before], mask)
        return outputs.unflatten(1, (anchors.shape[1], size))


def anchors_at_a_time(rows: int, length: int, size: int) -> int:
    """Anchors of each row whose mask (`block_mask`) takes some `MASK_AT_A_TIME` entries, 1 at least."""
    # rows * n * size * (length + n * size) = MASK_AT_A_TIME
    tokens = (math.sqrt(length**2 + 4 * MASK_AT_A_TIME / rows) - length) / 2
    return max(1, int(tokens / size))


def frame_logits(states: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Float32 token logits `[N, F, V]` of block outputs `[N, 1+F, H]`."""
    return head_logits(head, states[:, 1:].flatten(0, 1)).unflatten(0, (len(states), -1))


def block_mask(anchors: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """`bool [B, 1, A*size, length + A*size]`: a block sees the context before its anchor, and itself.

    Example, length 3, anchors 1 and 2, size 2: the first block sees slot 0, the second slots 0 and 1::

        T F F  T T F F
        T F F  T T F F
        T T F  F F T T
        T T F  F F T T
    """
    batch, count = anchors.shape
    context = torch.arange(length, device=anchors.device) < anchors.unsqueeze(-1)
    own = torch.eye(count, dtype=torch.bool, device=anchors.device).repeat_interleave(size, 1)
    rows = torch.cat([context, own.expand(batch, -1, -1)], 2)
    return rows.repeat_interleave(size, 1).unsqueeze(1)


class BlockSession(ContextSession):
    """The session of a block drafter: slot s of a row holds the keys and values of the token at position s; blocks are
    written behind them."""

    def __init__(self, drafter: BlockModel, head: DraftHead, batch_size: int):
        self.drafter, self.head = drafter, head
        weight = drafter.draft_layers[0].self_attn.k_proj.weight
        context = DraftKVCache(drafter.config, len(drafter.draft_layers), batch_size, weight)
        super().__init__(context, weight.new_zeros(batch_size, drafter.config.hidden_size))

    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """One parallel pass over the block, then the search."""
        return self.drafter.candidates(self.draft_states(root), root, self.head, nodes, min_probability)

    def draft_states(self, root: torch.Tensor) -> torch.Tensor:
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

        states = self.drafter.block_states(root, self.newest, self.head.embed)
        contexts = [context(index) for index in range(len(self.drafter.draft_layers))]
        return self.drafter.run_layers(states, cache.rotation(positions), contexts, mask)

    def store(self, cache: DraftKVCache, newest: torch.Tensor, committed: Committed) -> torch.Tensor:
        """Returns the context states of the newest tokens, `[B, H]`; any, if the drafter does not carry them."""
        assert committed.features is not None
        positions = cache.slots(committed.features.shape[1])
        rotary = cache.rotation(positions)
        states = self.drafter.context_states(committed.features)
        for index, layer in enumerate(self.drafter.draft_layers):
            cache.store(index, positions, *layer.self_attn.keys_values(states, rotary))
        cache.lengths = cache.lengths + committed.counts
        carry = self.drafter.config.carry
        return newest_states(states, committed.counts.unsqueeze(1)).squeeze(1) if carry else states[:, 0]
