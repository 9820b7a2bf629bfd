"""Rows of one batch that choose their tokens under settings of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from ctc_drafter.decode.choose import Chooser
from ctc_drafter.decode.rows import Row
from ctc_drafter.types import TokenTree

Ask = Callable[[Chooser, torch.Tensor, Sequence[Row]], torch.Tensor]


@dataclass(frozen=True)
class ByRow:
    """A `Chooser`: `of(row)` chooses for that row. Rows of the same chooser go through it together."""

    of: Callable[[Row], Chooser]

    def check(self, row: Row, logits: torch.Tensor) -> None:
        self.of(row).check(row, logits)

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return self._each(rows, logits.device, lambda own, places, some: own.next(logits[places], some))

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return self._each(
            rows, logits.device, lambda own, places, some: own.along(taken(tree, places), logits[places], some)
        )

    def _each(self, rows: Sequence[Row], device: torch.device, ask: Ask) -> torch.Tensor:
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(id(self.of(row)), []).append(place)
        answers = []
        for places in groups.values():
            some = [rows[place] for place in places]
            answers.append(ask(self.of(some[0]), torch.tensor(places, device=device), some))
        order = torch.tensor([place for places in groups.values() for place in places], device=device)
        return torch.cat(answers)[order.argsort()]


def taken(tree: TokenTree, places: torch.Tensor) -> TokenTree:
    """The trees of these rows of the batch."""
    return TokenTree(*(getattr(tree, field.name)[places] for field in fields(tree)))
