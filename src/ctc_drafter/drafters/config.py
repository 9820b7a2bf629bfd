"""Configuration of the CTC drafter."""

from __future__ import annotations

from ctc_drafter.drafters.frames import FramesConfig


class CTCDrafterConfig(FramesConfig):
    """All sizes of a CTC drafter, with those of `FramesConfig`.

    Args:
        predictor_rank: rank of the predictor's bias, 0 for none. predictor_width: its MLP; 0 for the table of the last
            token alone.
    """

    model_type = "ctc_drafter"

    predictor_rank: int = 64
    predictor_width: int = 256
