"""Settings of an exported drafter, and checks of the engine's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ctc_drafter.types import UserError

FORMAT = "ctc"  # `speculators_model_type` of an exported config
ARCHITECTURE = "DFlashCTCDraftModel"  # vLLM puts DFlash before names that neither begin nor end with it


@dataclass(frozen=True)
class HeadSettings:
    """Sizes of what reads the frames; `ctc_config` of an exported config.

    frames, draft_length, vocab_size, hidden_size, mask_token_id, predictor_rank, predictor_width, predictor_tied,
    joint_tokens, joint_rank, draft_vocab_size, carry, carry_rank, carry_root: the drafter's own, see
    `CTCDrafterConfig`. embedding_scale: what the target multiplies its embeddings by. width: prefixes of each length
    that the search keeps. score_temperature: what the search divides logits by.
    """

    frames: int
    draft_length: int
    vocab_size: int
    hidden_size: int
    mask_token_id: int
    predictor_rank: int
    predictor_width: int
    predictor_tied: bool = False
    joint_tokens: int = 0
    joint_rank: int = 64
    draft_vocab_size: int = 0
    carry: bool = False
    carry_rank: int = 0
    carry_root: bool = False
    embedding_scale: float = 1.0
    width: int = 8
    score_temperature: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> HeadSettings:
        """From `ctc_config`. Raises `UserError` for one that this version does not understand."""
        if config is None:
            raise UserError("the draft model's config has no ctc_config; export the drafter with ctc-drafter export")
        unknown = sorted(set(config) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"ctc_config has an unknown key {unknown[0]!r}; update ctc-drafter or export again")
        try:
            return cls(**config)
        except TypeError as error:
            raise UserError(f"ctc_config is not whole ({error}); export the drafter again") from error


def check_vllm(speculative: Any, stages: int, head: HeadSettings) -> None:
    """Raises `UserError` where vLLM would draft without CTC, or CTC without what it needs.

    speculative: vLLM's `SpeculativeConfig`. stages: of its pipeline parallelism.
    """
    if not speculative.use_local_argmax_reduction:
        raise UserError('CTC would be bypassed; add "use_local_argmax_reduction": true to the speculative config')
    if speculative.draft_sample_method != "greedy":
        raise UserError('CTC would be bypassed; set "draft_sample_method" of the speculative config to "greedy"')
    if speculative.num_speculative_tokens != head.frames:
        raise UserError(
            f"the drafter fills {head.frames} frames, so num_speculative_tokens must be {head.frames}, "
            f"not {speculative.num_speculative_tokens}"
        )
    if getattr(speculative, "num_speculative_tokens_per_batch_size", None):
        raise UserError("blocks have one size; remove num_speculative_tokens_per_batch_size")
    if getattr(speculative, "use_heterogeneous_vocab", False):
        raise UserError("drafter and target share their vocabulary; remove use_heterogeneous_vocab")
    if stages > 1:
        raise UserError(
            "the drafter needs the target's embedding and LM head in one place; "
            "use tensor in place of pipeline parallelism"
        )
