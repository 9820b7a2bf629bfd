"""Builds the token tree from scored prefixes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from ctc_drafter.types import Candidates, TokenTree


def build_tree(root: torch.Tensor, candidates: Candidates, nodes: int, min_probability: float = 0.0) -> TokenTree:
    """The root `int64 [B]` and the `nodes` best prefixes of probability `min_probability` and more.

    Prefix probabilities never grow along a path, so the best prefixes are closed under parents, and their sum
    is the expected number of accepted tokens: under the drafter's belief there is no better tree. With a floor,
    rows of a batch differ in size and smaller ones are padded; nothing likely leaves the root alone.

    Example: prefixes a .6, b .3, ab .5, aba .1 and nodes = 3 give the tree root -> a -> ab, root -> b.
    """
    least = math.log(min_probability) if min_probability else None
    if root.device.type == "cpu":
        from ctc_drafter.decode import tree_cpu

        return tree_cpu.build_tree(root, candidates, nodes, least)
    return build_tree_statically(root, candidates, nodes, least)


def build_tree_statically(root: torch.Tensor, candidates: Candidates, nodes: int, least: float | None) -> TokenTree:
    """`build_tree` in tensor operations; least: log of the floor, None without one."""
    likely = candidates.scores >= least if least is not None else candidates.scores > float("-inf")
    count = min(nodes, candidates.scores.shape[1])
    if least is not None and count:
        count = min(count, int(likely.sum(1).max()))
    # Stable: of equal scores the earlier prefix wins, and parents come first.
    best = candidates.scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = best.sort(dim=1).values
    scores = candidates.scores.gather(1, chosen)

    index = torch.arange(1, count + 1, device=root.device).expand_as(chosen)
    node_of = torch.zeros_like(candidates.tokens).scatter(1, chosen, index)
    parents = candidates.parents.gather(1, chosen)
    parents = torch.where(parents < 0, 0, node_of.gather(1, parents.clamp(min=0)))

    parents = _with_root(parents, 0)
    return TokenTree(
        tokens=torch.cat([root.unsqueeze(1), candidates.tokens.gather(1, chosen)], 1),
        parents=parents,
        depths=_with_root(candidates.depths.gather(1, chosen), 0),
        ancestors=ancestor_matrix(parents),
        valid=_with_root(likely.gather(1, chosen), True),
        scores=_with_root(scores, 0.0),
    )


def up_to(tree: TokenTree, lengths: torch.Tensor, switch: int) -> TokenTree:
    """The tree without nodes at positions from `switch` on, in rows of `lengths int64 [B]` that have not come there.

    There the target reads its text anew, so what it says of such nodes before that is not what it would write.
    """
    positions = lengths.unsqueeze(1) + tree.depths
    return replace(tree, valid=tree.valid & ((positions < switch) | (lengths >= switch).unsqueeze(1)))


def without_drafts(tree: TokenTree, places: Collection[int]) -> TokenTree:
    """The tree with plain steps for the rows at these places: their nodes are copies of the root.

    Such a node computes what the root computes, so whatever a plain step can bear these can; shapes stay.
    """
    first = torch.arange(tree.tokens.shape[1], device=tree.tokens.device) == 0
    rows = torch.tensor([place in places for place in range(len(tree.tokens))], device=first.device).unsqueeze(1)
    alone = torch.eye(len(first), dtype=torch.bool, device=first.device)
    return TokenTree(
        tokens=torch.where(rows, tree.tokens[:, :1], tree.tokens),
        parents=tree.parents.masked_fill(rows, 0),
        depths=tree.depths.masked_fill(rows, 0),
        ancestors=torch.where(rows.unsqueeze(2), alone, tree.ancestors),
        valid=tree.valid & (first | ~rows),
        scores=tree.scores.masked_fill(rows & ~first, float("-inf")),
    )


def ancestor_matrix(parents: torch.Tensor) -> torch.Tensor:
    """`bool [B, N, N]` from `parents int64 [B, N]`, the root its own parent; a node counts as its own ancestor.

    The adjacency matrix with ones on its diagonal, squared until the longest possible path is covered.
    """
    size = parents.shape[1]
    reachable = torch.nn.functional.one_hot(parents, size).float() + torch.eye(size, device=parents.device)
    for _ in range((size - 1).bit_length()):
        reachable = (reachable @ reachable).clamp(max=1)
    return reachable > 0


def best_chain(candidates: Candidates, depth: int | None = None) -> Candidates:
    """The path with the largest sum of prefix probabilities: the best tree that is a chain, `[B, D]`.

    D is `depth`, which no prefix may exceed: shapes are static then and the host is not asked. Without it, D is the
    depth of the batch's longest path. Shorter ones end in padding of score -inf.
    """
    if not candidates.tokens.shape[1]:
        return candidates
    probabilities, parents = candidates.scores.exp(), candidates.parents
    total, pointer = probabilities, parents
    for _ in range((depth or int(candidates.depths.max())) - 1):
        total = total + torch.where(pointer < 0, 0.0, probabilities.gather(1, pointer.clamp(min=0)))
        pointer = torch.where(pointer < 0, -1, parents.gather(1, pointer.clamp(min=0)))
    node = total.argmax(1, keepdim=True)
    lengths = candidates.depths.gather(1, node)
    path = node.expand(-1, depth or int(lengths.max()))
    for place in range(path.shape[1] - 1, 0, -1):  # column i takes the ancestor at depth i + 1
        above = parents.gather(1, node)
        node = torch.where(candidates.depths.gather(1, node) > place, above, node)
        path = torch.cat([node.expand(-1, place), path[:, place:]], 1)
    order = torch.arange(path.shape[1], device=path.device).expand_as(path)
    scores = candidates.scores.gather(1, path).masked_fill(order >= lengths, float("-inf"))
    return Candidates(candidates.tokens.gather(1, path), order - 1, order + 1, scores, candidates.free)


def _with_root(values: torch.Tensor, root: float | bool) -> torch.Tensor:
    return torch.cat([values.new_full((values.shape[0], 1), root), values], 1)
