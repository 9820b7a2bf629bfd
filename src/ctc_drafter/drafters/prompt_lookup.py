"""Prompt lookup: drafts copied from the sequence's own text after matching n-grams.

Source: Saxena, "Prompt Lookup Decoding" (2023); `prompt_lookup_num_tokens` of transformers. There the first match of
the longest n-gram gives one chain. Here all matches give a tree, with probabilities to choose its nodes by:

    P(v | prefix) = weight of matches that go on with v / (weight of matches that go on + prior / length)

A match weighs `RECENCY` times the one after it in the text, and `SHORTER` for each token that its n-gram is shorter
than the longest one. `length` is that of the longest n-gram plus the tokens already copied: the longer the agreement,
the surer the next token, as in prediction by partial matching.

Worked example, `longest` 2, text `a b c a b d`, root `a`: the newest n-gram `d a` is nowhere, `a` is at 0 and 3. Both
go on with b, then the later one with d, weight 1, the earlier one with c, .8: b .47 = 1.8 / (1.8 + 2), bd .17, bc .14.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from torch import nn

from ctc_drafter.drafters.base import refuse_call
from ctc_drafter.types import Candidates, Prefix, UserError, padded

PRIOR = 2.0
RECENCY = 0.8
SHORTER = 0.25
MATCHES = 16  # newest ones that are looked at, for each length of n-gram
# Tokens that a copied tree must be expected to get accepted, in every row. docs/log.md has what others gave.
ENOUGH = 1.5


@dataclass(frozen=True)
class PromptLookup:
    """A drafter without weights. longest: tokens of the longest n-gram; draft_length: most tokens to copy."""

    longest: int = 8
    draft_length: int = 15

    def __post_init__(self) -> None:
        for name in ("longest", "draft_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return ()

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> LookupSession:
        """See `Drafter.begin`."""
        return LookupSession(self, [Text(self.longest) for _ in range(batch_size)])


class Text:
    """A row's committed tokens, `int64` with room behind them. It is read whole at each draft: no index to keep."""

    def __init__(self, longest: int):
        self.longest, self.size = longest, 0
        self.tokens = np.zeros(256, np.int64)

    def extend(self, tokens: Sequence[int]) -> None:
        end = self.size + len(tokens)
        if end >= len(self.tokens):  # the root needs a place, too
            self.tokens = np.concatenate([self.tokens, np.zeros(end, np.int64)])
        self.tokens[self.size : end] = tokens
        self.size = end

    def up_to(self, root: int) -> np.ndarray:
        """The text with the root behind it, `int64`."""
        self.tokens[self.size] = root
        return self.tokens[: self.size + 1]

    def matches(self, root: int) -> tuple[list[tuple[int, float]], int]:
        """Continuations of earlier n-gram matches, newest first, with their weights; size of the longest match."""
        text = self.up_to(root)
        agrees, lengths = np.ones(self.size, np.bool_), np.zeros(self.size, np.int64)
        for back in range(min(self.longest, self.size)):  # place p: do the tokens up to p read like the newest ones?
            agrees[:back] = False
            agrees[back:] &= text[: self.size - back] == text[self.size - back]
            lengths += agrees
        best = int(lengths.max(initial=0))
        weights: dict[int, float] = {}
        for size in range(best, 0, -1):
            places = np.flatnonzero(lengths >= size)[-MATCHES:].tolist()
            for age, place in enumerate(reversed(places)):
                weights.setdefault(place + 1, RECENCY**age * SHORTER ** (best - size))
        return sorted(weights.items(), reverse=True), best

    def prefixes(self, root: int, count: int, depth: int, min_probability: float) -> list[Prefix]:
        """The `count` best prefixes of probability `min_probability` and more, best first and parents before
        children."""
        matches, length = self.matches(root)
        tokens = self.up_to(root)
        found: list[Prefix] = []
        waiting: list[tuple[float, int, int, int, int, list[tuple[int, float]]]] = []
        order = 0

        def offer(parent: int, level: int, score: float, group: list[tuple[int, float]]) -> None:
            nonlocal order
            branches: dict[int, list[tuple[int, float]]] = {}
            for place, weight in group:
                if place < len(tokens):
                    branches.setdefault(int(tokens[place]), []).append((place + 1, weight))
            total = sum(weight for branch in branches.values() for _, weight in branch) + PRIOR / (length + level)
            for token, branch in branches.items():  # the newest match stands first, and wins among equals
                child = score + math.log(sum(weight for _, weight in branch) / total)
                if child >= least:
                    order += 1
                    heapq.heappush(waiting, (-child, order, token, parent, level + 1, branch))

        least = math.log(min_probability) if min_probability else -math.inf
        if length:
            offer(-1, 0, 0.0, matches)
        while waiting and len(found) < count:
            negative, _, token, parent, level, group = heapq.heappop(waiting)
            found.append((token, -negative, parent, level))
            if level < depth:
                offer(len(found) - 1, level, -negative, group)
        return found


class LookupSession:
    """See `DraftSession`. Works on the host."""

    def __init__(self, drafter: PromptLookup, rows: list[Text]):
        self.drafter, self.rows = drafter, rows

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        for row, new, count in zip(self.rows, tokens.tolist(), counts.tolist(), strict=True):
            row.extend(new[:count])

    def free(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        return None

    def sure(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        """`propose` where the copies are promising in every row, as `free` candidates; else None: ask a network."""
        found = list(takewhile(promising, self.prefixes(root, nodes, min_probability)))
        return replace(padded(found, root.device), free=True) if len(found) == len(root) else None

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates:
        return padded(list(self.prefixes(root, nodes, min_probability)), root.device)

    def prefixes(self, root: torch.Tensor, nodes: int, min_probability: float) -> Iterator[list[Prefix]]:
        """`propose`, row by row and on the host."""
        for row, token in zip(self.rows, root.tolist(), strict=True):
            yield row.prefixes(token, nodes, self.drafter.draft_length, min_probability)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        new = LookupSession(self.drafter, [Text(self.drafter.longest) for _ in counts])
        new.extend(tokens, features, counts)
        self.rows += new.rows

    def select(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]


def promising(prefixes: Sequence[Prefix]) -> bool:
    """Whether enough of these tokens will be accepted, by their own probabilities, for a network not to be asked."""
    return sum(math.exp(score) for _, score, _, _ in prefixes) >= ENOUGH
