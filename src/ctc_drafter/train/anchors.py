"""What a drafter learns at one place of a text: from an anchor's root, the next tokens of the target.

Shape letters: B rows, T tokens, A anchors of a row, N anchors of a batch, U labels, F frames, H hidden size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ctc_drafter.drafters.trainable import Objective, TrainableDrafter


@dataclass(frozen=True)
class Anchors:
    """positions: int64 [B, A], index of each root. used: bool [B, A], false for padding.

    prefixes: int64 [B, A, 1+U], the root and the tokens after it. valid: bool [B, A, U], label within the text.
    """

    positions: torch.Tensor
    used: torch.Tensor
    prefixes: torch.Tensor
    valid: torch.Tensor


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


def draft_loss(
    drafter: TrainableDrafter,
    embed: nn.Module,
    head: nn.Module,
    features: torch.Tensor,
    tokens: torch.Tensor,
    anchors: Anchors,
    objective: Objective,
    chunk: int,
) -> torch.Tensor:
    """Sum of the loss over all used anchors, a scalar in float32.

    What is as large as the vocabulary exists for `chunk` anchors at a time and is computed again in the backward
    pass.
    """
    blocks = drafter.blocks(features, tokens, anchors.positions, embed)[anchors.used]  # [N, ...]
    prefixes, valid = anchors.prefixes[anchors.used], anchors.valid[anchors.used]

    def part(blocks: torch.Tensor, prefixes: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return drafter.losses(blocks, prefixes, valid, embed, head, objective).sum()

    chunks = list(zip(blocks.split(chunk), prefixes.split(chunk), valid.split(chunk), strict=True))
    if len(chunks) == 1:
        return part(*chunks[0])
    parts = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in chunks]
    return torch.stack(parts).sum()
