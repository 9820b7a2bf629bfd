"""Token-synchronous CTC prefix search: the most probable prefixes of a lattice, level by level.

Level u holds prefixes of u tokens. A prefix carries, for each frame, the probability that it has just been
completed there; from that and its own predictor state follow its blank and token masses, and from those the
scores of all its children in one matrix product. Every prefix is built once, so nothing is hashed or merged.
The scores are exact prefix probabilities of the lattice of `lattice.py`, whatever the beam width, and the `width` most
probable prefixes of all are always among those found. Shapes are static and the host is never asked: on a CPU, where
that is no gain, `search_cpu.py` finds the same prefixes with less work.

Worked example (F = 2, tokens a and b, no predictor, P(a), P(b), P(blank) = .5, .2, .3 then .1, .6, .3):
prefix(a) = .5 + .3 * .1 = .53; prefix(a b) = .5 * .6 = .3, which is `a` complete after frame 1, then `b`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ctc_drafter.ctc.joint import JointOfPrefixes, value_at
from ctc_drafter.ctc.lattice import sum_floor
from ctc_drafter.types import Candidates

# The tokens of W prefixes of one length, the newest first, int64 [B, W, R], to the bias of their next token, [B, W, V].
# The root comes after a prefix's own tokens, then -1.
Bias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Frames:
    """Frames as the search reads them.

    weights `[B, F, V]` and columns `[B, V, F]`: exp(token logits), scaled per frame so that nothing overflows.
    blank `[B, F]`: exp(blank logit), scaled alike. later `bool [F-1, F-1]`: true above the diagonal.
    vocabulary `int64 [V]`: the token of each column. joint: terms of frames and prefixes together, None for none; of
    its columns `weights` are 0 then, and together `[B, F, K]` has them.
    """

    weights: torch.Tensor
    columns: torch.Tensor
    blank: torch.Tensor
    later: torch.Tensor
    vocabulary: torch.Tensor
    joint: JointOfPrefixes | None
    together: torch.Tensor | None


@dataclass(frozen=True)
class After:
    """What may follow W prefixes; s is the largest bias, at least 0.

    shift `[B, W, 1]`: exp(-s). strength `[B, W, V]`: exp(bias - s). normaliser `[B, W, F]`: Z exp(-s).
    joint `[B, W, F, K]`: weight times strength of each frame's columns that have joint terms; None for none.
    """

    shift: torch.Tensor
    strength: torch.Tensor
    normaliser: torch.Tensor
    joint: torch.Tensor | None


@dataclass(frozen=True)
class Level:
    """W prefixes of one length.

    recent `int64 [B, W, R]`: their tokens as in `Bias`. column `[B, W]`: the newest one's place in the frames.
    parents `int64 [B, W]`: index in the level above. scores `[B, W]`: prefix probabilities.
    completed `[B, W, F]`: probability that the prefix is completed at each frame.
    """

    recent: torch.Tensor
    column: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    completed: torch.Tensor


@dataclass(frozen=True)
class Masses:
    """Probabilities of standing at a prefix before each frame over the normaliser there, `[B, W, F]`.

    blank, token: what the frame before holds. repeat `[B, W]`: score of the child that repeats the last token.
    """

    blank: torch.Tensor
    token: torch.Tensor
    repeat: torch.Tensor | None


def prefix_search(
    frame_logits: torch.Tensor,
    blank_logits: torch.Tensor,
    root: torch.Tensor,
    bias: Bias | None,
    *,
    width: int,
    depth: int,
    vocabulary: torch.Tensor | None = None,
    joint: JointOfPrefixes | None = None,
) -> Candidates:
    """The `width` best prefixes of each length up to `depth`, with their prefix probabilities.

    frame_logits `[B, F, V]`, blank_logits `[B, F]`, root `int64 [B]`; float32 or float64. vocabulary `int64 [V]`: the
    token of each column, where the frames know only some. joint: terms of frames and prefixes together (`joint.py`).
    Levels hold `min(width, prefixes there are)` candidates; those of probability 0 score -inf.
    """
    frames = prepare(frame_logits, blank_logits, vocabulary, joint)
    recent = pad(root.view(-1, 1, 1), (0, depth), value=-1)
    levels = [first_level(frames, recent, bias, width)]
    while len(levels) < depth:
        levels.append(next_level(frames, levels[-1], bias, width))
    return to_candidates(levels)


def prepare(
    frame_logits: torch.Tensor,
    blank_logits: torch.Tensor,
    vocabulary: torch.Tensor | None,
    joint: JointOfPrefixes | None = None,
) -> Frames:
    count = frame_logits.shape[1]
    if vocabulary is None:
        vocabulary = torch.arange(frame_logits.shape[2], device=frame_logits.device)
    top = torch.maximum(frame_logits.amax(-1), blank_logits).unsqueeze(-1)
    weights, together = (frame_logits - top).exp(), None
    if joint is not None:
        together = weights.gather(2, joint.columns)
        weights = weights.scatter(2, joint.columns, 0.0)
    later = torch.ones(count - 1, count - 1, dtype=torch.bool, device=weights.device).triu(1)
    return Frames(
        weights, weights.transpose(1, 2), (blank_logits - top[..., 0]).exp(), later, vocabulary, joint, together
    )


def first_level(frames: Frames, recent: torch.Tensor, bias: Bias | None, width: int) -> Level:
    """Children of the root, which counts as a blank frame: it cannot be repeated, and stands there before frame 1."""
    after = normalise(frames, bias, recent)
    blank = frames.blank.unsqueeze(1) * after.shift / after.normaliser
    standing = pad(blank[..., :-1].cumprod(-1), (1, 0), value=1.0)
    masses = Masses(standing / after.normaliser, torch.zeros_like(after.normaliser), None)
    root = recent[..., 0]
    above = Level(recent, root, root, torch.ones_like(after.normaliser[..., 0]), after.normaliser)
    return children(frames, above, masses, after, width)


def next_level(frames: Frames, level: Level, bias: Bias | None, width: int) -> Level:
    """Children of every prefix.

    n_t = completed_t + n_{t-1} stay_t and b_t = (b_{t-1} + n_{t-1}) blank_t, each as a product with the matrix
    of running products of stay or blank.
    """
    after = normalise(frames, bias, level.recent)
    place, normaliser = level.column.unsqueeze(-1), after.normaliser
    stay = frames.columns.gather(1, place.expand_as(normaliser)) * after.strength.gather(2, place)
    if frames.joint is not None and after.joint is not None:
        found, known = value_at(after.joint, frames.joint.columns, level.column)
        stay = found.where(known, stay)
    stay = stay / normaliser
    blank = frames.blank.unsqueeze(1) * after.shift / normaliser
    stays, blanks = running_products(torch.stack([stay[..., :-1], blank[..., :-1]]), frames.later)
    token = pad((level.completed[..., None, :-1] @ stays).squeeze(-2), (1, 0))
    after_blank = pad(((token * blank)[..., None, :-1] @ blanks).squeeze(-2), (1, 0))
    masses = Masses(after_blank / normaliser, token / normaliser, (after_blank * stay).sum(-1))
    return children(frames, level, masses, after, width)


def normalise(frames: Frames, bias: Bias | None, recent: torch.Tensor) -> After:
    if bias is None:
        shift = frames.weights.new_ones(*recent.shape[:2], 1)
        strength = shift.expand(-1, -1, frames.weights.shape[-1])
    else:
        values = bias(recent).to(frames.weights.dtype)
        largest = values.amax(-1, keepdim=True).clamp(min=0)
        shift, strength = (-largest).exp(), (values - largest).exp()
    sums, joint = strength @ frames.columns, None
    if frames.joint is not None and frames.together is not None:
        where = frames.joint.columns.flatten(1).unsqueeze(1).expand(-1, strength.shape[1], -1)
        strengths = strength.gather(2, where).unflatten(2, frames.joint.columns.shape[1:])
        joint = strengths * frames.together.unsqueeze(1) * frames.joint.values(recent).to(strength.dtype).exp()
        sums = sums + joint.sum(-1)
    sums = sums.clamp(min=sum_floor(strength.dtype))
    return After(shift, strength, sums + frames.blank.unsqueeze(1) * shift, joint)


def running_products(factors: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """`[..., F] -> [..., F, F]`: entry (i, t) is the product of factors i+1..t, 1 for t = i, 0 for t < i."""
    return torch.where(later, factors.unsqueeze(-2), 1.0).cumprod(-1).triu()


def children(frames: Frames, level: Level, masses: Masses, after: After, width: int) -> Level:
    """The best children of a level's prefixes and where they are completed."""
    strength, standing = after.strength, masses.blank + masses.token
    scores = strength * (standing @ frames.weights)
    if frames.joint is not None and after.joint is not None:
        more = (standing.unsqueeze(-1) * after.joint).flatten(2)
        scores = scores.scatter_add(2, frames.joint.columns.flatten(1).unsqueeze(1).expand_as(more), more)
    if masses.repeat is not None:  # a token equal to the last one is new only after a blank
        scores.scatter_(2, level.column.unsqueeze(-1), masses.repeat.unsqueeze(-1))
    size = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(width, scores.shape[1] * size), dim=-1)
    parents, column = index // size, index % size

    wide = parents.unsqueeze(-1).expand(-1, -1, frames.blank.shape[1])
    token = masses.token.gather(1, wide)
    if masses.repeat is not None:
        token = token.masked_fill((level.column.gather(1, parents) == column).unsqueeze(-1), 0.0)
    emission = frames.columns.gather(1, column.unsqueeze(-1).expand_as(wide))
    emission = emission * strength.flatten(1).gather(1, index).unsqueeze(-1)
    if frames.joint is not None and after.joint is not None:
        of_parents = after.joint.gather(1, parents[..., None, None].expand(-1, -1, *after.joint.shape[2:]))
        found, known = value_at(of_parents, frames.joint.columns, column)
        emission = found.where(known, emission)
    completed = (masses.blank.gather(1, wide) + token) * emission
    # Rounding must not lift a child above its parent: trees rely on the order.
    best = torch.minimum(best, level.scores.gather(1, parents))
    before = level.recent.gather(1, parents.unsqueeze(-1).expand(-1, -1, level.recent.shape[2]))
    recent = torch.cat([frames.vocabulary[column].unsqueeze(-1), before[..., :-1]], -1)
    return Level(recent, column, parents, best, completed)


def to_candidates(levels: list[Level]) -> Candidates:
    """Levels end to end."""
    parents, depths = [], []
    above, start = 0, 0  # where the level above, and this level, begin
    for depth, level in enumerate(levels, start=1):
        parents.append(level.parents + above if depth > 1 else torch.full_like(level.parents, -1))
        depths.append(torch.full_like(level.parents, depth))
        above, start = start, start + level.parents.shape[1]
    return Candidates(
        tokens=torch.cat([level.recent[..., 0] for level in levels], 1),
        parents=torch.cat(parents, 1),
        depths=torch.cat(depths, 1),
        scores=torch.cat([level.scores for level in levels], 1).log(),
    )
