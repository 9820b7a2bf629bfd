"""A drafter session that takes in committed text when a draft needs it: plain steps then cost no drafting."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ctc_drafter.drafters.base import DraftSession
from ctc_drafter.types import Candidates


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
    """See `DraftSession`."""

    def __init__(self, session: DraftSession):
        self.session = session
        self.waiting: list[Committed] = []

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        new = Committed(tokens, features, counts)
        # What single tokens leave behind is taken in at once. Wider ones may be ragged.
        if self.waiting and tokens.shape[1] == 1 and self.waiting[-1].tokens.shape[1] == 1:
            self.waiting.append(new)
            return
        self.catch_up()
        self.waiting.append(new)

    def catch_up(self) -> None:
        if not self.waiting:
            return
        if len(self.waiting) == 1:
            only = self.waiting.pop()
            self.session.extend(only.tokens, only.features, only.counts)
            return
        tokens = torch.cat([each.tokens for each in self.waiting], 1)
        features = [each.features for each in self.waiting if each.features is not None]
        counts = torch.stack([each.counts for each in self.waiting]).sum(0)
        self.waiting = []
        self.session.extend(tokens, torch.cat(features, 1) if features else None, counts)

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        self.catch_up()
        return self.session.propose(root, nodes, floor)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.catch_up()
        self.session.join(tokens, features, counts)

    def select(self, rows: torch.Tensor) -> None:
        self.waiting = [each.select(rows) for each in self.waiting]
        self.session.select(rows)
