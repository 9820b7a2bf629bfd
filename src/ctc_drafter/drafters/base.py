"""The drafter and session protocols; `NoDrafter`; buffering of committed tokens until the next draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import nn

from ctc_drafter.types import Candidates, UserError

# What decoding asks of a drafter. Every method of this project sits behind these two protocols.


def refuse_call(drafter: object, *_given: object, **_options: object) -> NoReturn:
    """`__call__` of drafters: `generate` calls what stands in `custom_generate`, and ignores what cannot be called.

    Raises `UserError`.
    """
    name = type(drafter).__name__
    raise UserError(
        f"a {name} cannot be called; write custom_generate=speculate(drafter), from ctc_drafter import speculate"
    )


class DraftSession(Protocol):
    """A drafter at work on one batch. It owns whatever cache it keeps; rows keep their order."""

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Takes in tokens that have entered the target's cache.

        tokens `int64 [B, T]` and features `[B, T, K]` are left-aligned; row b has `counts[b]` of them.
        """

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """Prefixes after root `int64 [B]`, enough for a tree of `nodes` nodes of probability `min_probability` and
        more."""

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Adds rows behind those that are there, with these tokens to start with, as in `extend`. Where it raises, as
        when memory does not suffice, nothing has changed."""

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch, `int64 [R]`, in this order. Not asked before the first `extend`."""


class Drafter(Protocol):
    """A drafter that is loaded but not yet at work."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Target blocks whose outputs it reads, counted from 0; empty when it needs none."""

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """A new session that uses the target's frozen embedding and LM head modules."""


# A drafter that proposes nothing: plain decoding in a batch whose rows join and leave.


class NoDrafter:
    """See `Drafter`. It is its own session, since there is nothing to remember."""

    feature_layers: tuple[int, ...] = ()

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> NoDrafter:
        return self

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        return

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        return

    def select(self, rows: torch.Tensor) -> None:
        return

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        return Candidates.nothing(root)


# A drafter session that takes in committed text when a draft needs it: steps without one then cost no drafting.

MOST = 256  # tokens of a row that wait; features of more would fill memory


@dataclass(frozen=True)
class Committed:
    """Arguments of `DraftSession.extend`."""

    tokens: torch.Tensor
    features: torch.Tensor | None
    counts: torch.Tensor

    def select(self, rows: torch.Tensor) -> Committed:
        features = None if self.features is None else self.features[rows]
        return Committed(self.tokens[rows], features, self.counts[rows])


class LazySession:
    """See `DraftSession`. Where the inner session raises, what was committed goes on waiting, and nothing is lost."""

    def __init__(self, session: DraftSession):
        self.session = session
        self.begun = False  # whether the session was given any text
        self.waiting: list[Committed] = []

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.waiting.append(Committed(tokens, features, counts))
        if sum(each.tokens.shape[1] for each in self.waiting) > MOST:
            try:
                self.catch_up()
            except Exception:
                self.waiting.pop()
                raise

    def catch_up(self) -> None:
        if self.waiting:
            whole = end_to_end(self.waiting)
            self.session.extend(whole.tokens, whole.features, whole.counts)
            self.waiting, self.begun = [], True

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates:
        self.catch_up()
        return self.session.propose(root, nodes, min_probability)

    def copied(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        """What the session drafts for nothing, see `HybridSession`; None if it never does."""
        free = getattr(self.session, "copied", None)
        if free is None:
            return None
        self.catch_up()
        found: Candidates | None = free(root, nodes, min_probability)
        return found

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.catch_up()
        self.session.join(tokens, features, counts)

    def select(self, rows: torch.Tensor) -> None:
        if not self.begun:  # its rows are not there yet: whoever ends with a first token leaves before any draft
            self.catch_up()
        self.waiting = [each.select(rows) for each in self.waiting]
        self.session.select(rows)


def end_to_end(parts: Sequence[Committed]) -> Committed:
    """The parts, each row's after one another and left-aligned; widths add up, and the host is never asked."""
    if len(parts) == 1:
        return parts[0]
    tokens, counts = torch.cat([part.tokens for part in parts], 1), torch.stack([part.counts for part in parts]).sum(0)
    features = [part.features for part in parts if part.features is not None]
    whole = torch.cat(features, 1) if features else None
    there = [torch.arange(p.tokens.shape[1], device=counts.device) < p.counts.unsqueeze(1) for p in parts]
    order = (~torch.cat(there, 1)).byte().argsort(dim=1, stable=True)
    whole = None if whole is None else whole.gather(1, order.unsqueeze(-1).expand_as(whole))
    return Committed(tokens.gather(1, order), whole, counts)
