"""Configuration of the CTC drafter."""

from __future__ import annotations

from ctc_drafter.drafters.frames import FramesConfig
from ctc_drafter.types import UserError


class CTCDrafterConfig(FramesConfig):
    """All sizes of a CTC drafter, with those of `FramesConfig`.

    Args:
        predictor_rank: rank of the predictor's bias, 0 for none. predictor_width: its MLP; 0 for the table of the last
            token alone. draft_vocab_size: tokens that are drafted, 0 for all; `CTCDrafter.draft_only` says which.
    """

    model_type = "ctc_drafter"

    predictor_rank: int = 64
    predictor_width: int = 256
    draft_vocab_size: int = 0

    def check(self) -> None:
        super().check()
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(f"draft_vocab_size {self.draft_vocab_size} must lie between 0 and {self.vocab_size}")
