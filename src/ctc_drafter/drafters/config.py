"""Configuration of the CTC drafter."""

from __future__ import annotations

from ctc_drafter.drafters.frames import FramesConfig
from ctc_drafter.types import UserError


class CTCDrafterConfig(FramesConfig):
    """All sizes of a CTC drafter, with those of `FramesConfig`.

    Args:
        predictor_rank: rank of the predictor's bias, 0 for none. predictor_width: its MLP; 0 for the table of the last
            token alone. draft_vocab_size: tokens that are drafted, 0 for all; `CTCDrafter.draft_only` says which.
        copies: the longest agreement with an earlier place of the text that counts (`ctc/copies.py`), 0 for no copies.
        lookup_length: most tokens to copy from the text without asking the frames (`drafters/hybrid.py`), 0 for none.
    """

    model_type = "ctc_drafter"

    predictor_rank: int = 64
    predictor_width: int = 256
    draft_vocab_size: int = 0
    copies: int = 0
    lookup_length: int = 0

    def check(self) -> None:
        super().check()
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(f"draft_vocab_size {self.draft_vocab_size} must lie between 0 and {self.vocab_size}")
        if self.copies < 0:
            raise UserError(f"copies is {self.copies}; give the longest agreement that counts, or 0 for no copies")
        if self.lookup_length < 0:
            raise UserError(f"lookup_length is {self.lookup_length}; give the most tokens to copy, or 0 for none")
        if self.copies and not (self.predictor_rank and self.predictor_width):
            raise UserError("copies need the predictor; set predictor_rank and predictor_width above 0, or copies to 0")
