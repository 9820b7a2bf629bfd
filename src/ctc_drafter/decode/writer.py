"""Lets rows take what they emit, token by token, and says when each of them is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import StoppingCriteriaList

from ctc_drafter.decode.rows import Row
from ctc_drafter.decode.stats import Stats

OnTokens = Callable[[int, list[int]], None]


class Writer:
    """Rows end at their eos (which is kept), at their limit, or where a stopping criterion says so.

    Criteria are asked after every single token about the row's text up to it, `int64 [1, T]`, as plain decoding
    of that row would ask them; they get no scores. `on_tokens(row index, tokens)` is told what was kept.
    """

    def __init__(self, stats: Stats, on_tokens: OnTokens | None, criteria: StoppingCriteriaList, device: torch.device):
        self.stats, self.on_tokens, self.criteria, self.device = stats, on_tokens, criteria, device

    def start(self, rows: Sequence[Row], first: Sequence[int]) -> list[int]:
        """Takes the prefill's token of every row; returns the places in the batch that go on."""
        self.stats.tokens += len(first)
        return places(self._emit(row, [token]) for row, token in zip(rows, first, strict=True))

    def write(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], accepted: Sequence[int]) -> list[int]:
        """Takes one verification: `tokens[i][: accepted[i] + 1]` for place i; returns the places that go on."""
        alive = []
        for row, emitted, count in zip(rows, tokens, accepted, strict=True):
            before = len(row.tokens)
            alive.append(self._emit(row, emitted[: count + 1]))
            row.accepted.append(count)
            self.stats.count(count, len(row.tokens) - before)
        return places(alive)

    def _emit(self, row: Row, tokens: Sequence[int]) -> bool:
        kept: list[int] = []
        goes_on = True
        for token in tokens:
            row.tokens.append(token)
            kept.append(token)
            goes_on = not (row.ended or self._stopped(row))
            if not goes_on:
                break
        if self.on_tokens is not None:
            self.on_tokens(row.index, kept)
        return goes_on

    def _stopped(self, row: Row) -> bool:
        if not self.criteria:
            return False
        return bool(self.criteria(torch.tensor([row.text], device=self.device), None).all())


def places(alive: Iterable[bool]) -> list[int]:
    return [place for place, goes_on in enumerate(alive) if goes_on]
