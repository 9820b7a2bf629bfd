"""Block drafters with a frame for each drafted token: what DFlash and DSpark share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ctc_drafter.drafters.block import BlockModel, frame_logits
from ctc_drafter.drafters.borrowed import low_rank_bias
from ctc_drafter.drafters.chain import BorrowedOutputs, StepwiseDrafter
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.types import Candidates

if TYPE_CHECKING:
    from ctc_drafter.ctc.search_cpu import LowRankBias


@dataclass(frozen=True)
class BorrowedFrames(BorrowedOutputs):
    """bias: what the predictor adds, for the search on a CPU; None elsewhere."""

    bias: LowRankBias | None = None


class TokenFrames(StepwiseDrafter, BlockModel):
    """Frames, and a predictor that ties them together if there is one."""

    predictor: Predictor | None

    def prepare(self, embed: nn.Module, head: nn.Module) -> BorrowedFrames:
        ready = super().prepare(embed, head)
        on_cpu = next(embed.parameters()).device.type == "cpu"
        bias = low_rank_bias(self.predictor, embed) if on_cpu else None
        return BorrowedFrames(ready.embed, ready.head, ready.outputs, bias)

    def candidates(
        self, blocks: torch.Tensor, root: torch.Tensor, borrowed: BorrowedOutputs, nodes: int, floor: float = 0.0
    ) -> Candidates:
        """See `TrainableDrafter.candidates`: best first on a CPU, level by level elsewhere."""
        if not isinstance(borrowed, BorrowedFrames) or borrowed.bias is None:
            return super().candidates(blocks, root, borrowed, nodes, floor)
        from ctc_drafter.ctc.search_cpu import best_chains

        start = blocks[:, 0]
        state = start[:, :0] if self.predictor is None else self.predictor.root_state(start)
        logits = frame_logits(blocks, borrowed.outputs[0])
        return best_chains(logits, root, borrowed.bias, state.float(), count=nodes, floor=floor)
