"""`DrafterConfig`: the configuration of every trained drafter, which refuses unknown keys."""

from __future__ import annotations

import difflib
import math
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ctc_drafter.types import UserError

LARGEST_SIZE = 1024
PASSED_BY_TRANSFORMERS = frozenset({"torch_dtype", "name_or_path", "_commit_hash"}) | {
    *("attn_implementation", "output_attentions", "experts_implementation")
}


class DrafterConfig(PreTrainedConfig):
    """What every trained drafter knows. Unknown keys are refused, so a misspelt one cannot pass unnoticed.

    Args:
        vocab_size, hidden_size: the target's; embeddings and LM head are heads from it.
        target_num_layers: depth of the target it was made for.
        target_layer_ids: target blocks whose outputs are its features, counted from 0, before the final norm.
        target_fingerprint: of the target's tokenizer; empty when unknown.
        draft_length: longest prefix that is drafted.
        score_temperature: what logits are divided by when drafts are scored; fitted on held-out text by
            `train/temperature.py`.
    """

    model_type = "drafter"

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_num_layers: int = 32
    target_layer_ids: list[int] | tuple[int, ...] = (1, 16, 30)
    target_fingerprint: str = ""
    draft_length: int = 7
    score_temperature: float = 1.0

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

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As every config's. With it lies what makes `generate` load the drafter by its name (`custom_generate.py`)."""
        super().save_pretrained(save_directory, *args, **kwargs)
        code = Path(save_directory, "custom_generate", "generate.py")
        code.parent.mkdir(exist_ok=True)
        code.write_bytes(Path(__file__).with_name("custom_generate.py").read_bytes())

    def check(self) -> None:
        """Raises `UserError` for values that cannot be."""
        if self.draft_length < 1:
            raise UserError(f"draft_length is {self.draft_length}; give at least 1")
        if not (math.isfinite(self.score_temperature) and self.score_temperature > 0):
            raise UserError(f"score_temperature is {self.score_temperature}; give more than 0, or leave it out")
        for name in ("draft_length", "frames", "num_hidden_layers"):
            size = getattr(self, name, 1)
            if isinstance(size, int) and size > LARGEST_SIZE:  # building it would take hours
                raise UserError(f"{name} is {size}; give at most {LARGEST_SIZE}")
        if not self.target_layer_ids or not all(0 <= i < self.target_num_layers for i in self.target_layer_ids):
            raise UserError(
                f"target_layer_ids {self.target_layer_ids} must name blocks 0..{self.target_num_layers - 1}"
            )
