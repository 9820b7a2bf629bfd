"""Hydra: heads conditioned on the tokens drafted before; Hydra++, with a decoder layer of its own.

Source: Ankner, Parthasarathy, Nrusimha, Rinard, Ragan-Kelley and Brandon, "Hydra: Sequentially-Dependent Draft Heads
for Medusa Decoding" (COLM 2024). Head k reads the target's last hidden state, the embeddings of the root and of the k-1
tokens drafted so far. Hydra++ has deeper heads, and a decoder layer that attends to the hidden states of all committed
tokens ("prefix attention") in place of the last state alone, and learns the target's probabilities (the teacher loss).
The heads' losses weigh the same. The tree is the best one under the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.drafters.base import Committed, DraftSession, Step
from ctc_drafter.drafters.baselines.chain_rule import OutputHeads
from ctc_drafter.drafters.baselines.heads import HeadsConfig, HeadsDrafter, before
from ctc_drafter.drafters.layers import ContextSession, DraftKVCache, DraftLayer, LayerConfig, RMSNorm, cos_sin
from ctc_drafter.drafters.lm_head import head_logits
from ctc_drafter.types import Candidates


class HydraConfig(LayerConfig, HeadsConfig):
    """See `HeadsConfig`; `LayerConfig`'s sizes, all but `num_hidden_layers`, are those of the prefix attention.

    Args:
        num_hidden_layers: layers of a head; the first one reads the drafted tokens.
        prefix_attention: heads read a decoder layer over the hidden states of all committed tokens.
    """

    model_type = "hydra_drafter"

    draft_length: int = 5
    prefix_attention: bool = False


class HydraHead(nn.Module):
    """R z + SiLU(W z) for z = [x, e0..e(k-1)], embeddings e of root and drafted tokens; then Medusa's residual layers.

    The halves of `state` and `tokens` are R and W.
    """

    def __init__(self, size: int, tokens: int, depth: int):
        super().__init__()
        self.state = nn.Linear(size, 2 * size)
        self.tokens = nn.Linear(size * tokens, 2 * size, bias=False)
        self.inner = nn.ModuleList(nn.Linear(size, size) for _ in range(depth - 1))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """states `[N, H]` and embeddings `[N, W, k, H]` to `[N, W, H]`."""
        kept, changed = (self.state(states).unsqueeze(1) + self.tokens(embeddings.flatten(2))).chunk(2, -1)
        mixed = kept + fn.silu(changed)
        for layer in self.inner:
            mixed = mixed + fn.silu(layer(mixed))
        return mixed


class HydraDrafter(HeadsDrafter):
    """Head k sees the state before the root, the root, and k-1 drafted tokens."""

    config_class = HydraConfig
    config: HydraConfig

    def __init__(self, config: HydraConfig):
        super().__init__(config)
        sizes = [(config.hidden_size, tokens, config.num_hidden_layers) for tokens in range(1, config.draft_length + 1)]
        self.heads = nn.ModuleList(HydraHead(*size) for size in sizes)
        self.prefix_layer = DraftLayer(config) if config.prefix_attention else None
        self.prefix_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.prefix_attention else None
        self.post_init()

    @torch.no_grad()
    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """See `HeadsDrafter`. Heads start by handing on the state, as large as the target's final norm makes it."""
        super().start_from(norm_scale, head, embed)
        for hydra in self.heads.children():
            for weight in hydra.parameters():
                weight.zero_()
            nn.init.eye_(hydra.get_submodule("state").get_parameter("weight"))
        if norm_scale is not None and self.prefix_norm is not None:
            self.prefix_norm.weight.fill_(norm_scale.square().mean().sqrt())

    def steps(self, states: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            head = prefixes.shape[2] - 1
            hidden = self.heads[head](states, embed(prefixes).to(states.dtype))
            return head_logits(outputs[head], hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

        return step

    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """See `TrainableDrafter.draft_states`; with prefix attention, each token's state has seen those before it."""
        states = self.states(features)
        if self.prefix_layer is not None:
            length = states.shape[1]
            slots = torch.arange(length, device=states.device).unsqueeze(0)
            rotary = cos_sin(slots, self.config.head_dim, self.config.rope_theta, states.dtype)
            causal = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
            states = self.seen(
                self.prefix_layer(states, rotary, lambda keys, values: (keys, values), causal[None, None])
            )
        return before(states, anchors)

    def seen(self, states: torch.Tensor) -> torch.Tensor:
        """The prefix layer's output, as heads read it."""
        return states if self.prefix_norm is None else self.prefix_norm(states)

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""
        if self.prefix_layer is None:
            return super().begin(embed, head, batch_size)
        return PrefixSession(self, self.prefix_layer, self.prepared(embed, head), batch_size)


class PrefixSession(ContextSession):
    """Keeps the prefix layer's keys and values, and its output `[B, H]` at the newest tokens."""

    def __init__(self, drafter: HydraDrafter, layer: DraftLayer, head: OutputHeads, batch_size: int):
        self.drafter, self.layer, self.head = drafter, layer, head
        weight = layer.self_attn.k_proj.weight
        context = DraftKVCache(drafter.config, 1, batch_size, weight)
        super().__init__(context, weight.new_zeros(batch_size, drafter.config.hidden_size))

    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """See `TrainedSession.draft`."""
        return self.drafter.candidates(self.newest, root, self.head, nodes, min_probability)

    def store(self, cache: DraftKVCache, newest: torch.Tensor, committed: Committed) -> torch.Tensor:
        """Stores all new tokens, and lets the newest one of each row look at those that are there."""
        assert committed.features is not None
        positions = cache.slots(committed.features.shape[1])
        states = self.drafter.states(committed.features)
        normed = self.layer.input_layernorm(states)
        cache.store(0, positions, *self.layer.self_attn.keys_values(normed, cache.rotation(positions)))
        cache.lengths = cache.lengths + committed.counts
        last = cache.lengths.unsqueeze(1) - 1
        end = int(cache.lengths.max())
        seen = (torch.arange(end, device=last.device) <= last)[:, None, None]
        state = before(states, committed.counts.unsqueeze(1))
        output = self.layer(state, cache.rotation(last), lambda _keys, _values: cache.read(0, end), seen)
        return self.drafter.seen(output[:, 0])
