"""A drafter that proposes nothing: plain decoding in a batch whose rows join and leave."""

from __future__ import annotations

import torch
from torch import nn

from ctc_drafter.drafters.base import refuse_call
from ctc_drafter.types import Candidates


class Silent:
    """See `Drafter`. It is its own session, since there is nothing to remember."""

    feature_layers: tuple[int, ...] = ()

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> Silent:
        return self

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        return

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        return

    def select(self, rows: torch.Tensor) -> None:
        return

    def propose(self, root: torch.Tensor, nodes: int, floor: float) -> Candidates:
        return Candidates.nothing(root)
