"""Best-first search on a CPU (numba) where frame u holds the u-th token: the CTC search without blanks."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from ctc_drafter.ctc.kernels_cpu import dot
from ctc_drafter.ctc.lattice import sum_floor
from ctc_drafter.ctc.search_cpu import (
    FrameTerms,
    LowRankBias,
    _hidden,
    _new_candidates,
    _new_pool,
    _offer,
    _strength,
    _take,
    no_terms,
)
from ctc_drafter.types import Candidates

# Exactly the n most probable prefixes, in one compiled call.
#
# The search of `search_cpu.py` without blanks and alignments. A prefix of u tokens has one frame left to ask, and its
# child v has
#
#     P(y1..yu v) = P(y1..yu) exp(a_u[v] + m[y1..yu, v]) / sum over w of exp(a_u[w] + m[y1..yu, w])
#
# for logits a and the low-rank bias m. Prefixes are settled in the order of their probability, so n expansions do.


def best_chains(
    logits: torch.Tensor,
    root: torch.Tensor,
    bias: LowRankBias,
    root_states: torch.Tensor,
    *,
    count: int,
    min_probability: float = 0.0,
) -> Candidates:
    """The `count` most probable prefixes of up to U tokens with probability `min_probability` or more, best first.

    logits `[B, U, V]`, root `int64 [B]`, root_states `[B, M]` (`root` in `LowRankBias`), float32 on the CPU. Rows
    that have fewer prefixes than others are padded with score -inf.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_().contiguous().numpy()
    tiny = np.float32(sum_floor(torch.float32))
    arrays = _search_chain_rows(
        weights,
        root.contiguous().numpy(),
        np.arange(weights.shape[2]),
        bias,
        root_states.contiguous().numpy(),
        no_terms(len(root)),
        count,
        min_probability,
        tiny,
    )
    tokens, parents, depths, scores = map(torch.from_numpy, arrays)
    return Candidates(tokens, parents, depths, scores.log_())


@njit(cache=True, nogil=True)
def _search_chain_rows(weights, roots, vocabulary, bias, root_states, terms, count, min_probability, tiny):  # type: ignore[no-untyped-def]
    rows, longest = len(roots), 0
    tokens, parents, depths, scores = _new_candidates(rows, count)
    for row in range(rows):
        pool = _new_pool(1 + count, np.int64(1), roots[row], np.int64(0))
        own = FrameTerms(terms.columns[row], terms.tokens[row], terms.frames[row], terms.prefix)
        found = _search_chain(weights[row], vocabulary, pool, bias, root_states[row], own, min_probability, tiny) - 1
        _take(pool, found, tokens[row], parents[row], depths[row], scores[row])
        longest = max(longest, found)
    return tokens[:, :longest], parents[:, :longest], depths[:, :longest], scores[:, :longest]


@njit(cache=True, nogil=True)
def _search_chain(weights, vocabulary, pool, bias, root_state, terms, min_probability, tiny):  # type: ignore[no-untyped-def]
    """Expands entries in their order; returns how many there are in the end."""
    found = np.int64(1)  # no literal, for which all that is called would be compiled once more
    for i in range(len(pool.last) - 1):  # no room would be left for children of the last one
        if i == found:
            break
        depth, last = pool.depth[i], pool.column[i]
        if depth < len(weights):
            hidden = _hidden(pool, i, bias, root_state)
            strength, _ = _strength(pool, i, bias, hidden, vocabulary[:0], weights.shape[1])
            frame = weights[depth : depth + 1]
            share = pool.score[i] / max(dot(frame[0], strength), tiny)
            pool.blank[i, 0] = share
            repeat = np.float64(share * frame[0, last] * strength[last])
            found = _offer(frame, vocabulary, pool, found, i, strength, repeat, terms, min_probability)
    return found
