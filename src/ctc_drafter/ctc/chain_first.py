"""Best-first search where frame u holds the u-th token: exactly the n most probable prefixes, in one compiled call.

`best_first.py` without blanks and alignments. A prefix of u tokens has one frame left to ask, and its child v has

    P(y1..yu v) = P(y1..yu) exp(a_u[v] + m[y1..yu, v]) / sum over w of exp(a_u[w] + m[y1..yu, w])

for logits a and the low-rank bias m. Prefixes are settled in the order of their probability, so n expansions do.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from ctc_drafter.ctc.best_first import LowRankBias, _dot, _new_pool, _offer, _strength
from ctc_drafter.ctc.lattice import sum_floor
from ctc_drafter.types import Candidates


def best_chains(
    logits: torch.Tensor,
    root: torch.Tensor,
    bias: LowRankBias,
    root_states: torch.Tensor,
    *,
    count: int,
    floor: float = 0.0,
) -> Candidates:
    """The `count` most probable prefixes of up to U tokens with probability `floor` or more, best first.

    logits `[B, U, V]`, root `int64 [B]`, root_states `[B, M]` (`root` in `LowRankBias`), float32 on the CPU. Rows
    that have fewer prefixes than others are padded with score -inf.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_().numpy()
    tiny = np.float32(sum_floor(torch.float32))
    arrays = _search_rows(
        weights, root.numpy(), np.arange(weights.shape[2]), bias, root_states.numpy(), count, floor, tiny
    )
    tokens, parents, depths, scores = map(torch.from_numpy, arrays)
    return Candidates(tokens, parents, depths, scores.log_())


@njit(cache=True, nogil=True)
def _search_rows(weights, roots, vocabulary, bias, root_states, count, floor, tiny):  # type: ignore[no-untyped-def]
    rows, longest = len(roots), 0
    tokens, parents = np.zeros((rows, count), np.int64), np.full((rows, count), -1, np.int64)
    depths, scores = np.ones((rows, count), np.int64), np.zeros((rows, count), np.float32)
    for row in range(rows):
        pool = _new_pool(1 + count, 1, roots[row])
        found = _search(weights[row], vocabulary, pool, bias, root_states[row], floor, tiny) - 1
        tokens[row, :found], parents[row, :found] = pool.last[1 : found + 1], pool.parent[1 : found + 1] - 1
        depths[row, :found], scores[row, :found] = pool.depth[1 : found + 1], pool.score[1 : found + 1]
        longest = max(longest, found)
    return tokens[:, :longest], parents[:, :longest], depths[:, :longest], scores[:, :longest]


@njit(cache=True, nogil=True)
def _search(weights, vocabulary, pool, bias, root_state, floor, tiny):  # type: ignore[no-untyped-def]
    """Expands entries in their order; returns how many there are in the end."""
    found = 1
    for i in range(len(pool.last) - 1):  # no room would be left for children of the last one
        if i == found:
            break
        depth, last = pool.depth[i], pool.column[i]
        if depth < len(weights):
            strength, _ = _strength(pool, i, bias, root_state, vocabulary[:0], weights.shape[1])
            frame = weights[depth : depth + 1]
            share = pool.score[i] / max(_dot(frame[0], strength), tiny)
            pool.blank[i, 0] = share
            found = _offer(frame, vocabulary, pool, found, i, strength, share * frame[0, last] * strength[last], floor)
    return found
