"""Prefixes that were found on the host, as candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ctc_drafter.types import Candidates

# (token, log-probability, index of its parent or -1, depth)
Prefix = tuple[int, float, int, int]
PADDING: Prefix = (0, -math.inf, -1, 1)


def padded(rows: Sequence[Sequence[Prefix]], device: torch.device) -> Candidates:
    """Candidates of rows that differ in length."""
    width = max(map(len, rows))
    filled = [[*row, *[PADDING] * (width - len(row))] for row in rows]
    tokens, scores, parents, depths = ([[prefix[part] for prefix in row] for row in filled] for part in range(4))
    whole = torch.tensor([tokens, parents, depths], dtype=torch.long, device=device)
    return Candidates(whole[0], whole[1], whole[2], torch.tensor(scores, dtype=torch.float32, device=device))
