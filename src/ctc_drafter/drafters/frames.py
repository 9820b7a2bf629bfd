"""Block drafters whose frames may hold a blank: what the CTC drafters share."""

from __future__ import annotations

import torch
from torch import nn

from ctc_drafter.drafters.block import BlockModel, frame_logits
from ctc_drafter.drafters.sizes import BlockConfig
from ctc_drafter.types import UserError


class FramesConfig(BlockConfig):
    """See `BlockConfig`.

    Args:
        frames: CTC frames a pass fills (F). draft_length: longest prefix that is drafted, at most F.
    """

    model_type = "frames_drafter"

    frames: int = 8

    def check(self) -> None:
        if not 1 <= self.draft_length <= self.frames:
            raise UserError(f"draft_length {self.draft_length} must lie between 1 and frames ({self.frames})")
        super().check()


class FramesModel(BlockModel):
    """Draft layers and a linear blank head."""

    config: FramesConfig

    def __init__(self, config: FramesConfig):
        super().__init__(config)
        self.blank_head = nn.Linear(config.hidden_size, 1)

    @property
    def frames(self) -> int:
        return self.config.frames

    def frame_logits(self, blocks: torch.Tensor, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Block outputs `[N, 1+F, H]` to float32 token logits `[N, F, V]` and blank logits `[N, F]`."""
        blanks = self.blank_head(blocks[:, 1:].flatten(0, 1)).view(len(blocks), -1)
        return frame_logits(blocks, head), blanks.float()
