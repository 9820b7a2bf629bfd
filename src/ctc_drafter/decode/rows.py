"""A row of text at work: its prompt, what it has emitted, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass
class Row:
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
        """All that processors and criteria may look at."""
        return [*(self.prompt if self.given is None else self.given), *self.tokens]

    @property
    def read(self) -> list[int]:
        """What the target has read, the newest token included."""
        return [*self.prompt, *self.tokens]

    @property
    def ended(self) -> bool:
        """Whether the newest token is an eos or the last one there is room for."""
        return len(self.tokens) >= self.limit or self.tokens[-1] in self.eos

    def ahead(self) -> Row:
        """The same row for a look ahead: what is appended to it leaves this one alone."""
        return replace(self, tokens=list(self.tokens))
