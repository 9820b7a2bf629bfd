"""Configurations that trained drafters share: what they know of their target, and the sizes of draft layers."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import PreTrainedConfig

from ctc_drafter.types import UserError


class DrafterConfig(PreTrainedConfig):
    """What every trained drafter knows. Unknown keys are refused, so a misspelt one cannot pass unnoticed.

    Args:
        vocab_size, hidden_size: the target's; embeddings and LM head are borrowed from it.
        target_num_layers: depth of the target it was made for.
        target_layer_ids: target blocks whose outputs are its features, counted from 0, before the final norm.
        target_fingerprint: of the target's tokenizer; empty when unknown.
        draft_length: longest prefix that is drafted.
    """

    model_type = "drafter"

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_num_layers: int = 32
    target_layer_ids: list[int] | tuple[int, ...] = (1, 16, 30)
    target_fingerprint: str = ""
    draft_length: int = 7

    def __post_init__(self, **kwargs: Any) -> None:
        known = set(self.__dataclass_fields__)
        unknown = sorted(key for key in kwargs if key not in known | PASSED_BY_TRANSFORMERS)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise UserError(f"unknown key {unknown[0]!r} in the drafter's config; {hint}")
        super().__post_init__(**kwargs)
        self.target_layer_ids = list(self.target_layer_ids)
        self.check()

    def check(self) -> None:
        """Raises `UserError` for values that cannot be."""
        if self.draft_length < 1:
            raise UserError(f"draft_length is {self.draft_length}; give at least 1")
        if not self.target_layer_ids or not all(0 <= i < self.target_num_layers for i in self.target_layer_ids):
            raise UserError(
                f"target_layer_ids {self.target_layer_ids} must name blocks 0..{self.target_num_layers - 1}"
            )


class LayerConfig(DrafterConfig):
    """A drafter with decoder layers of its own.

    Args:
        num_hidden_layers, intermediate_size, num_attention_heads, num_key_value_heads, head_dim,
        rms_norm_eps, rope_theta, max_position_embeddings: the draft layers.
    """

    model_type = "layer_drafter"

    num_hidden_layers: int = 1
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768

    def check(self) -> None:
        super().check()
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError("num_attention_heads must be a multiple of num_key_value_heads")


class BlockConfig(LayerConfig):
    """A drafter that fills a block of masks.

    Args:
        mask_token_id: vocabulary token whose embedding stands in every frame of the block.
        carry: whether a map of the newest committed token's context state is added to every place of the block.
    """

    model_type = "block_drafter"

    mask_token_id: int = 0
    carry: bool = False

    def check(self) -> None:
        super().check()
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"mask_token_id {self.mask_token_id} must lie below vocab_size ({self.vocab_size})")


PASSED_BY_TRANSFORMERS = frozenset(
    {
        "torch_dtype",
        "name_or_path",
        "_commit_hash",
        "attn_implementation",
        "output_attentions",
        "experts_implementation",
    }
)


def target_size(target: PreTrainedConfig, name: str) -> int | None:
    """A size of a target's layers as one number: the largest where layers differ; None where there is none."""
    try:
        found = getattr(target, name, None)
    except RuntimeError:  # transformers' way to say that it differs by layer
        found = [getattr(layer, name, None) for layer in target.per_layer_config]
    if isinstance(found, list | tuple):
        found = max((size for size in found if size), default=None)
    return found or None


def needed_size(target: PreTrainedConfig, name: str) -> int:
    """`target_size`. Raises `UserError` where the configuration has none."""
    found = target_size(target, name)
    if found is None:
        raise UserError(f"the configuration of {target.model_type} has no {name}, which a drafter takes over")
    return found
