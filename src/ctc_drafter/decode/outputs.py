"""`generate(..., output_scores=True, output_logits=True)`: logits and processed scores of each emitted token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import LogitsProcessorList

from ctc_drafter.decode.batch import Method
from ctc_drafter.decode.generate import run
from ctc_drafter.decode.processors import process
from ctc_drafter.decode.rows import Row
from ctc_drafter.types import TokenTree


@dataclass
class Chosen:
    """The logits `[n, V]` that tokens from the index `first` on were chosen from; more than were emitted, at first."""

    first: int
    logits: torch.Tensor


@dataclass(frozen=True)
class Record:
    """Keeps the logits of every emitted token of every row, by the rows' index. See `OnLogits`."""

    parts: dict[int, list[Chosen]] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        for row, own in zip(rows, logits, strict=True):
            parts = self.parts.setdefault(row.index, [])
            if parts:  # now it is known how many of them were emitted; a clone lets go of the rest
                parts[-1].logits = parts[-1].logits[: len(row.tokens) - parts[-1].first].clone()
            parts.append(Chosen(len(row.tokens), own))

    def of(self, row: Row) -> torch.Tensor:
        """`float32 [T, V]` of the row's T tokens."""
        return torch.cat([part.logits for part in self.parts[row.index]])[: len(row.tokens)].float()


@dataclass(frozen=True)
class Always:
    """A `Chooser` that writes the same token whatever the target says."""

    token: int

    def check(self, row: Row, logits: torch.Tensor) -> None:
        return

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return torch.full((len(rows),), self.token, device=logits.device)

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return torch.full_like(tree.tokens, self.token)


def emitted_logits(method: Method, record: Record, rows: Sequence[Row], filler: int) -> tuple[torch.Tensor, ...]:
    """Logits `float32 [B, V]` of each step up to the longest row's last.

    Stock `generate` goes on with rows that have ended, as if pad tokens were text, so pad tokens are written here as
    well.
    """
    width = max(len(row.tokens) for row in rows)
    padding = [Row(row.index, [*row.prompt, *row.tokens], width - len(row.tokens)) for row in rows]
    padding, after = [row for row in padding if row.limit], Record()
    if padding:
        run(replace(method, chooser=Always(filler)), padding, on_logits=after)
    tails = {row.index: [after.of(row)] for row in padding}
    return tuple(torch.stack([torch.cat([record.of(row), *tails.get(row.index, [])]) for row in rows]).unbind(1))


def scores_of(
    processors: LogitsProcessorList, logits: Sequence[torch.Tensor], rows: Sequence[Row], filler: int
) -> tuple[torch.Tensor, ...]:
    """Processed scores `float32 [B, V]` of each step, from its logits; rows that ended go on with pad tokens."""
    texts = [row.tokens + [filler] * (len(logits) - len(row.tokens)) for row in rows]
    return tuple(
        process(processors, each, [replace(row, tokens=text[:step]) for row, text in zip(rows, texts, strict=True)])
        for step, each in enumerate(logits)
    )
