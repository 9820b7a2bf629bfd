"""Tree building and acceptance on a CPU (numba).

There a dozen small tensor operations cost as much as a layer of the target. What they compute is defined by their twins
of static shapes in `tree.py` and `verify.py`, which serve the other devices.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from ctc_drafter.types import Acceptance, Candidates, TokenTree


def build_tree(root: torch.Tensor, candidates: Candidates, nodes: int, least: float | None) -> TokenTree:
    """See `tree.build_tree`; least: log of the floor, None without one."""
    tokens, parents = candidates.tokens.numpy(), candidates.parents.numpy()
    depths, scores = candidates.depths.numpy(), candidates.scores.numpy()
    arrays = _build(root.numpy(), tokens, parents, depths, scores, nodes, -np.inf if least is None else least)
    return TokenTree(*map(torch.from_numpy, arrays))


def follow(tree: TokenTree, target_tokens: torch.Tensor) -> Acceptance:
    """See `verify.follow`."""
    arrays = _follow(tree.tokens.numpy(), tree.parents.numpy(), tree.valid.numpy(), target_tokens.numpy())
    return Acceptance(*map(torch.from_numpy, arrays))


@njit(cache=True, nogil=True)
def _build(roots, tokens, parents, depths, scores, nodes, least):  # type: ignore[no-untyped-def]
    rows, count = scores.shape
    longest = count
    if least > -np.inf:
        longest = 0
        for row in range(rows):
            longest = max(longest, int(np.sum(scores[row] >= least)))
    size = 1 + min(nodes, longest)
    whole = np.zeros((3, rows, size), np.int64)  # tokens, parents, depths
    ancestors, valid = np.zeros((rows, size, size), np.bool_), np.zeros((rows, size), np.bool_)
    found, node_of = np.zeros((rows, size), scores.dtype), np.zeros(count, np.int64)
    for row in range(rows):
        # Stable: of equal scores the earlier prefix wins, and parents come first.
        best = np.sort(np.argsort(-scores[row], kind="mergesort")[: size - 1])
        whole[0, row, 0], valid[row, 0], ancestors[row, 0, 0] = roots[row], True, True
        for node in range(1, size):
            prefix = best[node - 1]
            node_of[prefix] = node
            parent = node_of[parents[row, prefix]] if parents[row, prefix] >= 0 else 0
            whole[0, row, node], whole[1, row, node] = tokens[row, prefix], parent
            whole[2, row, node], found[row, node] = depths[row, prefix], scores[row, prefix]
            valid[row, node] = scores[row, prefix] >= least and scores[row, prefix] > -np.inf
            ancestors[row, node] = ancestors[row, parent]
            ancestors[row, node, node] = True
    return whole[0], whole[1], whole[2], ancestors, valid, found


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
        path[row, count:], emitted[row, count:] = last, target_tokens[row, last]
        counts[row], bonus[row] = count, target_tokens[row, last]
    return path, counts, emitted, bonus
