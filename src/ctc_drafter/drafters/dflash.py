"""DFlash: one parallel pass over a block of masks, a token for each mask.

Source: Chen, Liang and Liu, "DFlash: Block Diffusion for Flash Speculative Decoding" (2026). The network is that of
`block.py`: draft layers that attend to the block, both ways, and to projections of several target layers' features for
all committed tokens. Frame k drafts the k-th token after the root; there is no blank, and no frame knows what the
others hold. The loss is cross-entropy, a token weighing decay^(k-1): the paper's exp(-(k-1)/4) for blocks of 8 is decay
.78. The paper drafts one chain; here each step has the best tree under the product of the frames' probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ctc_drafter.drafters.block import frame_logits
from ctc_drafter.drafters.expand import Step
from ctc_drafter.drafters.sizes import BlockConfig
from ctc_drafter.drafters.tokenframes import TokenFrames


class DFlashConfig(BlockConfig):
    """See `BlockConfig`; a block has `draft_length` masks."""

    model_type = "dflash_drafter"


class DFlashDrafter(TokenFrames):
    """Independent frames, one a token."""

    config_class = DFlashConfig
    config: DFlashConfig

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        self.predictor = None
        self.post_init()

    def steps(self, blocks: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        logits = frame_logits(blocks, outputs[0])
        return lambda prefixes, _: logits[:, prefixes.shape[2] - 1].unsqueeze(1)
