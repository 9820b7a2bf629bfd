"""Tiny targets and drafters whose drafts are never, always or sometimes right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.evaluate import exactness
from ctc_drafter.target.model import Target

VOCABULARY = 97


def tiny_config(**overrides) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "eos_token_id": None,  # texts end at their limit, unless a test says otherwise
        "initializer_range": 0.2,  # large: random logits then differ enough for text to vary
    }
    return LlamaConfig(**{**sizes, **overrides})


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Target:
    torch.manual_seed(seed)
    return Target.wrap(LlamaForCausalLM(tiny_config(**overrides)).to(dtype).eval())


def tiny_drafter(target: Target, seed: int = 0, **overrides) -> CTCDrafter:
    torch.manual_seed(seed)
    drafter = CTCDrafter.for_target(target.config, **{"frames": 5, "draft_length": 4, **overrides})
    return drafter.to(target.dtype).eval()


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor, least: float = 10.0) -> float:
    """Pearson's p-value; cells that expect fewer than `least` are put together."""
    counts, expected = counts.double(), expected.double()
    few = expected < least
    counts = torch.cat([counts[~few], counts[few].sum().unsqueeze(0)])
    expected = torch.cat([expected[~few], expected[few].sum().unsqueeze(0)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), (statistic / 2).float()))


class ScriptedDrafter(exactness.ScriptedDrafter):
    """With the vocabulary of the tiny targets."""

    def __init__(self, scripts: Sequence[Sequence[int]], wrong_after: int | Sequence[int], depth: int = 4):
        super().__init__(scripts, wrong_after, VOCABULARY, depth)
