"""Configuration of the CTC drafter."""

from __future__ import annotations

from ctc_drafter.drafters.sizes import BlockConfig
from ctc_drafter.types import UserError


class CTCDrafterConfig(BlockConfig):
    """All sizes of a CTC drafter, with those of `BlockConfig`.

    Args:
        frames: CTC frames a pass fills (F). draft_length: longest prefix that is searched, at most F.
        predictor_rank: rank of the predictor's bias, 0 for none. predictor_width: its MLP.
    """

    model_type = "ctc_drafter"

    frames: int = 8
    predictor_rank: int = 64
    predictor_width: int = 256

    def check(self) -> None:
        if not 1 <= self.draft_length <= self.frames:
            raise UserError(f"draft_length {self.draft_length} must lie between 1 and frames ({self.frames})")
        super().check()
