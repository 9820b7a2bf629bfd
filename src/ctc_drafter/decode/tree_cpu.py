"""Tree building, acceptance and the tokens worth their Gumbel noise on a CPU (numba).

There a dozen small tensor operations cost as much as a layer of the target. What they compute is defined by their twins
of static shapes in `tree.py`, `verify.py` and `sampling.py`, which serve the other devices.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from ctc_drafter.types import Acceptance, Candidates, TokenTree


def build_tree(root: torch.Tensor, candidates: Candidates, nodes: int, least: float | None) -> TokenTree:
    """See `tree.build_tree`; least: log of the floor, None without one."""
    tokens, parents, depths, scores = map(
        _whole, (candidates.tokens, candidates.parents, candidates.depths, candidates.scores)
    )
    floor = -np.inf if least is None else least
    arrays = _build(_whole(root), tokens, parents, depths, scores, nodes, floor)
    return TokenTree(*map(torch.from_numpy, arrays))


def follow(tree: TokenTree, target_tokens: torch.Tensor) -> Acceptance:
    """See `verify.follow`."""
    arrays = _follow(_whole(tree.tokens), _whole(tree.parents), _whole(tree.valid), _whole(target_tokens))
    return Acceptance(*map(torch.from_numpy, arrays))


def _whole(tensor: torch.Tensor) -> np.ndarray:
    """Without gaps: numba compiles anew, for seconds, for arrays that have them."""
    return tensor.contiguous().numpy()


@njit(cache=True, nogil=True)
def _build(roots, tokens, parents, depths, scores, nodes, least):  # type: ignore[no-untyped-def]
    rows, count = scores.shape
    longest = count
    if least > -np.inf:
        longest = 0
        for row in range(rows):
            likely = 0
            for prefix in range(count):
                likely += scores[row, prefix] >= least
            longest = max(longest, likely)
    size = 1 + min(nodes, longest)
    whole = np.zeros((3, rows, size), np.int64)  # tokens, parents, depths
    ancestors, valid = np.zeros((rows, size, size), np.bool_), np.zeros((rows, size), np.bool_)
    found, node_of = np.zeros((rows, size), scores.dtype), np.zeros(count, np.int64)
    for row in range(rows):
        chosen = _best(scores[row], size - 1)
        whole[0, row, 0], valid[row, 0], ancestors[row, 0, 0] = roots[row], True, True
        node = 0
        for prefix in range(count):
            if not chosen[prefix]:
                continue
            node += 1
            node_of[prefix] = node
            parent = node_of[parents[row, prefix]] if parents[row, prefix] >= 0 else 0
            whole[0, row, node], whole[1, row, node] = tokens[row, prefix], parent
            whole[2, row, node], found[row, node] = depths[row, prefix], scores[row, prefix]
            valid[row, node] = scores[row, prefix] >= least and scores[row, prefix] > -np.inf
            for other in range(node):
                ancestors[row, node, other] = ancestors[row, parent, other]
            ancestors[row, node, node] = True
    return whole[0], whole[1], whole[2], ancestors, valid, found


@njit(cache=True, nogil=True)
def _best(scores, most):  # type: ignore[no-untyped-def]
    """Which prefixes have the `most` best scores. Of equal ones the earlier wins, so that no parent is left out.

    By insertion, since candidates are few and mostly best first; numba's sorting takes seconds to compile.
    """
    chosen, order, values, known = np.zeros(len(scores), np.bool_), np.empty(most, np.int64), np.empty_like(scores), 0
    for prefix in range(len(scores)):
        score = scores[prefix] if scores[prefix] == scores[prefix] else -np.inf  # no number
        if known == most and (most == 0 or values[most - 1] >= score):
            continue
        place = min(known, most - 1)
        while place > 0 and values[place - 1] < score:
            order[place], values[place] = order[place - 1], values[place - 1]
            place -= 1
        order[place], values[place] = prefix, score
        known = min(known + 1, most)
    for place in range(known):
        chosen[order[place]] = True
    return chosen


@njit(cache=True, nogil=True)
def _follow(tokens, parents, valid, target_tokens):  # type: ignore[no-untyped-def]
    rows, size = tokens.shape
    path, emitted = np.zeros((rows, size), np.int64), np.zeros((rows, size), np.int64)
    counts, bonus = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for row in range(rows):
        last = count = 0
        for node in range(1, size):  # children stand behind their parents
            if parents[row, node] == last and valid[row, node] and tokens[row, node] == target_tokens[row, last]:
                last, emitted[row, count] = node, tokens[row, node]
                count += 1
                path[row, count] = node
        counts[row], bonus[row] = count, target_tokens[row, last]
        for rest in range(count, size):
            path[row, rest], emitted[row, rest] = last, bonus[row]
    return path, counts, emitted, bonus


# Gumbel noise, float64, lies in (-3.61, 36.8). So a token whose score lies `NEAR` below the best one, and whose noise
# is below `LOUD`, cannot win: it ends below best - NEAR + LOUD, and the best one above best - 3.61.
NEAR, LOUD = 10.0, 6.0
# Words of uniform numbers from here on are the loud ones; a little lower, so that rounding does not matter.
LOUD_WORDS = np.uint64(int((math.exp(-math.exp(-LOUD)) - 1e-6) * 2.0**64))
STEP, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def contenders(scores: torch.Tensor, best: torch.Tensor, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that scores plus noise may choose: rows and tokens `int64 [M]`, in order; all others cannot win.

    scores `float32 [R, V]`, best `[R]`: the largest of each row, finite; streams `int64 [R]` as in `sampling.uniform`.
    """
    words = streams.numpy().view(np.uint64)
    rows, tokens = _contenders(scores.contiguous().numpy(), best.double().numpy(), words)
    return torch.from_numpy(rows), torch.from_numpy(tokens)


def first_best(rows: torch.Tensor, tokens: torch.Tensor, totals: torch.Tensor, count: int) -> torch.Tensor:
    """Of each of the `count` rows the first token with the largest total, `int64 [count]`; inputs `[M]`."""
    return torch.from_numpy(_first_best(rows.numpy(), tokens.numpy(), totals.numpy(), count))


@njit(cache=True, nogil=True)
def _contenders(scores, best, streams):  # type: ignore[no-untyped-def]
    rows, count = scores.shape
    found, of = np.empty(rows * count, np.int64), np.empty(rows * count, np.int64)
    size = 0
    for row in range(rows):
        near = best[row] - NEAR
        counter = streams[row]
        for token in range(count):
            counter += STEP
            score = scores[row, token]
            if not score >= near:
                if score == -np.inf:
                    continue
                word = (counter ^ (counter >> np.uint64(30))) * FIRST
                word = (word ^ (word >> np.uint64(27))) * SECOND
                if word ^ (word >> np.uint64(31)) < LOUD_WORDS:
                    continue
            of[size], found[size] = row, token
            size += 1
    return of[:size].copy(), found[:size].copy()


@njit(cache=True, nogil=True)
def _first_best(rows, tokens, totals, count):  # type: ignore[no-untyped-def]
    chosen, best = np.zeros(count, np.int64), np.full(count, -np.inf)
    for place in range(len(rows)):
        if totals[place] > best[rows[place]]:
            best[rows[place]], chosen[rows[place]] = totals[place], tokens[place]
    return chosen
