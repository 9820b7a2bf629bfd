"""State of one sequence: prompt, output, stopping and streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import StoppingCriteriaList

from ctc_drafter.decode.stats import Stats

# Stopping and streaming: appends emitted tokens one by one, and finds rows that have ended.

OnTokens = Callable[[int, list[int]], None]


class OutputWriter:
    """Rows end at their eos (which is kept), at their limit, or where a stopping criterion says so.

    Criteria are asked after every single token about the row's text up to it, `int64 [1, T]`, as plain decoding
    of that row would ask them; they get no scores. `on_tokens(row index, tokens)` is told what was kept.
    """

    def __init__(self, stats: Stats, on_tokens: OnTokens | None, criteria: StoppingCriteriaList, device: torch.device):
        self.stats, self.on_tokens, self.criteria, self.device = stats, on_tokens, criteria, device

    def start(self, rows: Sequence[SequenceState], first: Sequence[int]) -> list[int]:
        """Takes the prefill's token of every row; returns the places in the batch that go on."""
        self.stats.tokens += len(first)
        return places(self._emit(row, [token]) for row, token in zip(rows, first, strict=True))

    def write(
        self, rows: Sequence[SequenceState], tokens: Sequence[Sequence[int]], accepted: Sequence[int]
    ) -> list[int]:
        """Takes one verification: `tokens[i][: accepted[i] + 1]` for place i; returns the places that go on."""
        alive = []
        for row, emitted, count in zip(rows, tokens, accepted, strict=True):
            before = len(row.tokens)
            alive.append(self._emit(row, emitted[: count + 1]))
            row.accepted.append(count)
            self.stats.count(count, len(row.tokens) - before)
        return places(alive)

    def _emit(self, row: SequenceState, tokens: Sequence[int]) -> bool:
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

    def _stopped(self, row: SequenceState) -> bool:
        if not self.criteria:
            return False
        return bool(self.criteria(torch.tensor([row.text], device=self.device), None).all())


def places(alive: Iterable[bool]) -> list[int]:
    return [place for place, goes_on in enumerate(alive) if goes_on]


# State of one sequence.


@dataclass
class SequenceState:
    """index: the prompt's place in the call, by which callers and seeds know it.
    prompt: what the target reads. limit: new tokens at most. eos: tokens that end the row.
    given: the prompt as processors and stopping criteria see it; `generate` shows them its padding.
    tokens: emitted so far, eos included. accepted: drafted tokens that each verification accepted.
    broken: whether the newest logits were no numbers, without a draft; then the next step is a plain one, too.
    """

    index: int
    prompt: Sequence[int]
    limit: int
    eos: frozenset[int] = frozenset()
    given: Sequence[int] | None = None
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    broken: bool = False

    @property
    def text(self) -> list[int]:
        """Prompt and emitted tokens, as processors and criteria see them."""
        return [*(self.prompt if self.given is None else self.given), *self.tokens]

    @property
    def read(self) -> list[int]:
        """Tokens that the target has read, the newest one included."""
        return [*self.prompt, *self.tokens]

    @property
    def ended(self) -> bool:
        """Whether the newest token is an eos or the last one there is room for."""
        return len(self.tokens) >= self.limit or self.tokens[-1] in self.eos

    def ahead(self) -> SequenceState:
        """A copy for a look ahead: appending to it does not change this one."""
        return replace(self, tokens=list(self.tokens))
