"""The best prefixes under the chain rule: P(y1..yu) = P(y1 | root) ... P(yu | root, y1..y(u-1)).

Level by level: all prefixes of a level that may still be among the n best are asked for their next token at once, as a
head or a draft layer is cheapest to run. A prefix is never more probable than the one it extends, so the n best of all
are found exactly: each of them, like its ancestors, is among the n best of its level. It is the best tree for any
drafter that knows the probability of a token given its prefix; with heads that ignore the prefix, as Medusa's, it is
the best tree under the product of their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ctc_drafter.types import Candidates

# (prefixes int64 [B, W, u], the root first; their places in the level above, int64 [B, W], None for the root)
# -> logits of the next token [B, W, V], or [B, 1, V] when they are the same for all
Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def expand(step: Step, root: torch.Tensor, *, nodes: int, depth: int, floor: float = 0.0) -> Candidates:
    """The `nodes` best prefixes of up to `depth` tokens after root `int64 [B]`, and others.

    On a CPU a level's prefixes that cannot be among them, or are less likely than `floor`, are not expanded; elsewhere
    shapes are static and the host is not asked.
    """
    prefixes, above = root[:, None, None], torch.zeros_like(root, dtype=torch.float32).unsqueeze(1)
    places: torch.Tensor | None = None
    levels: list[Candidates] = []
    start = 0  # where the level above begins among all candidates
    for level in range(1, depth + 1):
        scores, owners, tokens = best_children(step(prefixes, places), above, nodes)
        parents = torch.full_like(owners, -1) if level == 1 else owners + start
        start += levels[-1].tokens.shape[1] if levels else 0
        levels.append(Candidates(tokens, parents, torch.full_like(tokens, level), scores))
        wide = scores.shape[1]
        if root.device.type == "cpu":
            wide = promising(torch.cat([each.scores for each in levels], 1), scores, nodes, floor)
        if not wide:
            break
        above, places = scores[:, :wide], owners[:, :wide]
        kept = prefixes.gather(1, places.unsqueeze(-1).expand(-1, -1, level))
        prefixes = torch.cat([kept, tokens[:, :wide].unsqueeze(-1)], 2)
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


def promising(everything: torch.Tensor, level: torch.Tensor, nodes: int, floor: float) -> int:
    """How many of a level's scores `[B, C]`, sorted, may be among the n best of those known, in any row."""
    least = math.log(floor) if floor else -math.inf
    if everything.shape[1] > nodes:
        last = everything.topk(nodes, 1).values[:, -1:].clamp(min=least)
    else:
        last = torch.full_like(level[:, :1], least)
    return int((level >= last).sum(1).max())
