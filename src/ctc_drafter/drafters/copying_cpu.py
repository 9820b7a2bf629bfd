"""Best prefixes of a network's candidates and of copies from the text (numba); the rule stands in `copying.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from ctc_drafter.ctc.search_cpu import copied_after
from ctc_drafter.drafters.copying import BOOST, LONGEST, UNSEEN
from ctc_drafter.types import Candidates

ROOT, NOT_PROPOSED = -1, -2  # in place of a candidate's index
LEAST, MOST = 1e-6, 1 - 1e-6  # probabilities whose odds are taken


class Pool(NamedTuple):
    """The root and the prefixes found so far, most probable first; an entry is final once its turn has come.

    last: newest token. network: index among the candidates, or `ROOT`, `NOT_PROPOSED`. score: probability.
    """

    last: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    network: np.ndarray
    score: np.ndarray


def with_copied(
    candidates: Candidates, texts: Sequence[np.ndarray], nodes: int, depth: int, min_probability: float
) -> Candidates:
    """The `nodes` best prefixes of up to `depth` tokens and of probability `min_probability` and more, best first.

    texts: each row's tokens up to its root, `int64`. Rows that have fewer prefixes are padded with score -inf.
    """
    device = candidates.tokens.device
    given = [each.cpu().contiguous().numpy() for each in (candidates.tokens, candidates.parents, candidates.scores)]
    tokens, parents = np.zeros((len(texts), nodes), np.int64), np.full((len(texts), nodes), -1, np.int64)
    depths, scores = np.ones((len(texts), nodes), np.int64), np.full((len(texts), nodes), -np.inf, np.float32)
    longest = 0
    for row, text in enumerate(texts):
        row_of = (given[0][row], given[1][row], given[2][row], text, nodes, depth, min_probability)
        pool, found = _best(
            *row_of, BOOST, UNSEEN, LONGEST
        )  # arguments: what is compiled keeps another file's constants
        tokens[row, :found], parents[row, :found] = pool.last[1 : found + 1], pool.parent[1 : found + 1] - 1
        depths[row, :found], scores[row, :found] = pool.depth[1 : found + 1], np.log(pool.score[1 : found + 1])
        longest = max(longest, found)
    whole = [torch.from_numpy(each[:, :longest]).to(device) for each in (tokens, parents, depths, scores)]
    return Candidates(whole[0], whole[1], whole[2], whole[3])


@njit(cache=True, nogil=True)
def _best(tokens, parents, scores, text, nodes, depth, least, boost, unseen, longest):  # type: ignore[no-untyped-def]
    """The pool of one row, and how many prefixes it has behind the root."""
    whole = np.zeros((4, 1 + nodes), np.int64)
    pool = Pool(whole[0], whole[1], whole[2], whole[3], np.zeros(1 + nodes))
    pool.last[0], pool.network[0], pool.score[0] = text[-1], ROOT, 1.0
    first, following = _children(parents, scores)
    found = np.int64(1)
    for i in range(nodes):  # no room would be left for children of the last one
        if i == found:
            break
        if pool.depth[i] < depth:
            found = _expand(tokens, scores, first, following, text, pool, i, found, least, boost, unseen, longest)
    return pool, found - 1


@njit(cache=True, nogil=True)
def _children(parents, scores):  # type: ignore[no-untyped-def]
    """Linked lists of the candidates by parent: the first child of each and of the root at 0, and the next sibling."""
    first, following = np.full(1 + len(parents), -1, np.int64), np.full(len(parents), -1, np.int64)
    for c in range(len(parents) - 1, -1, -1):
        if scores[c] > -np.inf:
            following[c] = first[parents[c] + 1]
            first[parents[c] + 1] = c
    return first, following


@njit(cache=True, nogil=True)
def _expand(tokens, scores, first, following, text, pool, i, found, least, boost, unseen, longest):  # type: ignore[no-untyped-def]
    """Gives entry i's children places in the pool's order; returns how many entries it has."""
    network = pool.network[i]
    start = first[network + 1] if network != NOT_PROPOSED else -1
    before = np.float64(scores[network]) if network >= 0 else 0.0
    copied, length = copied_after(pool, i, text, longest)
    proposed, total, known = NOT_PROPOSED, 0.0, 0.0
    child = start
    while child >= 0:
        share = math.exp(scores[child] - before)
        total += share
        if length > 0 and tokens[child] == copied:
            proposed, known = child, share
        child = following[child]
    others, chance = 1.0, 0.0
    if length > 0:
        if proposed == NOT_PROPOSED:
            known = min(unseen, 1 - total)
        known = min(max(known, LEAST), MOST)
        odds = known / (1 - known) * boost * length
        chance = odds / (1 + odds)
        others = (1 - chance) / (1 - known)
        found = _offer(pool, found, i, copied, proposed, chance, least)
    child = start
    while child >= 0:
        if child != proposed:
            found = _offer(pool, found, i, tokens[child], child, math.exp(scores[child] - before) * others, least)
        child = following[child]
    return found


@njit(cache=True, nogil=True)
def _offer(pool, found, i, token, network, share, least):  # type: ignore[no-untyped-def]
    """Puts a child of entry i in its place, if it earns one; share: its probability after it."""
    places, score = len(pool.last), pool.score[i] * min(share, 1.0)  # no child is likelier than its parent
    if score < least or score <= 0 or (found == places and score <= pool.score[places - 1]):
        return found
    j = min(found, places - 1)
    while pool.score[j - 1] < score:
        pool.last[j], pool.parent[j], pool.depth[j] = pool.last[j - 1], pool.parent[j - 1], pool.depth[j - 1]
        pool.network[j], pool.score[j] = pool.network[j - 1], pool.score[j - 1]
        j -= 1
    pool.last[j], pool.parent[j], pool.depth[j] = token, i, pool.depth[i] + 1
    pool.network[j], pool.score[j] = network, score
    return min(found + 1, places)
