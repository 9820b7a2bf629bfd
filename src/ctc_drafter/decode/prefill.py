"""Runs the prompts through the target and picks each row's first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from ctc_drafter.target import Target
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class Prefill:
    """cache; lengths `int64 [B]`; tokens `int64 [B, T]`, right-padded; features `[B, T, K]`; root `int64 [B]`."""

    cache: Cache
    lengths: torch.Tensor
    tokens: torch.Tensor
    features: torch.Tensor | None
    root: torch.Tensor


def prefill(target: Target, prompts: Sequence[Sequence[int]], layers: Sequence[int] = ()) -> Prefill:
    """Raises `UserError` for an empty prompt, an unknown token, or a prompt that fills the context.

    Rows are padded on the right: causal attention keeps the padding from everything before it, and later
    masks hide its slots.
    """
    check_prompts(target, prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    width = max(len(prompt) for prompt in prompts)
    rows = [list(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(rows, device=target.device)
    positions = torch.arange(width, device=target.device).expand_as(tokens)
    ends, place = (lengths - 1).unique(return_inverse=True)
    cache = target.new_cache()
    result = target.forward(tokens, positions, cache, layers=layers, keep=ends)
    logits = result.logits[torch.arange(len(prompts), device=target.device), place]
    return Prefill(cache, lengths, tokens, result.features, logits.argmax(-1))


def check_prompts(target: Target, prompts: Sequence[Sequence[int]]) -> None:
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty; give at least one token")
        if len(prompt) >= target.context:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, but the target's context holds {target.context} "
                "including the answer; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
            raise UserError(f"prompt {row} holds a token outside the target's vocabulary of {target.vocab_size}")
