"""Medusa: independent residual heads on the target's last hidden state.

Source: Cai, Li, Geng, Peng, Lee, Chen and Dao, "Medusa: Simple LLM Inference Acceleration Framework with Multiple
Decoding Heads" (ICML 2024), Medusa-1: the target is frozen. Head k is x + SiLU(W x), W starting at 0, and an output
matrix that starts as the LM head; its loss weighs decay^(k-1), 0.8 in the paper. The paper picks a fixed tree by the
heads' accuracies; here each step has the best tree under the product of their probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.drafters.borrowed import head_logits
from ctc_drafter.drafters.expand import Step
from ctc_drafter.drafters.heads import HeadsConfig, HeadsDrafter


class MedusaConfig(HeadsConfig):
    """See `HeadsConfig`."""

    model_type = "medusa_drafter"


class ResidualLayer(nn.Linear):
    """x + SiLU(W x + b). W and b start at 0, so that x goes through unchanged."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + fn.silu(super().forward(states))


class MedusaDrafter(HeadsDrafter):
    """Head k sees the last hidden state and no drafted token."""

    config_class = MedusaConfig
    config: MedusaConfig

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        size, depth = config.hidden_size, config.num_hidden_layers
        heads = (nn.Sequential(*(ResidualLayer(size, size) for _ in range(depth))) for _ in range(config.draft_length))
        self.heads = nn.ModuleList(heads)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLayer):
            nn.init.zeros_(module.weight)

    def steps(self, blocks: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            head = prefixes.shape[2] - 1
            return head_logits(outputs[head], self.heads[head](blocks)).unsqueeze(1)

        return step
