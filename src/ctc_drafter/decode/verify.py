"""Verifies a token tree in one target forward, and follows the accepted path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache

from ctc_drafter.target.model import Target
from ctc_drafter.target.row_cache import RowCache
from ctc_drafter.types import Acceptance, TokenTree, Verification

# One forward of the target over a token tree.


def verify(
    target: Target,
    cache: Cache | RowCache,
    lengths: torch.Tensor,
    tree: TokenTree,
    layers: Sequence[int] = (),
    shift: torch.Tensor | None = None,
) -> Verification:
    """Logits and features of each node, given the row's committed tokens and the node's ancestors.

    lengths `int64 [B]`: committed tokens per row. The tree's keys and values are appended to the cache behind
    its longest row. A node stands at position length + depth. shift: see `Target.forward`.
    """
    if isinstance(cache, RowCache):
        return cache.verify(target, tree, layers)
    slots = cache.get_seq_length()
    # Positions past the limit belong to nodes that can no longer be emitted; they only must not overflow.
    positions = (lengths.unsqueeze(1) + tree.depths).clamp(max=target.limit - 1)
    # Padding is a token that the row has anyway: one that the target cannot compute would spoil the others.
    tokens = torch.where(tree.valid, tree.tokens, tree.tokens[:, :1])
    shifted = {} if shift is None else {"shift": shift}
    if tree.tokens.shape[1] == 1 and bool((lengths == slots).all()):  # nothing drafted: plain text needs no mask
        return target.forward(tokens, positions, cache, layers=layers, **shifted)
    cached = torch.arange(slots, device=lengths.device).expand(lengths.shape[0], -1)
    allowed = tree_mask(tree, cached < lengths.unsqueeze(1))
    key_positions = torch.cat([cached, positions], 1)
    return target.forward(tokens, positions, cache, allowed, key_positions, layers, **shifted)


def no_numbers(logits: torch.Tensor) -> torch.Tensor:
    """Rows, `bool [B]`, whose root has NaN among its logits `[B, 1+N, V]`.

    A node that cannot be computed (NaN, infinity, an overflow) spoils all nodes of its row, the root included: a mask
    gives it weight 0, and 0 times NaN is NaN. So what the root says tells of all. -inf may well be meant.
    """
    return logits[:, 0].amax(-1).isnan()


def tree_mask(tree: TokenTree, committed: torch.Tensor) -> torch.Tensor:
    """`bool [B, 1+N, S+1+N]`: a node sees the committed slots of its row, `bool [B, S]`, and its ancestors.

    Example: one committed token, tree root -> a, root -> b::

        root  T  T F F
        a     T  T T F
        b     T  T F T
    """
    nodes = tree.tokens.shape[1]
    return torch.cat([committed.unsqueeze(1).expand(-1, nodes, -1), tree.ancestors], 2)


# Which path through the tree the target itself would have written.


def follow(tree: TokenTree, target_tokens: torch.Tensor) -> Acceptance:
    """Follows `target_tokens int64 [B, 1+N]`, the token that the target chooses after each node (-1: unknown, off the
    path).

    Worked example: root -> a -> ab, root -> b, the target wants a after the root, b after `a`, c after `ab`.
    The path is root, a, ab; two nodes are accepted, the bonus token is c, and `a b c` is emitted.
    """
    if target_tokens.device.type == "cpu":
        from ctc_drafter.decode import tree_cpu

        return tree_cpu.follow(tree, target_tokens)
    return follow_statically(tree, target_tokens)


def follow_statically(tree: TokenTree, target_tokens: torch.Tensor) -> Acceptance:
    """`follow` in tensor operations."""
    agrees = (tree.tokens == target_tokens.gather(1, tree.parents)) & tree.valid
    agrees[:, 0] = True
    on_path = ~(tree.ancestors & ~agrees.unsqueeze(1)).any(-1)
    last = torch.where(on_path, tree.depths, -1).argmax(1, keepdim=True)
    counts = tree.depths.gather(1, last)

    # Ancestors of the last node in order of depth; deeper columns repeat the last node.
    size = tree.tokens.shape[1]
    ancestors = tree.ancestors.gather(1, last.unsqueeze(-1).expand(-1, -1, size)).squeeze(1)
    column = torch.where(ancestors, tree.depths, size)
    index = torch.arange(size, device=last.device).expand_as(column)
    path = last.expand(-1, size + 1).scatter(1, column, index)[:, :size]
    path = torch.where(index <= counts, path, last)

    bonus = target_tokens.gather(1, last)
    emitted = tree.tokens.gather(1, path).roll(-1, 1)
    tokens = torch.where(index < counts, emitted, bonus)
    return Acceptance(path, counts.squeeze(1), tokens, bonus.squeeze(1))
