"""DSpark: DFlash's frames, and a bias that ties each of them to the token before it.

Source: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation" (DeepSeek-AI and Peking
University, 2026). The paper's sequential part is a low-rank table of the last token, `predictor_width` 0 here; a width
gives it the MLP over the two last tokens and the root's state that the CTC drafter has. The authors' loss is `lesson`,
with DFlash's weights. Their confidence head, which shortens chains under load, is not needed where a tree's nodes are
chosen by their probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.drafters.block import frame_logits
from ctc_drafter.drafters.expand import Step
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.drafters.sizes import BlockConfig
from ctc_drafter.drafters.tokenframes import TokenFrames
from ctc_drafter.types import UserError


class DSparkConfig(BlockConfig):
    """See `BlockConfig`; a block has `draft_length` masks.

    Args:
        predictor_rank: rank of the bias. predictor_width: of its MLP, 0 for the table of the last token alone.
    """

    model_type = "dspark_drafter"

    predictor_rank: int = 64
    predictor_width: int = 0

    def check(self) -> None:
        super().check()
        if self.predictor_rank < 1:
            raise UserError(f"predictor_rank is {self.predictor_rank}; give at least 1, or train dflash")


class DSparkDrafter(TokenFrames):
    """Frames that know the tokens before them through a bias."""

    config_class = DSparkConfig
    config: DSparkConfig
    predictor: Predictor

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        sizes = (config.vocab_size, config.hidden_size, config.predictor_rank, config.predictor_width)
        self.predictor = Predictor(*sizes)
        self.post_init()

    def steps(self, blocks: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        logits, root_state = frame_logits(blocks, outputs[0]), self.predictor.root_state(blocks[:, 0])

        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            size, last = prefixes.shape[2], prefixes[:, :, -1]
            previous = prefixes[:, :, -2] if size > 1 else torch.full_like(last, -1)
            bias = self.predictor.output(self.predictor.state(previous, last, root_state, embed))
            return logits[:, size - 1].unsqueeze(1) + bias.float()

        return step

    def lesson(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The authors' sum: 0.1 log-probability of the label, less 0.9 of the summed differences to the teacher's."""
        likely = -fn.cross_entropy(logits, labels, reduction="none")
        return 0.1 * likely - 0.9 * (logits.softmax(-1) - teacher).abs().sum(-1)
