"""Prefill: prompts into the KV cache, features and first logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

CHUNK = 512  # tokens of a forward


@dataclass(frozen=True)
class Prefill:
    """Result of the prefill.

    cache; lengths `int64 [B]`; tokens `int64 [B, T]`, right-padded; features `[B, T, K]`, None if none were
    requested; logits `[B, V]` of the token after each prompt.
    """

    cache: Cache
    lengths: torch.Tensor
    tokens: torch.Tensor
    features: torch.Tensor | None
    logits: torch.Tensor


def prefill(
    target: Target,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int] = (),
    first: int = 0,
    longest_short: int | None = None,
) -> Prefill:
    """Raises `UserError` for an empty prompt, an unknown token, or a prompt that fills the context.

    first: the number that errors give the first prompt. longest_short: tokens up to which a prompt is read with the
    short factors of a longrope target; the target's own `switch` if it is not given.

    Rows are padded on the right: causal attention keeps the padding from everything before it, and later
    masks hide its slots. It repeats the row's last token: masks give padding weight 0, and 0 times NaN is NaN, so
    a token that the target cannot compute must not be there unless the prompt holds it. Long prompts go through in
    chunks, so that no mask and no attention matrix is as wide as the prompt in both directions.
    """
    check_prompts(target, prompts, first)
    width = max(len(prompt) for prompt in prompts)
    rows = [list(prompt) + [prompt[-1]] * (width - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(rows, device=target.device)
    positions = torch.arange(width, device=target.device).expand_as(tokens)
    cache = target.new_cache(width)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    short = target.switch if longest_short is None else longest_short
    long = None if short is None else (lengths > short).unsqueeze(1)
    ends = sorted({len(prompt) - 1 for prompt in prompts})
    logits: dict[int, torch.Tensor] = {}
    features: list[torch.Tensor] = []
    for start in range(0, width, CHUNK):
        part = slice(start, min(start + CHUNK, width))
        here = [end for end in ends if part.start <= end < part.stop]
        keep = torch.tensor(here or [part.stop - 1], device=target.device) - start  # no model is asked for nothing
        result = target.forward(tokens[:, part], positions[:, part], cache, layers=layers, keep=keep, long=long)
        logits |= {end: result.logits[:, column] for column, end in enumerate(here)}
        features += [result.features] if result.features is not None else []
    return Prefill(
        cache,
        lengths,
        tokens,
        torch.cat(features, 1) if features else None,
        torch.stack([logits[len(prompt) - 1][row] for row, prompt in enumerate(prompts)]),
    )


def check_prompts(target: Target, prompts: Sequence[Sequence[int]], first: int = 0) -> None:
    """Raises `UserError` for prompts that cannot be decoded; `first` is the number of the first one."""
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    for row, prompt in enumerate(prompts, first):
        if not prompt:
            raise UserError(f"prompt {row} is empty; give at least one token")
        if len(prompt) > target.limit:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, but the target has {target.limit} positions for it and the "
                "answer; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
            raise UserError(f"prompt {row} holds a token outside the target's vocabulary of {target.vocab_size}")


def reread(target: Target, cache: Cache, lengths: torch.Tensor, rows: Sequence[SequenceState]) -> None:
    """Reads the rows that have come to `Target.reread_at` tokens, of `lengths int64 [B]`, anew with the long factors.

    Stock `generate` does so for Phi-3 and its like. The cache then holds their committed tokens, the root not
    included, as a prompt that is longer would have left them.
    """
    if target.reread_at is None:
        return
    places = (lengths == target.reread_at).nonzero().squeeze(1)
    if not len(places):
        return
    texts = [rows[place].read[: target.reread_at] for place in places.tolist()]
    fresh = prefill(target, texts, longest_short=0).cache
    for layer, new in zip(cache.layers, fresh.layers, strict=True):
        if layer.keys is not None:
            layer.keys[places, :, : target.reread_at] = new.keys[:, :, : target.reread_at]
            layer.values[places, :, : target.reread_at] = new.values[:, :, : target.reread_at]
