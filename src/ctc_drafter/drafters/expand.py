"""The best prefixes under the chain rule: P(y1..yu) = P(y1 | root) ... P(yu | root, y1..y(u-1)).

Level by level: all prefixes of a level that may still be among the n best are asked for their next token at once, as a
head or a draft layer is cheapest to run. A prefix is never more probable than the one it extends, so the n best of all
are found exactly: each of them, like its ancestors, is among the n best of its level. It is the best tree for any
drafter that knows the probability of a token given its prefix; with heads that ignore the prefix, as Medusa's, it is
the best tree under the product of their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctc_drafter.types import Candidates

# (prefixes int64 [B, W, u], the root first; their places in the level above, int64 [B, W], None for the root)
# -> float32 logits of the next token [B, W, V], or [B, 1, V] when they are the same for all
Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def expand(step: Step, root: torch.Tensor, *, nodes: int, depth: int, floor: float = 0.0) -> Candidates:
    """The `nodes` best prefixes of up to `depth` tokens after root `int64 [B]`, and others.

    On a CPU, prefixes that cannot be among them, or are less likely than `floor`, are neither asked nor returned.
    """
    if root.device.type == "cpu":
        from ctc_drafter.drafters.grow import grow

        return grow(step, root, nodes, depth, floor)
    return expand_statically(step, root, nodes, depth)


def expand_statically(step: Step, root: torch.Tensor, nodes: int, depth: int) -> Candidates:
    """`expand` in tensor operations of static shapes, which never ask the host: the `nodes` best of each level."""
    prefixes, above = root[:, None, None], torch.zeros_like(root, dtype=torch.float32).unsqueeze(1)
    places: torch.Tensor | None = None
    levels: list[Candidates] = []
    start = 0  # where the level above begins among all candidates
    for level in range(1, depth + 1):
        scores, owners, tokens = best_children(step(prefixes, places), above, nodes)
        parents = torch.full_like(owners, -1) if level == 1 else owners + start
        start += levels[-1].tokens.shape[1] if levels else 0
        levels.append(Candidates(tokens, parents, torch.full_like(tokens, level), scores))
        above, places = scores, owners
        kept = prefixes.gather(1, places.unsqueeze(-1).expand(-1, -1, level))
        prefixes = torch.cat([kept, tokens.unsqueeze(-1)], 2)
    return Candidates(
        tokens=torch.cat([each.tokens for each in levels], 1),
        parents=torch.cat([each.parents for each in levels], 1),
        depths=torch.cat([each.depths for each in levels], 1),
        scores=torch.cat([each.scores for each in levels], 1),
    )


def best_children(
    logits: torch.Tensor, above: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, parents and tokens `[B, C]` of the best `count` children, best first; above `[B, W]`: parents' scores."""
    best, tokens = logits.topk(min(count, logits.shape[-1]), -1)
    # Rounding must not lift a child above its parent: trees rely on the order.
    steps = (best - logits.logsumexp(-1, keepdim=True)).clamp(max=0.0)
    scores = above.unsqueeze(-1) + steps
    chosen, index = scores.flatten(1).topk(min(count, scores.shape[1] * scores.shape[2]), -1)
    return chosen, index // scores.shape[2], tokens.expand_as(scores).flatten(1).gather(1, index)
