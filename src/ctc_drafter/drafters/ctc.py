"""The CTC drafter: made for a target, saved, loaded, and put to work."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ctc_drafter.drafters.block import BlockModel
from ctc_drafter.drafters.borrowed import Borrowed, borrow
from ctc_drafter.drafters.config import CTCDrafterConfig
from ctc_drafter.drafters.session import CTCSession
from ctc_drafter.types import UserError


class CTCDrafter(BlockModel):
    """Save and load it with `save_pretrained` and `from_pretrained` (`config.json`, `model.safetensors`)."""

    def __init__(self, config: CTCDrafterConfig):
        super().__init__(config)
        self._borrowed: tuple[Any, Borrowed] | None = None

    @classmethod
    def for_target(cls, target: PreTrainedConfig, **overrides: Any) -> CTCDrafter:
        """A fresh, untrained drafter with the target's sizes; `overrides` are `CTCDrafterConfig` keys."""
        text = target.get_text_config(decoder=True)
        depth, heads = text.num_hidden_layers, text.num_attention_heads
        sizes = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "target_num_layers": depth,
            "target_layer_ids": sorted({min(1, depth - 1), depth // 2, max(depth - 2, 0)}),
            "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "max_position_embeddings": getattr(text, "max_position_embeddings", None) or 32768,
        }
        return cls(CTCDrafterConfig(**{**sizes, **overrides}))

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> CTCDrafter:
        """Loads a folder or hub id. Raises `UserError` for missing, corrupt or incomplete checkpoints."""
        try:
            kwargs["output_loading_info"] = True
            drafter, report = super().from_pretrained(name, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # every reader down to safetensors has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"no drafter could be loaded from {name}: {reason}") from error
        wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
        if wrong or report["mismatched_keys"]:
            raise UserError(f"{name} is not a whole CTC drafter: tensor {wrong[0] if wrong else 'shapes'} does not fit")
        return drafter.eval()

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return tuple(self.config.target_layer_ids)

    def check_target(self, target: PreTrainedConfig, fingerprint: str = "") -> None:
        """Raises `UserError` when the drafter was made for another target."""
        text = target.get_text_config(decoder=True)
        pairs = [
            ("hidden size", self.config.hidden_size, text.hidden_size),
            ("vocabulary", self.config.vocab_size, text.vocab_size),
            ("layer count", self.config.target_num_layers, text.num_hidden_layers),
        ]
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise UserError(f"the drafter was made for a target with {what} {mine}, this one has {theirs}")
        if fingerprint and self.config.target_fingerprint and fingerprint != self.config.target_fingerprint:
            raise UserError("the drafter was made for another tokenizer; use the target that it was trained for")

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> CTCSession:
        """See `Drafter.begin`."""
        return CTCSession(self, self.borrow(embed, head), batch_size)

    def borrow(self, embed: nn.Module, head: nn.Module) -> Borrowed:
        """The target's embedding and LM head made ready for drafting; kept until they or the weights change."""
        weights = [*self.parameters(), *embed.parameters(), *head.parameters()]
        key = (id(embed), id(head), *((id(w), 0 if w.is_inference() else w._version) for w in weights))
        if self._borrowed is None or self._borrowed[0] != key:
            self._borrowed = (key, borrow(self.predictor, self.config.draft_length, embed, head))
        return self._borrowed[1]
