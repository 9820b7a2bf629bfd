"""EAGLE: a decoder layer that predicts features one after the other, fed with what it predicted itself.

Sources: Li, Wei, Zhang and Zhang, "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty" (ICML 2024),
"EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees" (EMNLP 2024), "EAGLE-3: Scaling up Inference
Acceleration of Large Language Models via Training-Time Test" (NeurIPS 2025). The layer reads pairs: the embedding of a
token, and the feature of the token before it, each normed. Its output is the next feature, and the LM head makes tokens
of it. Features of committed tokens are several target layers', through one linear map; those of drafted tokens are the
layer's own outputs, in training too: the loss counts every depth of the rollout ("training-time test").

Pair p is [token p, feature of p-1]; it stands at position p and its output says what token p+1 is. Keys and values of a
committed pair come from its inputs alone, so the context costs two projections.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.drafters.borrowed import Borrowed, draft_head, head_logits
from ctc_drafter.drafters.chain import ChainDrafter
from ctc_drafter.drafters.context import ContextCache
from ctc_drafter.drafters.heads import before
from ctc_drafter.drafters.layers import RMSNorm, Rotation, rotation
from ctc_drafter.drafters.pairs import PairLayer
from ctc_drafter.drafters.rollout import EagleSession, propose
from ctc_drafter.drafters.sizes import LayerConfig
from ctc_drafter.types import Candidates, UserError


class EagleConfig(LayerConfig):
    """See `LayerConfig`; there is one layer, run `draft_length` times."""

    model_type = "eagle_drafter"

    def check(self) -> None:
        super().check()
        if self.num_hidden_layers != 1:
            raise UserError(f"num_hidden_layers is {self.num_hidden_layers}; this drafter runs one layer: leave it out")


class EagleDrafter(ChainDrafter):
    """blocks are normed features `[B, A, U, H]`, the u-th one after the root and u-1 known tokens."""

    config_class = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.fc = nn.Linear(config.hidden_size * len(config.target_layer_ids), config.hidden_size, bias=False)
        self.layer = PairLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @torch.no_grad()
    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module) -> None:
        """The last norm starts as the target's."""
        if norm_scale is not None:
            self.norm.weight.copy_(norm_scale)

    def fused(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features `[B, T, K]` as the layer's own, `[B, T, H]`."""
        return self.fc(features.to(self.fc.weight.dtype))

    def keys_values(
        self, tokens: torch.Tensor, fused: torch.Tensor, by: Rotation, embed: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of committed pairs: tokens `int64 [B, T]`, features of the tokens before them."""
        return self.layer.self_attn.keys_values(self.layer.pairs(embed(tokens).to(fused.dtype), fused), by)

    def blocks(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """See `TrainableDrafter.blocks`. Depth by depth for all anchors at once, each seeing its own rollout only."""
        fused, (batch, length), count = self.fused(features), tokens.shape, anchors.shape[1]
        by = self.rotation(torch.arange(length, device=tokens.device).expand(batch, -1))
        keys, values = self.keys_values(tokens, shifted(fused), by, embed)
        mask = (torch.arange(length, device=tokens.device) < anchors.unsqueeze(-1)).unsqueeze(1)
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(batch, 1, -1, -1)
        states, found = before(fused, anchors), []
        for depth in range(self.config.draft_length):
            place = anchors + depth
            by = self.rotation(place)
            known = embed(tokens.gather(1, place.clamp(max=length - 1))).to(states.dtype)
            pairs = self.layer.pairs(known, states)
            new = self.layer.self_attn.keys_values(pairs, by)
            keys, values, mask = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2), torch.cat([mask, own], 3)
            states = self.layer(states, pairs, by, keys, values, mask)
            found.append(self.norm(states))
        return torch.stack(found, 2)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        return rotation(positions, self.config.head_dim, self.config.rope_theta, self.fc.weight.dtype)

    def known_logits(
        self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        return (head_logits(head, states) for states in blocks.unbind(1))

    def drafts(
        self,
        features: torch.Tensor,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        used: torch.Tensor,
        borrowed: Borrowed,
        nodes: int,
        chunk: int,
    ) -> Iterator[Candidates]:
        """See `TrainableDrafter.drafts`: each anchor is a row of its own, with its row's context up to there."""
        fused = self.fused(features)
        cache = ContextCache(self.config, 1, len(tokens), fused)
        positions = cache.slots(tokens.shape[1])
        by = cache.rotation(positions)
        cache.store(0, positions, *self.keys_values(tokens, shifted(fused), by, borrowed.embed))
        rows, lengths, newest = used.nonzero()[:, 0], anchors[used], before(fused, anchors)[used]
        roots = tokens.gather(1, anchors)[used]
        for part in torch.arange(len(rows), device=rows.device).split(chunk):
            context = copy.copy(cache)
            context.select(rows[part])
            context.lengths = lengths[part]
            yield propose(self, borrowed, context, newest[part], roots[part], nodes)

    def prepare(self, embed: nn.Module, head: nn.Module) -> Borrowed:
        return Borrowed(embed, draft_head(head))

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> EagleSession:
        """See `Drafter.begin`."""
        return EagleSession(self, self.borrow(embed, head), batch_size)


def shifted(fused: torch.Tensor) -> torch.Tensor:
    """The features `[B, T, H]` of the token before each; zeros before the first."""
    return fn.pad(fused[:, :-1], (0, 0, 1, 0))
