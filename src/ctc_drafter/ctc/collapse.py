"""Frames to tokens: repeats merge, blanks vanish."""

from __future__ import annotations

import torch


def collapse(frames: torch.Tensor, blank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Collapses alignments to the token sequences they stand for.

    A frame starts a token when it is not blank and differs from the frame before it. Before the first
    frame lies the root, which counts as a blank frame: the first token may equal the root.

    frames: int64 [..., F], token ids or `blank`.
    Returns tokens `int64 [..., F]`, left-aligned and padded with -1, and lengths `int64 [...]`.

    >>> collapse(torch.tensor([7, 7, 9, 7, 9, 9]), blank=9)
    (tensor([ 7,  7, -1, -1, -1, -1]), tensor(2))
    """
    before = torch.nn.functional.pad(frames[..., :-1], (1, 0), value=blank)
    starts = (frames != blank) & (frames != before)
    # Frames that start nothing go to a spare last column.
    slots = torch.where(starts, starts.cumsum(-1) - 1, frames.shape[-1])
    tokens = frames.new_full((*frames.shape[:-1], frames.shape[-1] + 1), -1).scatter(-1, slots, frames)
    return tokens[..., :-1], starts.sum(-1)
