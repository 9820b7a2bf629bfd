"""How often nodes were accepted that a drafter gave a probability: sums by bins of that probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ctc_drafter.decode.sampling import ARGMAX, Chooser
from ctc_drafter.decode.sequence import Row
from ctc_drafter.types import TokenTree

BINS = 20  # of equal width, from 0 to 1


@dataclass
class Calibration:
    """Of every bin: nodes that were verified, the sum of their probabilities, and how many were accepted."""

    nodes: list[float] = field(default_factory=lambda: [0.0] * BINS)
    predicted: list[float] = field(default_factory=lambda: [0.0] * BINS)
    accepted: list[float] = field(default_factory=lambda: [0.0] * BINS)

    def add(self, tree: TokenTree, wanted: torch.Tensor) -> None:
        """Counts a tree whose nodes the target follows with `wanted int64 [B, 1+N]`."""
        agrees = (tree.tokens == wanted.gather(1, tree.parents)) & tree.valid
        agrees[:, 0] = True
        on_path = ~(tree.ancestors & ~agrees.unsqueeze(1)).any(-1)
        counted = tree.valid[:, 1:]
        scores, reached = tree.scores[:, 1:][counted].exp().double(), on_path[:, 1:][counted].double()
        place = (scores * BINS).long().clamp(max=BINS - 1)
        self.nodes = [a + b for a, b in zip(self.nodes, totals(place, torch.ones_like(scores)), strict=True)]
        self.predicted = [a + b for a, b in zip(self.predicted, totals(place, scores), strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, totals(place, reached), strict=True)]


def totals(place: torch.Tensor, values: torch.Tensor) -> list[float]:
    """Sums of values `[N]` by bin, `int64 [N]`."""
    found: list[float] = torch.bincount(place, values, BINS).tolist()
    return found


@dataclass(frozen=True)
class Watched:
    """A chooser that counts what its trees promised. It takes time: not for runs that are timed."""

    calibration: Calibration
    chooser: Chooser = ARGMAX

    def check(self, row: Row, logits: torch.Tensor) -> None:
        self.chooser.check(row, logits)

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return self.chooser.next(logits, rows)

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        wanted = self.chooser.along(tree, logits, rows)
        self.calibration.add(tree, wanted)
        return wanted
