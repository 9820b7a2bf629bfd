"""Llamas of known sizes with random weights, and an untrained drafter for each: for times, which ask for no sense."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import blank_drafter
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class LlamaShape:
    """vocab, hidden, layers, inner (of the MLP), heads, kv_heads. tied: the LM head is the embedding."""

    vocab: int
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    tied: bool = False

    def with_vocab(self, vocab: int) -> LlamaShape:
        return replace(self, vocab=vocab)

    def config(self, context: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=context,
            tie_word_embeddings=self.tied,
        )


# The large ones are those of the models' own configurations.
SHAPES = {
    "tiny": LlamaShape(512, 64, 2, 128, 4, 2),  # for trying the benchmark itself
    "llama-60m": LlamaShape(32000, 512, 8, 1408, 8, 4),
    "llama-300m": LlamaShape(32000, 1024, 20, 2816, 16, 8),
    "llama-1b": LlamaShape(32000, 2048, 20, 5632, 32, 8),
    "vicuna-7b": LlamaShape(32000, 4096, 32, 11008, 32, 32),
    "vicuna-13b": LlamaShape(32000, 5120, 40, 13824, 40, 40),
    "vicuna-33b": LlamaShape(32000, 6656, 60, 17920, 52, 52),
    "llama-3.1-8b": LlamaShape(128256, 4096, 32, 14336, 32, 8),
}


def named_shape(name: str) -> LlamaShape:
    """Raises `UserError` for a name that is none."""
    if name not in SHAPES:
        raise UserError(f"there is no shape {name}; give some of {','.join(SHAPES)}")
    return SHAPES[name]


def random_target(shape: LlamaShape, context: int, dtype: torch.dtype, device: str) -> Target:
    """Made on the device, so that no second copy of a large one is needed."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(context), dtype=dtype).eval()
    columns_first(model)
    return Target.wrap(model)


def random_drafter(target: Target) -> CTCDrafter:
    """Of the sizes that a fresh one has: `ctc-drafter train` without options."""
    with torch.device(target.device):
        drafter = blank_drafter("ctc")(target.config)
    assert isinstance(drafter, CTCDrafter)
    made: CTCDrafter = drafter.to(target.dtype).eval()
    columns_first(made)
    return made
