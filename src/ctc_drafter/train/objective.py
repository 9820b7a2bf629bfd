"""Training objective: anchors in a text, their labels, and the loss in chunks.

Shape letters: B rows, T tokens, A anchors of a row, N anchors of a batch, U labels, F frames, H hidden size.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ctc_drafter.ctc.copies import copies_at
from ctc_drafter.drafters.config import DrafterConfig
from ctc_drafter.drafters.trainable import Anchors, LossOptions
from ctc_drafter.train.settings import TrainSettings


def anchor_counts(lengths: torch.Tensor, answer_start: torch.Tensor, anchors: int) -> torch.Tensor:
    """Anchors that each row has room for, at most `anchors`: `int64 [B]`."""
    return (lengths - answer_start).clamp(0, anchors)


def draw_anchors(
    lengths: torch.Tensor, answer_start: torch.Tensor, keys: torch.Tensor, anchors: int, seed: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions `int64 [B, A]` and `used bool [B, A]`: a uniform draw without replacement in each row.

    A root is the last prompt token or an answer token, and at least one token follows it. The draw depends on
    `seed` and the row's key only: not on its batch, the number of processes, or global random state.
    """
    counts = anchor_counts(lengths, answer_start, anchors).tolist()
    rows = []
    rooms = (lengths - answer_start).tolist()
    for count, room, start, key in zip(counts, rooms, answer_start.tolist(), keys.tolist(), strict=True):
        mixed = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1
        drawn = torch.randperm(max(room, 0), generator=torch.Generator().manual_seed(mixed))[:count]
        rows.append(drawn.sort().values + start - 1)
    positions = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if not positions.shape[1]:  # rows without room: drafters want a position to look at
        positions = positions.new_zeros(len(rows), 1)
    used = torch.arange(positions.shape[1]) < torch.tensor(counts).unsqueeze(1)
    return positions.to(lengths.device), used.to(lengths.device)


def label_anchors(
    tokens: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor, used: torch.Tensor, draft_length: int
) -> Anchors:
    """The next U = `draft_length` tokens of right-padded rows `int64 [B, T]` after each position."""
    steps = torch.arange(draft_length + 1, device=tokens.device)
    index = positions.unsqueeze(-1) + steps
    inside = index < lengths.view(-1, 1, 1)
    flat = index.clamp(max=tokens.shape[1] - 1).flatten(1)
    prefixes = tokens.gather(1, flat).view_as(index)
    return Anchors(positions, used, prefixes, inside[..., 1:] & used.unsqueeze(-1))


def loss_options(settings: TrainSettings) -> LossOptions:
    """What drafters need to know of a run's settings to compute their loss."""
    return LossOptions(settings.loss, settings.loss_decay, settings.anchor_chunk, settings.recompute)


def anchor_copies(
    config: DrafterConfig, tokens: torch.Tensor, positions: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor | None:
    """What a drafter that copies would copy after the texts' own tokens, `AnchorBatch.copies`; None for others.

    tokens `int64 [B, T]`; positions `int64 [B, A]` of the roots. A share `dropout` of the anchors copies nothing.
    """
    longest = getattr(config, "copies", 0)
    if not longest:
        return None
    copies = copies_at(tokens, positions, config.draft_length, longest)
    return dropped(copies, positions, dropout) if dropout else copies


def dropped(copies: torch.Tensor, positions: torch.Tensor, share: float) -> torch.Tensor:
    """Copies `int64 [..., 1+U, 2]` without those of a share of the anchors: length 0. Anchors' places `int64 [...]`
    alone say whose (Knuth's multiplicative hash), so that a resumed run drops the same ones."""
    drop = positions * 2654435761 % 2**32 < share * 2**32
    return copies.masked_fill(drop.view(*drop.shape, 1, 1), 0)
