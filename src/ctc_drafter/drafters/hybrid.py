"""A trained drafter that is asked only where the text does not say itself how it goes on.

Where the newest tokens have stood before, and what followed them is likely to follow again, the draft is copied: it
costs nothing, and may be longer than what a network was trained to draft. Elsewhere the network drafts. The same
decision, by the length of the match: Hu et al., "SAM Decoding" (2024); Oliaro et al., "SuffixDecoding" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from ctc_drafter.drafters.lazy import LazySession
from ctc_drafter.drafters.lookup import LookupSession
from ctc_drafter.types import Candidates, Prefix, padded

# Tokens that a copied tree must be expected to get accepted, in every row. docs/log.md has what others gave.
ENOUGH = 1.5


class HybridSession:
    """See `DraftSession`. What is committed waits in `trained` until its network is asked."""

    def __init__(self, trained: LazySession, lookup: LookupSession):
        self.trained, self.lookup = trained, lookup

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.trained.extend(tokens, features, counts)  # first, as in `join`: where it raises, nothing has changed
        self.lookup.extend(tokens, features, counts)

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        copied = self.copied(root, nodes, floor)
        return self.trained.propose(root, nodes, floor) if copied is None else copied

    def copied(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates | None:
        """The copies alone; None where they promise too little in some row."""
        found = list(takewhile(sure, self.lookup.prefixes(root, nodes, floor)))
        return replace(padded(found, root.device), free=True) if len(found) == len(root) else None

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.trained.join(tokens, features, counts)  # first: for this one memory may not suffice
        self.lookup.join(tokens, features, counts)

    def select(self, rows: torch.Tensor) -> None:
        self.lookup.select(rows)
        self.trained.select(rows)


def sure(prefixes: Sequence[Prefix]) -> bool:
    """Whether enough of these tokens will be accepted, by their own probabilities."""
    return sum(math.exp(score) for _, score, _, _ in prefixes) >= ENOUGH
