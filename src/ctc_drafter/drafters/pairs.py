"""EAGLE's layer: it reads pairs of a token's embedding and the feature of the token before it."""

from __future__ import annotations

import torch
from torch import nn

from ctc_drafter.drafters.layers import BlockAttention, GatedMLP, RMSNorm, Rotation
from ctc_drafter.drafters.sizes import LayerConfig


class PairLayer(nn.Module):
    """A decoder layer whose attention reads pairs `[..., 2H]` and whose residual stream is the feature."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config, width=2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def pairs(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens and features of the tokens before them, `[B, T, H]` each, to `[B, T, 2H]`."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(features)], -1)

    def forward(
        self,
        features: torch.Tensor,
        pairs: torch.Tensor,
        by: Rotation,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The features `[B, T, H]` that follow; keys and values `[B, kv_heads, S, dim]` include the pairs' own."""
        states = features + self.self_attn(pairs, by, keys, values, mask)
        return states + self.mlp(self.post_attention_layernorm(states))
