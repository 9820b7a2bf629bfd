"""`generate(..., output_scores=True, output_logits=True)`: logits and processed scores of each emitted token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import LogitsProcessorList

from ctc_drafter.decode.prefill import CHUNK
from ctc_drafter.decode.processors import process
from ctc_drafter.decode.rows import Row
from ctc_drafter.target import Target


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


def emitted_logits(target: Target, record: Record, rows: Sequence[Row], filler: int) -> tuple[torch.Tensor, ...]:
    """Logits `float32 [B, V]` of each step up to the longest row's last.

    Stock `generate` goes on with rows that have ended, as if pad tokens were text; so what it says of them is read here
    from the text with its padding.
    """
    width = max(len(row.tokens) for row in rows)
    whole = []
    for row in rows:
        own, ended = record.of(row), len(row.tokens)
        if ended < width:
            text = [*row.prompt, *row.tokens, *[filler] * (width - ended - 1)]
            own = torch.cat([own, logits_after(target, text, len(row.prompt) + ended - 1)])
        whole.append(own)
    return tuple(torch.stack(whole).unbind(1))


def logits_after(target: Target, text: Sequence[int], first: int) -> torch.Tensor:
    """Logits `float32 [T - first, V]` that follow the tokens of a text from the index `first` on."""
    tokens = torch.tensor([text], device=target.device)
    positions = torch.arange(len(text), device=target.device).unsqueeze(0)
    cache, found = target.new_cache(len(text)), []
    for start in range(0, len(text), CHUNK):
        part = slice(start, start + CHUNK)
        here = positions[0, part]
        keep = (here >= first).nonzero().squeeze(1)
        wanted = keep if len(keep) else torch.zeros_like(here[:1])  # no model is asked for nothing
        logits = target.forward(tokens[:, part], positions[:, part], cache, keep=wanted).logits[0]
        found.append(logits[: len(keep)].float())
    return torch.cat(found)


def scores_of(
    processors: LogitsProcessorList, logits: Sequence[torch.Tensor], rows: Sequence[Row], filler: int
) -> tuple[torch.Tensor, ...]:
    """Processed scores `float32 [B, V]` of each step, from its logits; rows that ended go on with pad tokens."""
    texts = [row.tokens + [filler] * (len(logits) - len(row.tokens)) for row in rows]
    return tuple(
        process(processors, each, [replace(row, tokens=text[:step]) for row, text in zip(rows, texts, strict=True)])
        for step, each in enumerate(logits)
    )
