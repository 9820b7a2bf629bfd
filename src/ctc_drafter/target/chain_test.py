"""Self-test of a target that can follow no tree: a chain behind a short prompt, rejected at every place in turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from ctc_drafter.target.cache import compact
from ctc_drafter.target.chain_cache import ApartCache, ChainCache, Reader
from ctc_drafter.target.self_test import (
    LARGEST,
    TOLERANCE,
    difference,
    prompt_length,
    rounds_coarsely,
    settings,
    thresholds,
    trial_tokens,
)
from ctc_drafter.target.stepped import mixers
from ctc_drafter.types import TokenTree, UserError, first_line

CHAIN = 5  # drafted tokens
# Right ones of them, step after step: every number, such that what was accepted is read again once and twice.
ACCEPTED = (2, 0, 5, 1, 3, 4, 0)
OTHERS = (0, 3, 1, 5, 2, 4, 0)  # of a row beside it; the last step is a plain one for both
READ = sum(ACCEPTED) + len(ACCEPTED)  # tokens of a trial
LONGEST = 64  # tokens of the longest prompt that is tried
# Closer than trees must be: an untrained Mamba that forgets its state is at 1e-3, right ones are at 1e-5 and below.
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4}
# Beyond it windows and chunks of the model's own cache and masks are trusted as they are; other lengths are not:
CHOICE = re.compile(
    r"^index\w*(topk|budget)|^keep_window_size$"
)  # attention to the best so many keys or blocks of them
BLOCK = 8  # keys in a block, at most, where it is tried
SCALE = re.compile(r"floor|original_max")  # what may be told from slots instead of positions


@dataclass(frozen=True)
class Chain:
    """How a model follows a chain, as trials found it. positions: whether it is told them. together: whether rows of
    different length may be read in one forward, else they are read one by one. stepped: see `stepped.py`."""

    positions: bool = True
    together: bool = True
    stepped: bool = False

    def new_cache(self, config: PreTrainedConfig, rows: int) -> ChainCache:
        """An empty cache of rows that are of one length."""
        return ChainCache.empty(config, rows)

    def of_rows(self, caches: Sequence[ChainCache]) -> ChainCache | ApartCache:
        """The cache of all these rows."""
        if not self.together:
            return ApartCache(caches)
        for cache in caches[1:]:
            caches[0].join(cache)
        return caches[0]


WAYS = (Chain(), Chain(stepped=True))


class Tried(Reader, Protocol):
    """The part of a `Target` that is tried."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_tokens(self) -> frozenset[int]: ...
    @property
    def switch(self) -> int | None: ...
    @property
    def chain(self) -> Chain | None: ...
    def new_cache(self, slots: int = 0) -> Any: ...


def find_chain(target: Callable[[Chain], Tried], no_tree: UserError) -> Chain:
    """How a target follows chains. Raises `UserError` where it can follow none either, with both reasons."""
    first = ""
    for way in WAYS:
        tried_so = target(way)
        if way.stepped and not mixers(tried_so.model):
            continue
        reason = why_no_chain(tried_so)
        if not reason:
            return replace(way, together=False) if way.together and why_not_together(tried_so) else way
        first = first or reason
    raise UserError(f"{no_tree}; {first}") from no_tree


def why_no_chain(target: Tried) -> str:
    """What is wrong with chains of a single row; empty where they are exact."""
    if target.switch is not None:
        return "chains are not read anew where longrope factors change"
    length, values = prompt_length(target), target.config.to_dict()
    choices = [BLOCK * value for name, value in settings(values) if CHOICE.search(name) and type(value) is int]
    if choices and max(choices) > LONGEST:
        return "nor is it tried on chains, which would take long texts"
    lengths = [length, *(each for each in (*thresholds(target.config), *choices) if length < each <= LONGEST)]
    return next((reason for each in lengths if (reason := tried(target, [each], [ACCEPTED]))), "")


def why_not_together(target: Tried) -> str:
    """What is wrong with chains of two rows of different length in one forward."""
    untried = [names for value, names in thresholds(target.config).items() if value > LONGEST]
    if any(map(SCALE.search, untried)):
        return f"{', '.join(untried)} may count slots"
    length = prompt_length(target)
    lengths = [length, *(each for each in thresholds(target.config) if length < each <= LONGEST)]
    pairs = ([each, max(1, each // 2)] for each in lengths)
    return next((reason for pair in pairs if (reason := tried(target, pair, [ACCEPTED, OTHERS]))), "")


def tried(target: Tried, lengths: Sequence[int], accepted: Sequence[Sequence[int]]) -> str:
    """Why a chain behind prompts of these lengths is no plain text; empty where it is."""
    name = type(target.model).__name__
    try:
        error, allowed = trial(target, lengths, accepted)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a model raises that was not made for this
        return f"{name} fails on a chain ({first_line(failure)})"
    if error <= allowed:
        return ""
    return f"{name} says something else over a chain than as plain text ({error:.2g}, {allowed:.2g} allowed)"


@torch.inference_mode()
def trial(target: Tried, lengths: Sequence[int], accepted: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The largest difference of a token that was read in chains, and how much is allowed; see `self_test.difference`.

    lengths: of the prompts. accepted: right tokens of each chain, for each prompt.
    """
    count = max(lengths) + READ + 1
    drawn = trial_tokens(2 * count, target.vocab_size).tolist()
    tokens = [token for token in drawn if token not in target.end_tokens][:count]  # `generate` would stop at those
    texts = [tokens[max(lengths) - length :] for length in lengths]
    plain = [stock_logits(target.model, text, length) for text, length in zip(texts, lengths, strict=True)]
    caches = []
    for text, length in zip(texts, lengths, strict=True):
        cache = target.new_cache()
        cache.feed(target, [text[:length]])
        cache.take()
        caches.append(cache)
    assert target.chain is not None
    cache = target.chain.of_rows(caches)

    places, largest = list(lengths), 0.0
    for turn, counts in enumerate(zip(*accepted, strict=True), 1):
        spans = zip(texts, places, counts, strict=True)
        size = CHAIN + 1 if turn < len(ACCEPTED) else 1  # models may compute a plain step by another path
        drafts = [
            drafted(text[place : place + CHAIN + 1], count, target.vocab_size)[:size] for text, place, count in spans
        ]
        nodes = torch.tensor(drafts, device=target.device)
        found = cache.verify(target, chain_tree(nodes)).logits
        for row, count in enumerate(counts):
            start = places[row] - lengths[row] + 1
            largest = max(largest, difference(found[row, : count + 1], plain[row][start : start + count + 1]))
            places[row] += count + 1
        done = torch.tensor(counts, device=target.device)
        compact(cache, done, 0, done.unsqueeze(1), done)
    allowed = (TOLERANCE | CLOSE).get(target.model.dtype, 1e-1)
    return largest, LARGEST if rounds_coarsely(target.model) else allowed


def drafted(text: Sequence[int], right: int, vocab_size: int) -> list[int]:
    """A root and a chain of which the first tokens are the text's, and the others are not."""
    padded = [*text, *[0] * (CHAIN + 1 - len(text))]
    return [token if place <= right else (token + 1) % vocab_size for place, token in enumerate(padded)]


def chain_tree(nodes: torch.Tensor) -> TokenTree:
    """The tree of a root and a chain behind it, `int64 [B, 1+N]`."""
    order = torch.arange(nodes.shape[1], device=nodes.device).expand_as(nodes)
    ancestors = (order.unsqueeze(2) >= order.unsqueeze(1)).clone()
    valid = torch.ones_like(nodes, dtype=torch.bool)
    return TokenTree(nodes, (order - 1).clamp(min=0), order, ancestors, valid, torch.zeros(nodes.shape))


class Forced(LogitsProcessor):
    """Makes `generate` write a given text, prompt included."""

    def __init__(self, text: Sequence[int]):
        self.text = text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        wanted = torch.arange(scores.shape[1], device=scores.device) == self.text[input_ids.shape[1]]
        return scores.masked_fill(~wanted, float("-inf")).masked_fill(wanted, 0)  # type: ignore[return-value]


def stock_logits(model: PreTrainedModel, text: Sequence[int], length: int) -> torch.Tensor:
    """Logits `[T, V]` after the first `length` tokens of a text and after each that follows, as transformers' own
    `generate` computes them, token by token."""
    row = torch.tensor([text[:length]], device=model.device)
    config = GenerationConfig(
        max_new_tokens=len(text) - length,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    forced = LogitsProcessorList([Forced(text)])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(row), "generation_config": config}
    return torch.cat(model.generate(row, logits_processor=forced, **options).logits)
