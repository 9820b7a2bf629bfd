"""One forward of the target over a token tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache

from ctc_drafter.target import Target
from ctc_drafter.types import TokenTree, Verification


def verify(
    target: Target, cache: Cache, lengths: torch.Tensor, tree: TokenTree, layers: Sequence[int] = ()
) -> Verification:
    """Logits and features of each node, given the row's committed tokens and the node's ancestors.

    lengths `int64 [B]`: committed tokens per row. The tree's keys and values are appended to the cache behind
    its longest row. A node stands at position length + depth.
    """
    slots = cache.get_seq_length()
    # Positions past the limit belong to nodes that can no longer be emitted; they only must not overflow.
    positions = (lengths.unsqueeze(1) + tree.depths).clamp(max=target.limit - 1)
    if tree.tokens.shape[1] == 1 and bool((lengths == slots).all()):  # nothing drafted: plain text needs no mask
        return target.forward(tree.tokens, positions, cache, layers=layers)
    cached = torch.arange(slots, device=lengths.device).expand(lengths.shape[0], -1)
    allowed = tree_mask(tree, cached < lengths.unsqueeze(1))
    key_positions = torch.cat([cached, positions], 1)
    return target.forward(tree.tokens, positions, cache, allowed, key_positions, layers)


def tree_mask(tree: TokenTree, committed: torch.Tensor) -> torch.Tensor:
    """`bool [B, 1+N, S+1+N]`: a node sees the committed slots of its row, `bool [B, S]`, and its ancestors.

    Example: one committed token, tree root -> a, root -> b::

        root  T  T F F
        a     T  T T F
        b     T  T F T
    """
    nodes = tree.tokens.shape[1]
    return torch.cat([committed.unsqueeze(1).expand(-1, nodes, -1), tree.ancestors], 2)
