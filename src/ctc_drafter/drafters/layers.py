"""Decoder layers of the draft network: attention, MLP, rotary embedding, KV cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as fn
from torch.nn.functional import pad
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ctc_drafter.drafters.base import Committed, TrainedSession
from ctc_drafter.drafters.config import DrafterConfig
from ctc_drafter.drafters.convolution import DynamicConvolution
from ctc_drafter.types import UserError

# Decoder layers of the attention draft module, in the layout of DFlash draft models.
#
# Queries come from a block of tokens that see each other freely; keys and values come from the block and from
# projections of the target's features. Tensor names are those that engines load: `layers.*.self_attn.{q,k,v,o}_proj`,
# `q_norm`, `k_norm`, `layers.*.mlp.{gate,up,down}_proj`, `input_layernorm`, `post_attention_layernorm`.
# Source of the layout: vLLM, `model_executor/models/qwen3_dflash.py`; Qwen3 decoder layers.

CosSin = tuple[torch.Tensor, torch.Tensor]
Context = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cos_sin(positions: torch.Tensor, dim: int, theta: float, dtype: torch.dtype) -> CosSin:
    """Cosines and sines `[B, 1, T, dim]` of rotary positions `int64 [B, T]`, computed in float32."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    angle = positions.unsqueeze(-1).float() * frequency
    angle = torch.cat([angle, angle], -1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotation(config: LayerConfig, positions: torch.Tensor, dtype: torch.dtype) -> CosSin:
    """`cos_sin` as the draft layers have it; scaled, where the config says how (`rope`, of EAGLE-3's heads)."""
    scaling = getattr(config, "rope", None)
    if not scaling:
        return cos_sin(positions, config.head_dim, config.rope_theta, dtype)
    sizes = {key: getattr(config, key) for key in ("hidden_size", "num_attention_heads", "head_dim")}
    longest = config.max_position_embeddings
    theirs = LlamaConfig(**sizes, max_position_embeddings=longest, rope_parameters=dict(scaling))
    cosines, sines = LlamaRotaryEmbedding(theirs).to(positions.device)(
        torch.empty(0, dtype=dtype, device=positions.device), positions
    )
    return cosines.unsqueeze(1), sines.unsqueeze(1)


def apply_rotary(states: torch.Tensor, rotary: CosSin) -> torch.Tensor:
    """Applies rotary embedding to states `[B, heads, T, dim]`, halves paired (the NeoX style)."""
    first, second = states.chunk(2, -1)
    return states * rotary[0] + torch.cat([-second, first], -1) * rotary[1]


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
    """Grouped-query attention; `width`: of its input, the hidden size by default.

    normed: whether queries and keys are normalised. bias: whether the projections have one.
    """

    def __init__(self, config: PreTrainedConfig, width: int | None = None, normed: bool = True, bias: bool = False):
        super().__init__()
        width = width or config.hidden_size
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(width, self.heads * self.dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.dim, eps=config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(self.dim, eps=config.rms_norm_eps) if normed else nn.Identity()

    def keys_values(self, states: torch.Tensor, rotary: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, kv_heads, T, dim]` of states `[B, T, H]`."""
        keys = self.k_norm(self._split(self.k_proj(states), self.kv_heads))
        return apply_rotary(keys, rotary), self._split(self.v_proj(states), self.kv_heads)

    def forward(
        self, states: torch.Tensor, rotary: CosSin, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """states `[B, T, H]` attend to keys and values `[B, kv_heads, S, dim]` where mask `bool [B, 1, T, S]`."""
        queries = apply_rotary(self.q_norm(self._split(self.q_proj(states), self.heads)), rotary)
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
    """One pre-norm layer. `context` takes the block's keys and values and puts the context's before them.

    convolved: whether convolutions mix the places of a block, around attention and MLP.
    """

    def __init__(self, config: PreTrainedConfig, convolved: bool = False):
        super().__init__()
        self.convolutions = nn.ModuleList(DynamicConvolution(config.hidden_size) for _ in range(4 * convolved))
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, states: torch.Tensor, rotary: CosSin, context: Context, mask: torch.Tensor | None, size: int = 0
    ) -> torch.Tensor:
        """States `[B, T, H]` through the layer; size: places of a block, for convolutions."""
        normed = self.mixed(0, self.input_layernorm(states), size)
        keys, values = context(*self.self_attn.keys_values(normed, rotary))
        states = states + self.mixed(1, self.self_attn(normed, rotary, keys, values, mask), size)
        return states + self.mixed(3, self.mlp(self.mixed(2, self.post_attention_layernorm(states), size)), size)

    def mixed(self, place: int, states: torch.Tensor, size: int) -> torch.Tensor:
        """States `[B, T, H]` after one of the convolutions, if there are any."""
        return self.convolutions[place](states, size) if len(self.convolutions) else states


# Keys and values of committed tokens, cached between the steps of a session.

GROWTH = 256  # slots added at a time


class DraftKVCache:
    """Slot s of a row holds the keys and values of the token at position s, for each of `layers` draft layers.

    lengths `int64 [B]`: tokens that are in. What lies beyond is garbage, for drafts to write over. end: the last slot
    that `slots` gave out, and one.
    """

    def __init__(self, config: LayerConfig, layers: int, batch_size: int, like: torch.Tensor):
        self.config = config
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self.states = like.new_zeros(layers, 2, batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.rotary, self.end = self._rotary(0), 0

    def slots(self, count: int) -> torch.Tensor:
        """The next `count` positions of each row, `int64 [B, count]`, with room for them."""
        positions = self.lengths.unsqueeze(1) + torch.arange(count, device=self.lengths.device)
        self.end = int(self.lengths.max()) + count  # asked of a GPU once a step
        missing = self.end - self.states.shape[4]
        if missing > 0:
            shape = list(self.states.shape)
            shape[4] = -(-missing // GROWTH) * GROWTH
            self.states = torch.cat([self.states, self.states.new_zeros(shape)], 4)
            self.rotary = self._rotary(self.states.shape[4])
        return positions

    def rotation(self, positions: torch.Tensor) -> CosSin:
        """`cos_sin` of positions `int64 [B, T]`, looked up."""
        cosines, sines = self.rotary
        if len(positions) == 1:
            start, count = int(positions[0, 0]), positions.shape[1]
            return cosines[:, :, start : start + count], sines[:, :, start : start + count]
        return cosines[0, 0, positions].unsqueeze(1), sines[0, 0, positions].unsqueeze(1)

    def store(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values `[B, kv_heads, T, dim]` into slots `int64 [B, T]`: whole vectors, where `scatter_`
        takes number by number, and copies what is not contiguous."""
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        self.states[layer, 0][rows, :, positions] = keys.transpose(1, 2)
        self.states[layer, 1][rows, :, positions] = values.transpose(1, 2)

    def read(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, kv_heads, end, dim]` of the first slots."""
        return self.states[layer, 0, :, :, :end], self.states[layer, 1, :, :, :end]

    def empty(self, batch_size: int) -> DraftKVCache:
        """A new one of the same sizes for other rows."""
        return DraftKVCache(self.config, len(self.states), batch_size, self.states)

    def join(self, other: DraftKVCache) -> None:
        """Puts the rows of another one behind these; all of them or, where memory does not suffice, none."""
        longest = max(self, other, key=lambda each: each.states.shape[4])
        slots = longest.states.shape[4]
        both = [pad(each.states, (0, 0, 0, slots - each.states.shape[4])) for each in (self, other)]
        states, lengths = torch.cat(both, 2), torch.cat([self.lengths, other.lengths])
        self.states, self.lengths, self.rotary = states, lengths, longest.rotary

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only these rows, `int64 [R]`."""
        self.lengths, self.states = self.lengths[rows], self.states[:, :, rows]

    def _rotary(self, slots: int) -> CosSin:
        positions = torch.arange(slots, device=self.lengths.device).unsqueeze(0)
        return rotation(self.config, positions, self.states.dtype)


class ContextSession(TrainedSession):
    """A session with cached keys and values of committed text, and a state of each row's newest token, `[B, H]`."""

    def __init__(self, context: DraftKVCache, newest: torch.Tensor):
        super().__init__()
        self.context, self.newest = context, newest

    def take_in(self, committed: Committed) -> None:
        """See `TrainedSession.take_in`."""
        self.newest = self.store(self.context, self.newest, committed)

    def add_rows(self, committed: Committed) -> None:
        """See `TrainedSession.add_rows`."""
        rows = len(committed.counts)
        new = self.context.empty(rows)
        newest = self.store(new, self.newest.new_zeros(rows, self.newest.shape[1]), committed)
        newest = torch.cat([self.newest, newest])
        self.context.join(new)
        self.newest = newest

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `TrainedSession.keep_rows`."""
        self.context.select(rows)
        self.newest = self.newest[rows]

    @abstractmethod
    def store(self, cache: DraftKVCache, newest: torch.Tensor, committed: Committed) -> torch.Tensor:
        """Puts committed tokens into the cache; newest `[B, H]`: the states of the tokens before them. Returns those of
        the last ones."""


class LayerConfig(DrafterConfig):
    """A drafter with decoder layers of its own.

    Args:
        num_hidden_layers, intermediate_size, num_attention_heads, num_key_value_heads, head_dim,
        rms_norm_eps, rope_theta, max_position_embeddings: the draft layers.
    """

    model_type = "layer_drafter"

    num_hidden_layers: int = 1
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768

    def check(self) -> None:
        super().check()
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError("num_attention_heads must be a multiple of num_key_value_heads")
