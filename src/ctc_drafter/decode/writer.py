"""Collects what rows emit and says when each of them is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ctc_drafter.decode.stats import Stats

OnTokens = Callable[[int, list[int]], None]


class Writer:
    """Rows of emitted tokens, cut at the first eos (which is kept) and at each row's limit."""

    def __init__(self, limits: Sequence[int], eos: Collection[int], stats: Stats, on_tokens: OnTokens | None):
        self.limits, self.eos, self.stats, self.on_tokens = limits, frozenset(eos), stats, on_tokens
        self.tokens: list[list[int]] = [[] for _ in limits]
        self.active = list(range(len(limits)))  # rows still in the batch, in its order

    def start(self, first: Sequence[int]) -> list[int]:
        """Takes the prefill's token of every row; returns the places in the batch that go on."""
        self.stats.tokens += len(first)
        return self._keep([self._emit(row, [token]) for row, token in zip(self.active, first, strict=True)])

    def write(self, tokens: Sequence[Sequence[int]], accepted: Sequence[int]) -> list[int]:
        """Takes one verification: `tokens[i][: accepted[i] + 1]` for place i; returns the places that go on."""
        alive = []
        for row, emitted, count in zip(self.active, tokens, accepted, strict=True):
            before = len(self.tokens[row])
            alive.append(self._emit(row, emitted[: count + 1]))
            self.stats.count(count, len(self.tokens[row]) - before)
        return self._keep(alive)

    def _emit(self, row: int, tokens: Sequence[int]) -> bool:
        kept = list(tokens[: self.limits[row] - len(self.tokens[row])])
        stop = next((i for i, token in enumerate(kept) if token in self.eos), None)
        if stop is not None:
            kept = kept[: stop + 1]
        self.tokens[row] += kept
        if self.on_tokens is not None:
            self.on_tokens(row, kept)
        return stop is None and len(self.tokens[row]) < self.limits[row]

    def _keep(self, alive: list[bool]) -> list[int]:
        places = [place for place, goes_on in enumerate(alive) if goes_on]
        self.active = [self.active[place] for place in places]
        return places
