"""The CTC drafter without its attention: frames are linear maps of the last hidden state, as Medusa's heads are.

For ablations: what the attention module is worth. Everything behind the frames is that of `ctc.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from ctc_drafter.drafters.base import DraftSession
from ctc_drafter.drafters.config import CTCDrafterConfig
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.heads import LastStateSession, before
from ctc_drafter.types import UserError


class LinearCTCConfig(CTCDrafterConfig):
    """See `CTCDrafterConfig`; there are no draft layers."""

    model_type = "ctc_linear_drafter"

    num_hidden_layers: int = 0

    def check(self) -> None:
        super().check()
        if self.copies:
            raise UserError("ctc-linear copies nothing; leave copies at 0, or train ctc")
        if self.lookup_length:
            raise UserError("ctc-linear copies nothing; leave lookup_length at 0, or train ctc")


class FrameMaps(nn.Linear):
    """All frames' maps side by side; they start at 0, so that a frame starts as the state itself."""


class LinearCTCDrafter(CTCDrafter):
    """Frame t is x + W_t x for the last hidden state x behind the norm; so is the place of the root."""

    config_class = LinearCTCConfig
    config: LinearCTCConfig

    def __init__(self, config: LinearCTCConfig):
        super().__init__(config)
        self.maps = FrameMaps(config.hidden_size, (1 + config.frames) * config.hidden_size)
        del self.fc, self.hidden_norm
        self.post_init()

    @classmethod
    def feature_choice(cls, depth: int) -> list[int]:
        return [depth - 1]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FrameMaps):
            nn.init.zeros_(module.weight)

    def states(self, features: torch.Tensor) -> torch.Tensor:
        """What the maps read of features `[B, T, H]`."""
        return self.norm(features.to(self.norm.weight.dtype))

    def blocks(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """The state before each anchor `[B, A, H]`; see `TrainableDrafter.blocks`."""
        return before(self.states(features), anchors)

    def filled(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `CTCDrafter.filled`, of states `[N, H]`."""
        return blocks.unsqueeze(1) + self.maps(blocks).unflatten(-1, (1 + self.frames, -1))

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""
        return LastStateSession(self, self.borrow(embed, head))
