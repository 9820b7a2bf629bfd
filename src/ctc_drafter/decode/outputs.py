"""`generate(..., output_scores=True, output_logits=True)`: logits and processed scores of each emitted token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import LogitsProcessorList

from ctc_drafter.decode.batch import Method
from ctc_drafter.decode.choose import walk
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
class Dictated:
    """A `Chooser` that writes these texts, by the rows' index, whatever the target says."""

    texts: dict[int, list[int]]

    def check(self, row: Row, logits: torch.Tensor) -> None:
        return

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return torch.tensor([self.texts[row.index][len(row.tokens)] for row in rows], device=logits.device)

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return walk(tree, logits, rows, self.next)


def emitted_logits(method: Method, record: Record, rows: Sequence[Row], filler: int) -> tuple[torch.Tensor, ...]:
    """Logits `float32 [B, V]` of each step up to the longest row's last.

    Stock `generate` goes on with rows that have ended, as if pad tokens were text. So such rows are decoded anew, with
    their own tokens and then pad tokens dictated.
    """
    width = max(len(row.tokens) for row in rows)
    again = [
        replace(row, limit=width, eos=frozenset(), tokens=[], accepted=[]) for row in rows if len(row.tokens) < width
    ]
    anew, texts = Record(), padded(rows, filler, width)
    if again:
        run(replace(method, chooser=Dictated(texts)), again, on_logits=anew)
    found = {row.index: record.of(row) for row in rows} | {row.index: anew.of(row) for row in again}
    return tuple(torch.stack([found[row.index] for row in rows]).unbind(1))


def padded(rows: Sequence[Row], filler: int, width: int) -> dict[int, list[int]]:
    """What `generate` returns of each row, by its index."""
    return {row.index: row.tokens + [filler] * (width - len(row.tokens)) for row in rows}


def scores_of(
    processors: LogitsProcessorList, logits: Sequence[torch.Tensor], rows: Sequence[Row], filler: int
) -> tuple[torch.Tensor, ...]:
    """Processed scores `float32 [B, V]` of each step, from its logits; rows that ended go on with pad tokens."""
    texts = padded(rows, filler, len(logits))
    return tuple(
        process(processors, each, [replace(row, tokens=texts[row.index][:step]) for row in rows])
        for step, each in enumerate(logits)
    )
