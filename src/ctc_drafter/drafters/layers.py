"""Decoder layers of the attention draft module, in the layout of DFlash draft models.

Queries come from a block of tokens that see each other freely; keys and values come from the block and from
projections of the target's features. Tensor names are those that engines load: `layers.*.self_attn.{q,k,v,o}_proj`,
`q_norm`, `k_norm`, `layers.*.mlp.{gate,up,down}_proj`, `input_layernorm`, `post_attention_layernorm`.
Source of the layout: vLLM, `model_executor/models/qwen3_dflash.py`; Qwen3 decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as fn
from transformers import PreTrainedConfig

Rotation = tuple[torch.Tensor, torch.Tensor]
Context = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rotation(positions: torch.Tensor, dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines `[B, 1, T, dim]` of rotary positions `int64 [B, T]`, computed in float32."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    angle = positions.unsqueeze(-1).float() * frequency
    angle = torch.cat([angle, angle], -1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(states: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Turns states `[B, heads, T, dim]` by their positions, halves paired (the NeoX style)."""
    first, second = states.chunk(2, -1)
    return states * by[0] + torch.cat([-second, first], -1) * by[1]


def newest_states(context: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The last of each row's first `lengths int64 [B, A]` context states `[B, T, H]`: `[B, A, H]`; 0 for none."""
    index = (lengths - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, context.shape[2])
    return context.gather(1, index) * (lengths > 0).unsqueeze(-1)


class RMSNorm(nn.RMSNorm):
    """In the dtype of its weight, whatever autocast made of the input: the fused kernel wants them equal."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        return super().forward(states.to(self.weight.dtype))


class BlockAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; `width`: of its input, the hidden size by default."""

    def __init__(self, config: PreTrainedConfig, width: int | None = None):
        super().__init__()
        width = width or config.hidden_size
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(width, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.dim, eps=config.rms_norm_eps)

    def keys_values(self, states: torch.Tensor, by: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, kv_heads, T, dim]` of states `[B, T, H]`."""
        keys = self.k_norm(self._split(self.k_proj(states), self.kv_heads))
        return rotate(keys, by), self._split(self.v_proj(states), self.kv_heads)

    def forward(
        self, states: torch.Tensor, by: Rotation, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """states `[B, T, H]` attend to keys and values `[B, kv_heads, S, dim]` where mask `bool [B, 1, T, S]`."""
        queries = rotate(self.q_norm(self._split(self.q_proj(states), self.heads)), by)
        grouped = self.heads != self.kv_heads
        mixed = fn.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        return states.unflatten(-1, (heads, self.dim)).transpose(1, 2)


class GatedMLP(nn.Module):
    """The SwiGLU feed-forward layer."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(fn.silu(self.gate_proj(states)) * self.up_proj(states))


class DraftLayer(nn.Module):
    """One pre-norm layer. `context` takes the block's keys and values and puts the context's before them."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, states: torch.Tensor, by: Rotation, context: Context, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.input_layernorm(states)
        keys, values = context(*self.self_attn.keys_values(normed, by))
        states = states + self.self_attn(normed, by, keys, values, mask)
        return states + self.mlp(self.post_attention_layernorm(states))
