"""Tree size per step from measured step times (0 = plain step).

A step that verifies n nodes takes T(n), drafting included, and is expected to emit E(n) = 1 + Σ of the n best prefix
probabilities for each row. The n with the largest E(n) - λ T(n) wins, where λ is the speed that the row keeps up on
average, and plain decoding's at least: time is worth what else it could buy. (The n of the largest E(n) / T(n) would be
the best for a text whose steps are all alike. They are not: some draft well, some not at all.)
Where drafted steps are slower than plain ones on average, drafting stops: a few plain steps follow, then a trial, then
twice as many plain steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ctc_drafter.types import Acceptance, Candidates, TokenTree

REST, LONGEST_REST = 4, 64  # plain steps after a trial that did not pay, at first and at most
MEMORY = 1 / 12  # weight of the newest step in running means
START, RETRY = 1.15, 1.04  # the benefit of the doubt, in gain: for the first steps, and for a trial after a rest
TRUST = (0.3, 1.5)  # bounds of accepted tokens over what the drafter expected


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step, as `profile.measure` found them.

    batches, contexts, sizes: numbers of rows, cached tokens and nodes, ascending, sizes from 1. plain `[B][C]`: a step
    without drafting. draft `[B][C]`: the drafting part of a step. whole `[B][C][S]`: a step that verifies so many
    nodes, drafting included.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    sizes: tuple[int, ...]
    plain: tuple[tuple[float, ...], ...]
    draft: tuple[tuple[float, ...], ...]
    whole: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Curve:
    """plain: ms of a plain step; whole `[1+N]`: of steps that draft and verify 0..N nodes; draft: of drafting alone."""

    plain: float
    whole: np.ndarray
    draft: float

    def cost(self, free: bool) -> np.ndarray:
        """`whole`, or the same without drafting."""
        return self.whole - self.draft if free else self.whole

    @property
    def min_probability(self) -> float:
        """A node less likely than this never pays: it adds more time than plain steps need for as much text."""
        nodes = len(self.whole) - 1
        added = (self.whole[-1] - self.whole[1]) / (nodes - 1) if nodes > 1 else 0.0
        return float(np.clip(added / self.plain, 0.0, 0.5))


@dataclass(frozen=True)
class Budget:
    """The choice of tree sizes, up to `nodes`, by the times of one target and drafter on one machine."""

    times: StepTimes
    nodes: int

    def curve(self, rows: int, context: int) -> Curve:
        """Between what was measured times are interpolated; beyond, the nearest ones serve."""
        return _curve(self, rows, context // 64 * 64)


@lru_cache(maxsize=256)
def _curve(budget: Budget, rows: int, context: int) -> Curve:
    times, reach = budget.times, np.arange(budget.nodes + 1)

    def between(table: Sequence[Sequence[float]]) -> float:
        per_batch = [np.interp(context, times.contexts, line) for line in table]
        return float(np.interp(rows, times.batches, per_batch))

    plain, draft = between(times.plain), between(times.draft)
    measured = [between([[line[i] for line in batch] for batch in times.whole]) for i in range(len(times.sizes))]
    # More nodes never cost less; what says so is noise.
    whole = np.maximum.accumulate(np.interp(reach, (0, *times.sizes), (plain + draft, *measured)))
    return Curve(plain, whole, draft)


class Pace:
    """Chooses tree sizes of a running batch, and pauses drafting where it loses to plain steps."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self.gain = START  # running mean of text per time over plain decoding's, of steps with a draft
        self.trust = 1.0  # running mean of accepted tokens over expected ones
        self.rest, self.waiting, self.drafted = REST, 0, False

    def drafts(self) -> bool:
        """Whether to draft in the next step."""
        self.drafted = not self.waiting
        self.waiting = max(0, self.waiting - 1)
        return self.drafted

    def min_probability(self, rows: int, context: int) -> float:
        """Probability below which no node of any row saves time."""
        return self.budget.curve(rows, context).min_probability * max(self.gain, 1.0) / rows / TRUST[1]

    def size(self, candidates: Candidates, context: int) -> int:
        """Tree size of this step: the number of best prefixes to verify."""
        self.drafted = self.drafted and not candidates.free
        curve = self.budget.curve(len(candidates.scores), context)
        best = candidates.scores.exp().sort(1, descending=True).values[:, : len(curve.whole) - 1]
        trust = 1.0 if candidates.free else self.trust
        emitted = 1 + trust * np.concatenate([[0.0], best.mean(0).cumsum(0).cpu().numpy()])
        worth = max(self.gain, 1.0) / curve.plain
        return int((emitted - worth * curve.cost(candidates.free)[: len(emitted)]).argmax())

    def note(self, context: int, tree: TokenTree, acceptance: Acceptance) -> None:
        """Updates the averages after a step. Steps that only copied do not count for the gain of drafting."""
        if not self.drafted:
            return
        rows, nodes = tree.tokens.shape[0], tree.tokens.shape[1] - 1
        curve = self.budget.curve(rows, context)
        sums = torch.stack([acceptance.counts.sum(), (tree.scores.exp() * tree.valid).sum()])  # one wait for a GPU
        accepted, expected = (value / rows for value in sums.tolist())
        expected -= 1
        self.gain += MEMORY * ((1 + accepted) * curve.plain / curve.whole[nodes] - self.gain)
        if expected > 0:
            ratio = min(accepted / expected, 3.0)
            self.trust = float(np.clip(self.trust + MEMORY * (ratio - self.trust), *TRUST))
        if self.gain < 1:
            self.waiting, self.rest, self.gain = self.rest, min(2 * self.rest, LONGEST_REST), RETRY
        elif self.gain > START:
            self.rest = REST
