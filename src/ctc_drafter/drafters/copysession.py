"""A block drafter at work that also copies from the text: it keeps each row's tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import pad

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.borrowed import Borrowed
from ctc_drafter.drafters.context import GROWTH
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


class TextBuffer:
    """Committed tokens of each row, `int64 [B, T]`, with room for one more; `lengths int64 [B]` of them count."""

    def __init__(self, batch_size: int, device: torch.device):
        self.tokens = torch.zeros(batch_size, GROWTH, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)

    def extend(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Appends the first `counts int64 [B]` of tokens `int64 [B, T]` to each row."""
        missing = int(self.lengths.max()) + tokens.shape[1] + 1 - self.tokens.shape[1]
        if missing > 0:
            self.tokens = pad(self.tokens, (0, -(-missing // GROWTH) * GROWTH))
        self.tokens.scatter_(1, self.lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device), tokens)
        self.lengths = self.lengths + counts

    def up_to(self, root: torch.Tensor) -> Text:
        """The texts, each with its root `int64 [B]` behind it."""
        self.tokens.scatter_(1, self.lengths.unsqueeze(1), root.unsqueeze(1))
        return Text(self.tokens, self.lengths)

    def join(self, other: TextBuffer) -> None:
        """Puts the rows of another one behind these."""
        size = max(self.tokens.shape[1], other.tokens.shape[1])
        self.tokens = torch.cat([pad(each.tokens, (0, size - each.tokens.shape[1])) for each in (self, other)])
        self.lengths = torch.cat([self.lengths, other.lengths])

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only these rows, `int64 [R]`."""
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]


class CopySession(BlockSession):
    """See `BlockSession`."""

    drafter: CopyingNetwork

    def __init__(self, drafter: CopyingNetwork, borrowed: Borrowed, batch_size: int):
        super().__init__(drafter, borrowed, batch_size)
        self.text = TextBuffer(batch_size, self.newest.device)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.extend`."""
        super().extend(tokens, features, counts)
        self.text.extend(tokens, counts)

    def propose(self, root: torch.Tensor, nodes: int, floor: float = 0.0) -> Candidates:
        """See `DraftSession.propose`."""
        text = self.text.up_to(root)
        return self.drafter.candidates(self.blocks(root), root, self.borrowed, nodes, floor, text)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        super().join(tokens, features, counts)
        new = TextBuffer(len(counts), counts.device)
        new.extend(tokens, counts)
        self.text.join(new)

    def select(self, rows: torch.Tensor) -> None:
        """See `DraftSession.select`."""
        super().select(rows)
        self.text.select(rows)
