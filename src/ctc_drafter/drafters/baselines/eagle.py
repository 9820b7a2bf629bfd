"""EAGLE: a decoder layer that predicts the target's features autoregressively.

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
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.drafters.base import Committed
from ctc_drafter.drafters.baselines.chain_rule import ChainDrafter, expand, tempered
from ctc_drafter.drafters.baselines.heads import before
from ctc_drafter.drafters.layers import (
    BlockAttention,
    ContextSession,
    CosSin,
    DraftKVCache,
    GatedMLP,
    LayerConfig,
    RMSNorm,
    rotation,
)
from ctc_drafter.drafters.lm_head import DraftHead, draft_head, head_logits
from ctc_drafter.drafters.trainable import DraftAt
from ctc_drafter.types import Candidates, UserError


class EagleConfig(LayerConfig):
    """See `LayerConfig`; there is one layer, run `draft_length` times."""

    model_type = "eagle_drafter"

    def check(self) -> None:
        super().check()
        if self.num_hidden_layers != 1:
            raise UserError(f"num_hidden_layers is {self.num_hidden_layers}; this drafter runs one layer: leave it out")


class EagleDrafter(ChainDrafter):
    """Draft states are normed features `[B, A, U, H]`, the u-th one after the root and u-1 known tokens."""

    config_class = EagleConfig
    config: EagleConfig
    first_pair = 0  # the first pair of a text that later ones see

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.fc = nn.Linear(config.hidden_size * len(config.target_layer_ids), config.hidden_size, bias=False)
        self.layer = self.new_layer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def new_layer(self, config: EagleConfig) -> PairLayer:
        """An untrained layer."""
        return PairLayer(config)

    def fed_back(self, states: torch.Tensor) -> torch.Tensor:
        """The feature of a drafted token, `[..., H]`, of what the layer said after it."""
        return states

    def target_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's ids of drafted ones."""
        return tokens

    @torch.no_grad()
    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """The last norm starts as the target's."""
        if norm_scale is not None:
            self.norm.weight.copy_(norm_scale)

    def fused(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features `[B, T, K]` as the layer's own, `[B, T, H]`."""
        return self.fc(features.to(self.fc.weight.dtype))

    def keys_values(
        self, tokens: torch.Tensor, fused: torch.Tensor, rotary: CosSin, embed: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of committed pairs: tokens `int64 [B, T]`, features of the tokens before them."""
        return self.layer.self_attn.keys_values(self.layer.pairs(embed(tokens).to(fused.dtype), fused), rotary)

    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """See `TrainableDrafter.draft_states`. Depth by depth for all anchors at once, each with its own rollout."""
        fused, (batch, length), count = self.fused(features), tokens.shape, anchors.shape[1]
        rotary = self.rotation(torch.arange(length, device=tokens.device).expand(batch, -1))
        keys, values = self.keys_values(tokens, shifted(fused), rotary, embed)
        place = torch.arange(length, device=tokens.device)
        mask = ((place < anchors.unsqueeze(-1)) & (place >= self.first_pair)).unsqueeze(1)
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(batch, 1, -1, -1)
        states, found = before(fused, anchors), []
        for depth in range(self.config.draft_length):
            place = anchors + depth
            rotary = self.rotation(place)
            known = embed(tokens.gather(1, place.clamp(max=length - 1))).to(states.dtype)
            pairs = self.layer.pairs(known, states)
            new = self.layer.self_attn.keys_values(pairs, rotary)
            keys, values, mask = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2), torch.cat([mask, own], 3)
            states = self.layer(states, pairs, rotary, keys, values, mask)
            found.append(self.norm(states))
            states = self.fed_back(states)
        return torch.stack(found, 2)

    def rotation(self, positions: torch.Tensor) -> CosSin:
        return rotation(self.config, positions, self.fc.weight.dtype)

    def known_logits(
        self, states: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        return (head_logits(head, each) for each in states.unbind(1))

    def drafting_at(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, used: torch.Tensor, heads: DraftHead
    ) -> DraftAt:
        """See `TrainableDrafter.drafting_at`: each anchor is a row of its own, with its row's context up to there."""
        fused = self.fused(features)
        cache = DraftKVCache(self.config, 1, len(tokens), fused)
        positions = cache.slots(tokens.shape[1])
        rotary = cache.rotation(positions)
        cache.store(0, positions, *self.keys_values(tokens, shifted(fused), rotary, heads.embed))
        rows, lengths, newest = used.nonzero()[:, 0], anchors[used], before(fused, anchors)[used]
        roots = tokens.gather(1, anchors)[used]

        def draft(part: torch.Tensor, nodes: int) -> Candidates:
            context = copy.copy(cache)
            context.select(rows[part])
            context.lengths = lengths[part]
            return propose(self, heads, context, newest[part], roots[part], nodes)

        return draft

    def prepare(self, embed: nn.Module, head: nn.Module) -> DraftHead:
        return DraftHead(embed, draft_head(head))

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> EagleSession:
        """See `Drafter.begin`."""
        return EagleSession(self, self.prepared(embed, head), batch_size)


def shifted(fused: torch.Tensor) -> torch.Tensor:
    """The features `[B, T, H]` of the token before each; zeros before the first."""
    return fn.pad(fused[:, :-1], (0, 0, 1, 0))


# EAGLE's layer: it reads pairs of a token's embedding and the feature of the token before it.


class PairLayer(nn.Module):
    """A decoder layer whose attention reads pairs `[..., 2H]` and whose residual stream is the feature."""

    def __init__(self, config: LayerConfig, normed: bool = True, bias: bool = False):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config, 2 * config.hidden_size, normed, bias)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def pairs(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens and features of the tokens before them, `[B, T, H]` each, to `[B, T, 2H]`."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(features)], -1)

    def forward(
        self,
        features: torch.Tensor,
        pairs: torch.Tensor,
        rotary: CosSin,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The features `[B, T, H]` that follow; keys and values `[B, kv_heads, S, dim]` include the pairs' own."""
        states = features + self.self_attn(pairs, rotary, keys, values, mask)
        return states + self.mlp(self.post_attention_layernorm(states))


class EagleSession(ContextSession):
    """Keeps keys and values of committed pairs, and the feature `[B, H]` of each newest token; the layer grows a tree
    behind them, depth by depth."""

    def __init__(self, drafter: EagleDrafter, head: DraftHead, batch_size: int):
        self.drafter, self.head = drafter, head
        like = next(drafter.layer.parameters())
        context = DraftKVCache(drafter.config, 1, batch_size, like)
        super().__init__(context, like.new_zeros(batch_size, drafter.config.hidden_size))

    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """See `TrainedSession.draft`."""
        return propose(self.drafter, self.head, self.context, self.newest, root, nodes, min_probability)

    def store(self, cache: DraftKVCache, newest: torch.Tensor, committed: Committed) -> torch.Tensor:
        """Stores new pairs; newest `[B, H]`: the features of the tokens before them. Returns those of the last ones."""
        assert committed.features is not None
        positions = cache.slots(committed.tokens.shape[1])
        fused = torch.cat([newest.unsqueeze(1), self.drafter.fused(committed.features)], 1)
        rotary = cache.rotation(positions)
        cache.store(0, positions, *self.drafter.keys_values(committed.tokens, fused[:, :-1], rotary, self.head.embed))
        cache.lengths = cache.lengths + committed.counts
        return fused.gather(1, committed.counts.view(-1, 1, 1).expand(-1, 1, fused.shape[2]))[:, 0]


def propose(
    drafter: EagleDrafter,
    heads: DraftHead,
    cache: DraftKVCache,
    newest: torch.Tensor,
    root: torch.Tensor,
    nodes: int,
    min_probability: float = 0.0,
) -> Candidates:
    """The best prefixes after root `int64 [B]`, with the context in the cache and its last features `[B, H]`."""
    step = tempered(Rollout(drafter, heads, cache, newest), drafter.config.score_temperature)
    found = expand(step, root, nodes=nodes, depth=drafter.config.draft_length, min_probability=min_probability)
    return replace(found, tokens=drafter.target_tokens(found.tokens))


class Rollout:
    """A `Step`: what comes after prefixes whose ancestors it was asked about before.

    states `[B, W, H]`: features of the prefixes asked last. seen `bool [B, W, M]`: which of the M nodes so far are on
    the way to each of them. Node i of a row lies in slot `lengths + i`, whatever its position.
    """

    def __init__(self, drafter: EagleDrafter, heads: DraftHead, cache: DraftKVCache, newest: torch.Tensor):
        self.drafter, self.heads, self.cache = drafter, heads, cache
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
        rotary = cache.rotation(cache.lengths.unsqueeze(1) + size - 1)
        known = prefixes[:, :, -1] if places is None else drafter.target_tokens(prefixes[:, :, -1])
        pairs = drafter.layer.pairs(self.heads.embed(known).to(states.dtype), states)
        cache.store(0, slots, *drafter.layer.self_attn.keys_values(pairs, rotary))
        end = int(cache.lengths.max()) + count
        mask = visible(cache.lengths, seen, end, drafter.first_pair)
        states = drafter.layer(states, pairs, rotary, *cache.read(0, end), mask)
        self.states, self.seen = drafter.fed_back(states), seen
        logits = head_logits(self.heads.head, drafter.norm(states).flatten(0, 1))
        return logits.unflatten(0, (batch, width))


def visible(lengths: torch.Tensor, seen: torch.Tensor, end: int, first: int = 0) -> torch.Tensor:
    """`bool [B, 1, W, end]`: each prefix sees its row's context from the pair `first` on, and its own way there."""
    count = seen.shape[2]
    slot = torch.arange(end, device=seen.device)
    node = slot - lengths.unsqueeze(1)
    on_the_way = seen.gather(2, node.clamp(0, count - 1).unsqueeze(1).expand(-1, seen.shape[1], -1))
    return (
        ((node < 0) & (slot >= first)).unsqueeze(1) | (on_the_way & ((node >= 0) & (node < count)).unsqueeze(1))
    ).unsqueeze(1)
