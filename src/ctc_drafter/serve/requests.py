"""One completion in progress, and its events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ctc_drafter.chat import AnswerText
from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stats
from ctc_drafter.types import UserError

# One completion in progress, and its events.


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the target's own probabilities, before temperature and top-p: of the token that was
    written, and of the likeliest ones as (token, logarithm)."""

    written: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenOutput:
    """A token of the answer, which begins at character `offset` and ends at `end`. text: what could be shown when it
    was there, which is nothing while a character is unfinished."""

    token: int
    text: str
    offset: int
    end: int
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Node:
    """A node of a verified tree; parents come first, the root is its own parent. probability: of its prefix, under
    the drafter. accepted: whether the target went through it."""

    token: int
    parent: int
    depth: int
    probability: float
    accepted: bool


@dataclass(frozen=True)
class StepOutput:
    """Event of one step: the tokens that a verification, or the prefill, gave a row.

    text: what may be shown now. tokens: those whose text has been shown. accepted: drafted tokens that the target
    accepted. bonus: whether the last token is the target's own. seconds: since the row was admitted.
    """

    text: str
    tokens: tuple[TokenOutput, ...]
    accepted: int = 0
    bonus: bool = False
    seconds: float = 0.0
    tree: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer: the text that was held back, why it ended (`stop` or `length`), and its figures.

    ids: all tokens that were written, the end token and a stop string's included.
    """

    text: str
    tokens: tuple[TokenOutput, ...]
    reason: Literal["stop", "length"]
    stats: Stats
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failure:
    """The answer cannot go on. reason: `timeout`, `shutdown` or `error`."""

    reason: Literal["timeout", "shutdown", "error"]
    message: str


ERROR = Failure("error", "decoding failed; the server's log says why")


def failure(error: Exception) -> Failure:
    """The event of a failed row: the message of a `UserError`, else a reference to the server's log."""
    return Failure("error", " ".join(str(error).split())) if isinstance(error, UserError) else ERROR


Event = StepOutput | Finish | Failure


@dataclass(eq=False)
class Completion(SequenceState):
    """A row, with: `index` the choice's number in its request, by which seeds go.

    method: name of the one that decodes it. shown: its text. deliver: told every event, from the engine's thread.
    top: likeliest tokens to report with each token's own log-probability, None for neither. trace: whether outputs
    carry trees. deadline: by `time.monotonic`. cancelled: set from any thread when nobody waits any more.
    """

    sampler: Sampler = ARGMAX
    method: str = ""
    shown: AnswerText = field(kw_only=True)
    deliver: Callable[[Event], None] = lambda _event: None
    top: int | None = None
    trace: bool = False
    deadline: float = float("inf")
    cancelled: bool = False
    stats: Stats = field(default_factory=Stats)
    begin: float = 0.0
    unshown: list[TokenOutput] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.shown.stopped or self.ended

    def write(self, token: int, logprobs: Logprobs | None) -> str:
        """Appends a token; returns what may be shown now."""
        self.tokens.append(token)
        offset = self.shown.length
        text = self.shown.push(token)
        if self.top is not None or self.trace:
            self.unshown.append(TokenOutput(token, text, offset, self.shown.length, logprobs))
        return text

    def released(self) -> tuple[TokenOutput, ...]:
        """Tokens whose text has been shown since the last call."""
        count = sum(written.end <= self.shown.shown for written in self.unshown)
        done, self.unshown = self.unshown[:count], self.unshown[count:]
        return tuple(done)

    def finish(self) -> Finish:
        text = self.shown.close() if not self.shown.stopped else ""
        self.stats.seconds = time.perf_counter() - self.begin
        stopped = self.shown.stopped or self.tokens[-1] in self.eos
        return Finish(text, self.released(), "stop" if stopped else "length", self.stats, tuple(self.tokens))
