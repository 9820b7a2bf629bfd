"""A block drafter at work that also copies from the text: it keeps each row's tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import pad

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.borrowed import Borrowed
from ctc_drafter.drafters.session import BlockNetwork, BlockSession
from ctc_drafter.types import Candidates


class CopyingNetwork(BlockNetwork, Protocol):
    """A `BlockNetwork` whose search may copy."""

    def candidates(
        self,
        blocks: torch.Tensor,
        root: torch.Tensor,
        borrowed: Borrowed,
        nodes: int,
        floor: float = 0.0,
        text: Text | None = None,
    ) -> Candidates: ...


class CopySession(BlockSession):
    """See `BlockSession`. tokens `int64 [B, S]`: each row's text; the context knows how long it is."""

    drafter: CopyingNetwork

    def __init__(self, drafter: CopyingNetwork, borrowed: Borrowed, batch_size: int):
        super().__init__(drafter, borrowed, batch_size)
        self.tokens = self.context.lengths.new_zeros(batch_size, 0)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.extend`."""
        places = self.context.lengths
        super().extend(tokens, features, counts)
        self.tokens = self._written(self.tokens, places, tokens)

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        """See `DraftSession.propose`."""
        blocks = self.blocks(root)  # which makes room behind the context
        return self.drafter.candidates(blocks, root, self.borrowed, nodes, floor, self.text_up_to(root))

    def text_up_to(self, root: torch.Tensor) -> Text:
        """The texts, each with its root `int64 [B]` behind it."""
        self.tokens = self._written(self.tokens, self.context.lengths, root.unsqueeze(1))
        return Text(self.tokens, self.context.lengths)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        width = max(self.tokens.shape[1], tokens.shape[1])
        joined = torch.cat([pad(each, (0, width - each.shape[1])) for each in (self.tokens, tokens)])
        super().join(tokens, features, counts)
        self.tokens = joined

    def select(self, rows: torch.Tensor) -> None:
        """See `DraftSession.select`."""
        super().select(rows)
        self.tokens = self.tokens[rows]

    def _written(self, text: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The text with tokens `int64 [B, T]` from `places int64 [B]` on."""
        text = self._roomy(text)
        return text.scatter_(1, places.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device), tokens)

    def _roomy(self, text: torch.Tensor) -> torch.Tensor:
        """With as many places as the context has slots: it has room for what is committed, and grows without asking."""
        missing = self.context.states.shape[4] - text.shape[1]
        return pad(text, (0, missing)) if missing else text
