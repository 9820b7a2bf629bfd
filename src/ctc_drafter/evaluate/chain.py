"""Chains: of what a drafter proposes, the one path that is worth most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ctc_drafter.decode.tree import best_chain
from ctc_drafter.drafters.base import Drafter, DraftSession, refuse_call
from ctc_drafter.types import Candidates

POOL = 64  # prefixes among which the path is looked for, as in the held-out β of training


@dataclass(frozen=True)
class Chained:
    """A drafter that proposes a single path: the one with the largest sum of prefix probabilities.

    That is the chain of which most tokens will be accepted, by the drafter's belief; following the likeliest child from
    the root down can miss it. It is looked for among the `POOL` best prefixes. Method after method pays for these, so γ
    of chains says less than β.
    """

    drafter: Drafter

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.drafter.feature_layers

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> ChainedSession:
        """See `Drafter.begin`."""
        return ChainedSession(self.drafter.begin(embed, head, batch_size))


class ChainedSession:
    """See `DraftSession`."""

    def __init__(self, inner: DraftSession):
        self.inner = inner
        self.extend, self.join, self.select = inner.extend, inner.join, inner.select

    def propose(self, root: torch.Tensor, nodes: int, floor: float) -> Candidates:
        found = self.inner.propose(root, max(nodes, POOL), floor)
        return best_chain(found) if found.tokens.shape[1] else found
