"""Prefill: prompts into the KV cache, features and first logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.target.cache import filled, join, keeps_all
from ctc_drafter.target.chain_test import Chain
from ctc_drafter.target.features import HOOKS
from ctc_drafter.target.model import Target
from ctc_drafter.target.row_cache import RowCache
from ctc_drafter.types import UserError

CHUNK = 512  # tokens of a forward


@dataclass(frozen=True)
class Prefill:
    """Result of the prefill.

    cache; lengths `int64 [B]`; tokens `int64 [B, T]`, right-padded; features `[B, T, K]`, None if none were
    requested; logits `[B, V]` of the token after each prompt; shift `int64 [B]` or `[P, B]` where pictures have other
    positions than tokens, see `Target.forward`.
    """

    cache: Cache | RowCache
    lengths: torch.Tensor
    tokens: torch.Tensor
    features: torch.Tensor | None
    logits: torch.Tensor
    shift: torch.Tensor | None = None


def prefill(
    target: Target,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int] = (),
    first: int = 0,
    longest_short: int | None = None,
    begun: Beginning | None = None,
) -> Prefill:
    """Raises `UserError` for an empty prompt, an unknown token, or a prompt that fills the context.

    first: the number that errors give the first prompt. longest_short: tokens up to which a prompt is read with the
    short factors of a longrope target; the target's own `switch` if it is not given. begun: what all prompts begin
    with, which is copied instead of read again; it is for callers who want no features.

    Rows are padded on the right: causal attention keeps the padding from everything before it, and later
    masks hide its slots. It repeats the row's last token: masks give padding weight 0, and 0 times NaN is NaN, so
    a token that the target cannot compute must not be there unless the prompt holds it. Long prompts go through in
    chunks, so that no mask and no attention matrix is as wide as the prompt in both directions.
    """
    check_prompts(target, prompts, first)
    if target.chain is not None:
        return prefill_apart(target, target.chain, prompts, layers)
    if target.alone and len(prompts) > 1:
        return side_by_side([prefill(target, [prompt], layers, first, longest_short) for prompt in prompts])
    width = max(len(prompt) for prompt in prompts)
    rows = [list(prompt) + [prompt[-1]] * (width - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(rows, device=target.device)
    positions = torch.arange(width, device=target.device).expand_as(tokens)
    cache, read = target.new_cache(width), 0
    if begun is not None:
        cache, read = filled(cache, begun.cache, len(prompts), len(begun.tokens)), len(begun.tokens)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    short = target.switch if longest_short is None else longest_short
    long = None if short is None else (lengths > short).unsqueeze(1)
    ends = [len(prompt) - 1 for prompt in prompts]
    logits: list[torch.Tensor | None] = [None] * len(prompts)
    features: list[torch.Tensor] = []
    for start in range(read, width, CHUNK):
        part = slice(start, min(start + CHUNK, width))
        here = sorted({end for end in ends if part.start <= end < part.stop})
        keep = torch.tensor(here or [part.stop - 1], device=target.device) - start  # no model is asked for nothing
        own = [here.index(end) if part.start <= end < part.stop else 0 for end in ends]
        with one_column_each(target, own, len(keep)):
            result = target.forward(tokens[:, part], positions[:, part], cache, layers=layers, keep=keep, long=long)
        for row, end in enumerate(ends):
            if part.start <= end < part.stop:
                logits[row] = result.logits[row, own[row] if result.logits.shape[1] > 1 else 0]
        features += [result.features] if result.features is not None else []
    return Prefill(
        cache,
        lengths,
        tokens,
        torch.cat(features, 1) if features else None,
        torch.stack([own for own in logits if own is not None]),
    )


def side_by_side(parts: Sequence[Prefill]) -> Prefill:
    """Prompts that were read one by one, as one batch."""
    cache, width = parts[0].cache, max(part.tokens.shape[1] for part in parts)
    for part in parts[1:]:
        join(cache, part.cache)
    # Padding repeats the last token, as `prefill` has it.
    index = [torch.arange(width, device=part.tokens.device).clamp(max=part.tokens.shape[1] - 1) for part in parts]
    features = [part.features[:, own] for part, own in zip(parts, index, strict=True) if part.features is not None]
    return Prefill(
        cache,
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.tokens[:, own] for part, own in zip(parts, index, strict=True)]),
        torch.cat(features) if features else None,
        torch.cat([part.logits for part in parts]),
    )


# What all prompts begin with (a system prompt, say) is read once, and copied into each row.

FORWARD = 64  # tokens of a prefill that cost about what another forward does


@dataclass(frozen=True)
class Beginning:
    """Tokens that were read, and a cache of one row with their keys and values."""

    tokens: list[int]
    cache: Cache


def shared_by(texts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all texts begin with."""
    ordered = sorted(map(list, texts))  # the first and the last one differ first
    pairs = enumerate(zip(ordered[0], ordered[-1], strict=False))
    return ordered[0][: next((place for place, (one, other) in pairs if one != other), len(ordered[0]))]


def beginning(target: Target, prompts: Sequence[Sequence[int]], known: Beginning | None = None) -> Beginning | None:
    """What all of these prompts begin with: the part that they share with what is `known` already, else read now; None
    where that saves nothing. Each prompt keeps a token of its own, which is read with the rest."""
    if target.alone:
        return None
    most = min(map(len, prompts)) - 1
    if known is not None:
        shared = shared_by([known.tokens, *prompts])[:most]
        if len(shared) * len(prompts) >= FORWARD:
            return Beginning(shared, known.cache)
    shared = shared_by(prompts)[:most]
    # Under longrope what a beginning is depends on how long the text becomes.
    no_parts = target.switch is not None or target.chain is not None
    if no_parts or len(shared) * (len(prompts) - 1) < FORWARD:
        return None
    cache = prefill(target, [shared]).cache
    return Beginning(shared, cache) if keeps_all(cache) else None


def prefill_apart(
    target: Target, chain: Chain, prompts: Sequence[Sequence[int]], layers: Sequence[int] = ()
) -> Prefill:
    """`prefill` of targets that follow chains: prompt after prompt, since padding would enter a recurrent state."""
    caches, logits, features = [], [], []
    size = max(map(len, prompts)) if chain.stepped else CHUNK  # a second part would be read token by token
    for prompt in prompts:
        cache = target.new_cache()
        for start in range(0, len(prompt), size):
            part = list(prompt[start : start + size])
            last = torch.tensor([len(part) - 1], device=target.device)
            result = cache.feed(target, [part], layers, last)
            cache.take()
            features += [result.features] if result.features is not None else []
        caches.append(cache)
        logits.append(result.logits[0, -1])
    width = max(map(len, prompts))
    rows = [[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in prompts]
    return Prefill(
        chain.of_rows(caches),
        torch.tensor([len(prompt) for prompt in prompts], device=target.device),
        torch.tensor(rows, device=target.device),
        padded_features(features, prompts) if features else None,
        torch.stack(logits),
    )


def padded_features(parts: Sequence[torch.Tensor], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Features `[B, T, K]`, of parts `[1, t, K]` of one prompt after the other."""
    whole = torch.cat(list(parts), 1)[0].split([len(prompt) for prompt in prompts])
    return nn.utils.rnn.pad_sequence(list(whole), batch_first=True)


@contextmanager
def one_column_each(target: Target, columns: Sequence[int], kept: int) -> Iterator[None]:
    """While open, the LM head reads one of the `kept` columns of each row alone, and gives logits `[B, 1, V]`.

    Else every row would have the logits of every row's end. Models that do not call their head as a module, or that
    take no `logits_to_keep`, compute all of them as before.
    """
    if kept == 1 or not target.slices_logits:
        yield
        return
    owner, rows = threading.get_ident(), len(columns)

    def pick(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = inputs[0] if inputs else None
        if threading.get_ident() != owner or not torch.is_tensor(states) or states.shape[:-1] != (rows, kept):
            return None
        places = torch.arange(rows, device=states.device), torch.tensor(columns, device=states.device)
        return states[places].unsqueeze(1), *inputs[1:]

    with HOOKS:
        handle = target.head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        with HOOKS:
            handle.remove()


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


def reread(target: Target, cache: Cache | RowCache, lengths: torch.Tensor, rows: Sequence[SequenceState]) -> None:
    """Reads the rows that have come to `Target.reread_at` tokens, of `lengths int64 [B]`, anew with the long factors.

    Stock `generate` does so for Phi-3 and its like. The cache then holds their committed tokens, the root not
    included, as a prompt that is longer would have left them.
    """
    if target.reread_at is None or isinstance(cache, RowCache):
        return
    places = (lengths == target.reread_at).nonzero().squeeze(1)
    if not len(places):
        return
    texts = [rows[place].read[: target.reread_at] for place in places.tolist()]
    fresh = prefill(target, texts, longest_short=0).cache
    assert not isinstance(fresh, RowCache)
    for layer, new in zip(cache.layers, fresh.layers, strict=True):
        if layer.keys is not None:
            layer.keys[places, :, : target.reread_at] = new.keys[:, :, : target.reread_at]
            layer.values[places, :, : target.reread_at] = new.values[:, :, : target.reread_at]


PADDING = 64  # tokens of a prefill, or a quarter of it: what another forward costs, about
LARGEST = 4096  # tokens of a prefill of several rows


def prefill_groups(rows: Sequence[SequenceState]) -> Iterator[list[SequenceState]]:
    """Groups of neighbours that are prefilled together: little padding, and not too much at a time."""
    group: list[SequenceState] = []
    for row in rows:
        sizes = [len(each.prompt) for each in (*group, row)]
        padded = max(sizes) * len(sizes)
        if group and (padded > LARGEST or padded - sum(sizes) > max(PADDING, padded // 4)):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
