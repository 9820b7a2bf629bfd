"""Which path through the tree the target itself would have written."""

from __future__ import annotations

import torch

from ctc_drafter.types import Acceptance, TokenTree


def follow(tree: TokenTree, wanted: torch.Tensor) -> Acceptance:
    """Follows `wanted int64 [B, 1+N]`, the token that the target chooses after each node (-1: unknown, off the path).

    Worked example: root -> a -> ab, root -> b, the target wants a after the root, b after `a`, c after `ab`.
    The path is root, a, ab; two nodes are accepted, the bonus token is c, and `a b c` is emitted.
    """
    if wanted.device.type == "cpu":
        from ctc_drafter.decode import compiled

        return compiled.follow(tree, wanted)
    return follow_statically(tree, wanted)


def follow_statically(tree: TokenTree, wanted: torch.Tensor) -> Acceptance:
    """`follow` in tensor operations."""
    agrees = (tree.tokens == wanted.gather(1, tree.parents)) & tree.valid
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

    bonus = wanted.gather(1, last)
    emitted = tree.tokens.gather(1, path).roll(-1, 1)
    tokens = torch.where(index < counts, emitted, bonus)
    return Acceptance(path, counts.squeeze(1), tokens, bonus.squeeze(1))
