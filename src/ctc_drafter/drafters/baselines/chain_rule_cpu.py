"""Best prefixes under the chain rule on a CPU (numba), one compiled call per level.

Same result as `chain_rule.expand_statically`. Here the n best so far are known at each level, so a token is
looked at only if it may be among them, and only prefixes that are among them are asked for their next tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from ctc_drafter.types import Candidates

if TYPE_CHECKING:
    from ctc_drafter.drafters.base import Step


def grow(step: Step, root: torch.Tensor, nodes: int, depth: int, min_probability: float) -> Candidates:
    """See `chain_rule.expand`. A row with fewer prefixes than others is padded with score -inf."""
    least = math.log(min_probability) if min_probability else -math.inf
    best = np.full((len(root), nodes), -np.inf, np.float32)
    prefixes, places = root[:, None, None], None
    above = np.zeros((len(root), 1), np.float32)
    levels: list[tuple[np.ndarray, ...]] = []
    start = 0  # where the level above begins among all candidates
    for level in range(1, depth + 1):
        logits = step(prefixes, places).detach().contiguous()  # numba compiles anew for arrays with gaps
        totals = logits.logsumexp(-1)
        children = _children(logits.numpy(), totals.numpy(), above, best, least)
        tokens, owners, scores = (np.ascontiguousarray(part) for part in children)
        parents = np.where(np.isneginf(scores), -1, owners + start) if levels else np.full_like(owners, -1)
        start += levels[-1][0].shape[1] if levels else 0
        levels.append((tokens, parents, np.full_like(tokens, level), scores))
        following, kept, above = _frontier(prefixes.contiguous().numpy(), tokens, owners, scores, best)
        if not following.shape[1]:
            break
        prefixes, places = torch.from_numpy(following), torch.from_numpy(kept)
    found = [torch.from_numpy(np.concatenate(parts, 1)) for parts in zip(*levels, strict=True)]
    return Candidates(found[0], found[1], found[2], found[3])


@njit(cache=True, nogil=True)
def _children(logits, totals, above, best, least):  # type: ignore[no-untyped-def]
    """Tokens, parents and scores `[B, C]` of the best children of prefixes with scores `above [B, W]`, best first.

    best `[B, n]`: scores of the n best prefixes so far, best first; children that are among them enter it.
    """
    rows, count = best.shape
    tokens, owners = np.zeros((rows, count), np.int64), np.zeros((rows, count), np.int64)
    scores, longest = np.full((rows, count), np.float32(-np.inf)), 0
    for row in range(rows):
        found = 0
        for w in range(above.shape[1]):
            if above[row, w] == -np.inf:
                continue
            source = min(w, logits.shape[1] - 1)
            line, shift = logits[row, source], above[row, w] - totals[row, source]
            bound = max(best[row, count - 1], np.float32(least)) - shift
            for v in range(len(line)):
                if line[v] > bound:
                    score = min(line[v] + shift, above[row, w])  # rounding must not lift a child above its parent
                    place = min(found, count - 1)
                    while place > 0 and scores[row, place - 1] < score:
                        tokens[row, place], owners[row, place] = tokens[row, place - 1], owners[row, place - 1]
                        scores[row, place] = scores[row, place - 1]
                        place -= 1
                    tokens[row, place], owners[row, place], scores[row, place] = v, w, score
                    found = min(found + 1, count)
                    _enter(best[row], score)
                    bound = max(best[row, count - 1], np.float32(least)) - shift
        longest = max(longest, found)
    return tokens[:, :longest], owners[:, :longest], scores[:, :longest]


@njit(cache=True, nogil=True)
def _enter(best, score):  # type: ignore[no-untyped-def]
    """Puts a score at its place among the best, best first; the last one leaves."""
    place = len(best) - 1
    if score <= best[place]:
        return
    while place > 0 and best[place - 1] < score:
        best[place] = best[place - 1]
        place -= 1
    best[place] = score


@njit(cache=True, nogil=True)
def _frontier(prefixes, tokens, owners, scores, best):  # type: ignore[no-untyped-def]
    """The children that are among the n best, as prefixes `[B, W, u+1]` with parents and scores `[B, W]`."""
    rows, size = len(prefixes), prefixes.shape[2]
    wide = 0
    for row in range(rows):
        known = 0
        while known < scores.shape[1] and scores[row, known] >= best[row, -1] and scores[row, known] > -np.inf:
            known += 1
        wide = max(wide, known)
    following, kept = np.zeros((rows, wide, size + 1), np.int64), np.zeros((rows, wide), np.int64)
    above = np.full((rows, wide), np.float32(-np.inf))
    for row in range(rows):
        for w in range(wide):
            if scores[row, w] >= best[row, -1]:
                for place in range(size):
                    following[row, w, place] = prefixes[row, owners[row, w], place]
                following[row, w, size] = tokens[row, w]
                kept[row, w], above[row, w] = owners[row, w], scores[row, w]
    return following, kept, above
