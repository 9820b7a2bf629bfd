"""EAGLE-3's published heads: EAGLE's layer without norms of queries and keys, a draft vocabulary, its own LM head.

Sources of the formats: SafeAILab/EAGLE on GitHub (`eagle/model/cnets.py`: `midlayer`, `fc`, `norm`, `lm_head`, `d2t`,
`t2d`; SpecForge and others write the same) and vllm-project/speculators (`models/eagle3`: `layers.0` in place of
`midlayer`, sizes under `transformer_layer_config`, norms by flags). They are read and used as they are, and not trained
here: `eagle.py` is the method that is.

Row i of their LM head stands for the target's token `i + d2t[i]`. Their first pair is [token 1, feature 0]: there is
none of the first token. They count it from position 0 or 1, and we from 1, which rotary positions do not tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ctc_drafter.drafters.baselines.eagle import EagleConfig, EagleDrafter, PairLayer
from ctc_drafter.drafters.layers import CosSin, RMSNorm
from ctc_drafter.drafters.lm_head import DraftHead, draft_head
from ctc_drafter.types import UserError

DEPTH = 6  # tokens that the authors' code drafts ahead


class Eagle3Config(EagleConfig):
    """See `EagleConfig`; what published heads have beside.

    Args:
        draft_vocab_size: rows of the LM head.
        qk_norm, attention_bias: whether queries and keys are normalised (Qwen3), and projections have biases.
        norm_before_residual: the residual stream is the normed feature. norm_output: the normed output is fed back.
        norm_before_fc, fc_norm: one norm of all target features, or one each, before the map that fuses them.
        own_embedding: the head has an embedding of its own.
        rope: scaled rotary positions, as `rope_parameters` of transformers; None for plain ones.
    """

    model_type = "eagle3_drafter"

    draft_length: int = DEPTH
    draft_vocab_size: int = 32000
    qk_norm: bool = False
    attention_bias: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    own_embedding: bool = False
    rope: dict[str, Any] | None = None


class Eagle3Layer(PairLayer):
    """EAGLE's layer with the options of published heads."""

    def __init__(self, config: Eagle3Config):
        super().__init__(config, config.qk_norm, config.attention_bias)
        self.norm_before_residual = config.norm_before_residual

    def forward(
        self,
        features: torch.Tensor,
        pairs: torch.Tensor,
        rotary: CosSin,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `PairLayer.forward`; the second half of a pair is its normed feature."""
        residual = pairs[..., features.shape[-1] :] if self.norm_before_residual else features
        return super().forward(residual, pairs, rotary, keys, values, mask)


class Eagle3Drafter(EagleDrafter):
    """A published head. It drafts its own vocabulary, and is refused for training."""

    config_class = Eagle3Config
    config: Eagle3Config
    first_pair = 1

    def __init__(self, config: Eagle3Config):
        super().__init__(config)
        hidden, count = config.hidden_size, len(config.target_layer_ids)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        if config.norm_before_fc:
            self.input_norm = RMSNorm(hidden * count, eps=config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(hidden, eps=config.rms_norm_eps) for _ in range(count))
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.post_init()

    @classmethod
    def feature_choice(cls, depth: int) -> list[int]:
        """The blocks that heads read which do not say so: theirs are the inputs of blocks 2, half and last but two."""
        return [1, depth // 2 - 1, depth - 4]

    def new_layer(self, config: EagleConfig) -> PairLayer:
        assert isinstance(config, Eagle3Config)
        return Eagle3Layer(config)

    def fused(self, features: torch.Tensor) -> torch.Tensor:
        """See `EagleDrafter.fused`."""
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return super().fused(features)

    def fed_back(self, states: torch.Tensor) -> torch.Tensor:
        """See `EagleDrafter.fed_back`."""
        return self.norm(states) if self.config.norm_output else states

    def target_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `EagleDrafter.target_tokens`."""
        return tokens + self.d2t[tokens]

    def prepare(self, embed: nn.Module, head: nn.Module) -> DraftHead:
        return DraftHead(self.embed_tokens if self.config.own_embedding else embed, draft_head(self.lm_head))

    def check_loss(self, loss: str) -> None:
        raise UserError("EAGLE-3's heads are used as they are published; train with --method eagle")

    def known_logits(
        self, states: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        raise UserError("EAGLE-3's heads are used as they are published; train with --method eagle")
