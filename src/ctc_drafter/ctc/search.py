"""Token-synchronous prefix search: the best prefixes of a frame lattice, level by level.

Level u holds prefixes of u tokens. A prefix carries, for each frame, the probability that it has just been
completed there; from that and its own predictor state follow its blank and token masses, and from those the
scores of all its children in one matrix product. Every prefix is built once, so nothing is hashed or merged.
The scores are exact prefix probabilities (DESIGN of the lattice: `lattice.py`), whatever the beam width.

Worked example (F = 2, tokens a and b, no predictor, P(a), P(b), P(blank) = .5, .2, .3 then .1, .6, .3):
prefix(a) = .5 + .3 * .1 = .53; prefix(a b) = .5 * .6 = .3, which is `a` complete after frame 1, then `b`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctc_drafter.ctc.lattice import sum_floor
from ctc_drafter.types import Candidates

# (previous [B, W], last [B, W], rows [B, S] or None) -> bias [B, W, V], or [B, W, S] for those token rows only.
# `previous` is -1 where the prefix is empty and `last` is the root.
Bias = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def prefix_search(
    frame_logits: torch.Tensor,
    blank_logits: torch.Tensor,
    root: torch.Tensor,
    bias: Bias | None,
    *,
    width: int,
    depth: int,
    shortlist: int | None = None,
) -> Candidates:
    """The `width` best prefixes of each length up to `depth`, with their prefix probabilities.

    frame_logits `[B, F, V]`, blank_logits `[B, F]`, root `int64 [B]`; float32 or float64. With `shortlist`
    set, only that many tokens, the best of any frame, may be drafted, and the mass of the others stays in the
    normaliser without its bias: a little less exact, much cheaper on a CPU. None searches the vocabulary.
    Levels hold `min(width, prefixes there are)` candidates; those of probability 0 score -inf.
    """
    batch, frames, vocabulary = frame_logits.shape
    top = torch.maximum(frame_logits.amax(-1), blank_logits).unsqueeze(-1)
    weights = (frame_logits - top).exp()
    outside = (blank_logits - top[..., 0]).exp()
    blank = outside
    rows = None
    if shortlist is not None and shortlist < vocabulary:
        rows = weights.amax(1).topk(shortlist, dim=-1, sorted=False).indices
        kept = weights.gather(2, rows.unsqueeze(1).expand(-1, frames, -1))
        outside = blank + (weights.sum(-1) - kept.sum(-1)).clamp(min=0)
        weights = kept

    ids = torch.arange(vocabulary, device=root.device).expand(batch, -1) if rows is None else rows
    last, previous = root.unsqueeze(1), root.new_full((batch, 1), -1)
    place: torch.Tensor | None = None  # column of each prefix's last token in `weights`
    completed = weights.new_zeros(batch, 1, frames)
    scores = weights.new_ones(batch, 1)
    levels = []
    for _ in range(depth):
        shift, expbias = _exp_bias(bias, previous, last, rows, weights)
        sums = (expbias @ weights.transpose(1, 2)).clamp(min=sum_floor(weights.dtype))
        normaliser = sums + outside.unsqueeze(1) * shift
        blank_prob = blank.unsqueeze(1) * shift / normaliser
        if place is None:  # the root counts as a blank frame: it cannot be repeated
            stay = torch.zeros_like(normaliser)
        else:
            stay = weights.transpose(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, frames))
            stay = stay * expbias.gather(2, place.unsqueeze(-1)) / normaliser
        after_blank, after_token = _masses(completed, stay, blank_prob, start=place is None)

        per_frame = (after_blank + after_token) / normaliser
        children = expbias * (per_frame @ weights)
        if place is not None:  # a token equal to the last one is new only after a blank
            children = children.scatter(2, place.unsqueeze(-1), (after_blank * stay).sum(-1, keepdim=True))
        count = min(width, children[0].numel())
        found, index = children.flatten(1).topk(count, dim=-1)
        parent = index // weights.shape[-1]
        child = index % weights.shape[-1]
        scores = torch.minimum(found, scores.gather(1, parent))
        levels.append((ids.gather(1, child), parent, scores))

        completed = _completed(after_blank, after_token, normaliser, weights, expbias, parent, child, place)
        previous, last, place = last.gather(1, parent), ids.gather(1, child), child
    return _candidates(levels)


def _exp_bias(
    bias: Bias | None,
    previous: torch.Tensor,
    last: torch.Tensor,
    rows: torch.Tensor | None,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp(-s) [B, W, 1]` and `exp(bias - s) [B, W, S]` with s the largest bias of a prefix, at least 0."""
    if bias is None:
        one = weights.new_ones(*last.shape, 1)
        return one, one.expand(-1, -1, weights.shape[-1])
    values = bias(previous, last, rows).to(weights.dtype)
    shift = values.amax(-1, keepdim=True).clamp(min=0)
    return (-shift).exp(), (values - shift).exp()


def _masses(
    completed: torch.Tensor, stay: torch.Tensor, blank: torch.Tensor, *, start: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities `[B, W, F]` of standing at a prefix before each frame, the last one a blank or a token.

    n_t = completed_t + n_{t-1} stay_t and b_t = (b_{t-1} + n_{t-1}) blank_t, as two products with the
    matrices of running products. `start`: b_0 = 1, which holds for the root alone.
    """
    token = torch.zeros_like(completed)
    token[..., 1:] = (completed[..., :-1].unsqueeze(-2) @ _running_products(stay[..., :-1])).squeeze(-2)
    inflow = token[..., :-1] * blank[..., :-1]
    after_blank = torch.zeros_like(completed)
    products = _running_products(blank[..., :-1])
    after_blank[..., 1:] = (inflow.unsqueeze(-2) @ products).squeeze(-2)
    if start:
        after_blank[..., 0] = 1
        after_blank[..., 1:] += blank[..., :-1].cumprod(-1)
    return after_blank, token


def _running_products(factors: torch.Tensor) -> torch.Tensor:
    """`[..., F] -> [..., F, F]`: entry (i, t) is the product of factors i+1..t, 1 for t = i, 0 for t < i."""
    size = factors.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=factors.device).triu(1)
    spread = torch.where(later, factors.unsqueeze(-2), 1.0)
    return spread.cumprod(-1).triu()


def _completed(
    after_blank: torch.Tensor,
    after_token: torch.Tensor,
    normaliser: torch.Tensor,
    weights: torch.Tensor,
    expbias: torch.Tensor,
    parent: torch.Tensor,
    child: torch.Tensor,
    place: torch.Tensor | None,
) -> torch.Tensor:
    """Probability `[B, W', F]` that each chosen child is completed at each frame."""
    frames = weights.shape[1]
    wide = parent.unsqueeze(-1).expand(-1, -1, frames)
    emission = weights.transpose(1, 2).gather(1, child.unsqueeze(-1).expand(-1, -1, frames))
    strength = expbias.flatten(1).gather(1, parent * weights.shape[-1] + child).unsqueeze(-1)
    mass = (after_blank + after_token).gather(1, wide)
    if place is not None:
        repeats = (place.gather(1, parent) == child).unsqueeze(-1)
        mass = torch.where(repeats, after_blank.gather(1, wide), mass)
    return mass * emission * strength / normaliser.gather(1, wide)


def _candidates(levels: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Candidates:
    """Levels of (tokens, parents within the level above, probabilities) end to end."""
    parents, depths = [], []
    above, start = 0, 0  # where the level above, and this level, begin
    for depth, (tokens, parent, _) in enumerate(levels, start=1):
        parents.append(parent + above if depth > 1 else torch.full_like(parent, -1))
        depths.append(torch.full_like(parent, depth))
        above, start = start, start + tokens.shape[1]
    return Candidates(
        tokens=torch.cat([tokens for tokens, _, _ in levels], 1),
        parents=torch.cat(parents, 1),
        depths=torch.cat(depths, 1),
        scores=torch.cat([scores for _, _, scores in levels], 1).log(),
    )
