"""Tree size per step from measured step times (0 = plain step).

A step that verifies n nodes takes T(n), drafting included, and is expected to emit E(n) = 1 + Σ of the n best prefix
probabilities for each row. The n with the largest E(n) - λ T(n) wins, where λ is the speed that the rows keep up on
average, and plain decoding's at least: time is worth what else it could buy. (The n of the largest E(n) / T(n) would be
the best for a text whose steps are all alike. They are not: some draft well, some not at all.)
Where drafted steps are slower than plain ones on average, drafting stops, so that it costs nothing: a few plain steps
follow, then a trial, then twice as many plain steps. A batch shrinks and grows, and what pays for one row need not pay
for thirty-two, so this is kept apart for batches of about one size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from ctc_drafter.types import Acceptance, Candidates, TokenTree

REST, LONGEST_REST = 4, 64  # plain steps after a trial that did not pay, at first and at most
MEMORY = 1 / 24  # weight of the newest step in running means, once they have run for a while
PRIOR = 3  # steps that the first value of a running mean counts for
START, RETRY = 1.15, 1.04  # the benefit of the doubt, in gain: for the first steps, and for a trial after a rest
LEAST_TRUST, MOST_TRUST = 0.15, 1.5  # bounds of accepted tokens over what the drafter expected
STAKE = 0.5  # plain steps that a trial may take longer than a step of one node
FORGIVE = 1 / 8  # way back to full trust, at each rest
HOPE = 0.7  # an easy text emits 1 + HOPE log2(1 + n) tokens a step with n nodes: 1.7 with 1, 2.6 with 4, 3.9 with 16


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step, as `profile.measure` found them.

    batches, contexts, sizes: numbers of rows, cached tokens and nodes, ascending, sizes from 1. plain `[B][C]`: a step
    without drafting. draft `[B][C]`: the drafting part of a step. whole `[B][C][S]`: a step that verifies so many
    nodes, drafting included. Raises `ValueError` for what are no such times, as in a damaged file.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    sizes: tuple[int, ...]
    plain: tuple[tuple[float, ...], ...]
    draft: tuple[tuple[float, ...], ...]
    whole: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        axes = (self.batches, self.contexts, self.sizes)
        if not all(axis and axis[0] >= 1 and list(axis) == sorted(set(axis)) for axis in axes):
            raise ValueError(f"rows, contexts and sizes are not ascending: {axes}")
        lines = [*self.plain, *self.draft, *self.whole]
        if not all(len(each) == len(self.batches) for each in (self.plain, self.draft, self.whole)):
            raise ValueError("step times are not as many as rows")
        if not all(len(line) == len(self.contexts) for line in lines):
            raise ValueError("step times are not as many as contexts")
        if not all(len(cell) == len(self.sizes) for line in self.whole for cell in line):
            raise ValueError("step times are not as many as sizes")
        taken = [*flat(self.plain), *(ms for line in self.whole for ms in flat(line))]
        if not all(math.isfinite(ms) and ms > 0 for ms in taken) or not all(map(math.isfinite, flat(self.draft))):
            raise ValueError("a step takes no time, or has no end")


def flat(table: Iterable[Iterable[float]]) -> list[float]:
    return [value for line in table for value in line]


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
    def hopeless(self) -> bool:
        """Whether no size pays even for a text that is easy to draft, as in large batches on a CPU."""
        nodes = np.arange(1, len(self.whole))
        return bool((1 + HOPE * np.log2(1 + nodes) < self.whole[1:] / self.plain).all())

    @property
    def min_probability(self) -> float:
        """A node less likely than this never pays: it adds more time than plain steps need for as much text."""
        nodes = len(self.whole) - 1
        added = (self.whole[-1] - self.whole[1]) / (nodes - 1) if nodes > 1 else 0.0
        return float(np.clip(added / self.plain, 0.0, 0.5))


@dataclass(frozen=True)
class Budget:
    """The choice of tree sizes, up to `nodes`, by the times of one target and drafter on one machine.

    network, copies: of how many batches in a row, by their size as `Record` has it, such drafts have not paid. Others
    that follow go by it; a copy of the budget (`dataclasses.replace`) does not.
    """

    times: StepTimes
    nodes: int
    network: dict[int, int] = field(default_factory=dict, init=False, compare=False, repr=False)
    copies: dict[int, int] = field(default_factory=dict, init=False, compare=False, repr=False)

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
    whole = np.interp(reach, (0, *times.sizes), ascending([plain + draft, *measured]))
    return Curve(plain, whole, draft)


def ascending(times: Sequence[float]) -> list[float]:
    """The nearest times, by least squares, that never fall: more nodes never cost less, and what says so is noise.

    What falls is put together with what stands before it, at their mean (pool adjacent violators).
    Example: 5 6 5 9 become 5 5.5 5.5 9.
    """
    pools: list[tuple[float, int]] = []  # mean, members
    for time in times:
        mean, members = time, 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, members = (before * more + mean * members) / (more + members), more + members
        pools.append((mean, members))
    return [mean for mean, members in pools for _ in range(members)]


class Trees(Protocol):
    """Who chooses the trees of a running batch, step by step. nodes: as many as a draft may be asked for."""

    nodes: int

    def drafts(self, rows: int) -> bool:
        """Whether to draft in the next step, of `rows` rows; what costs nothing is verified either way."""

    def min_probability(self, rows: int, context: int) -> float:
        """Probability below which no node is worth asking for."""

    def size(self, candidates: Candidates, context: int) -> int:
        """Tree size of this step: the number of best prefixes to verify, the same for all rows."""

    def note(self, context: int, tree: TokenTree, acceptance: Acceptance) -> None:
        """Is told what became of the step."""


@dataclass
class Mean:
    """A running mean: its first value counts for `PRIOR` steps, and old steps are forgotten."""

    value: float
    steps: int = PRIOR

    def add(self, new: float) -> None:
        self.steps += 1
        self.value += max(MEMORY, 1 / self.steps) * (new - self.value)


@dataclass
class Trust(Mean):
    """Accepted tokens over expected ones."""

    def note(self, accepted: float, expected: float) -> None:
        if expected > 0:
            self.add(min(accepted / expected, 3.0))
            self.value = float(np.clip(self.value, LEAST_TRUST, MOST_TRUST))

    def forgive(self) -> None:
        """Goes part of the way back to 1: what is not tried any more cannot prove itself."""
        self.value += FORGIVE * (1 - self.value)


class Pauses:
    """Whether drafting pays in batches of about one size, and how long it rests where it does not.

    gain: text per time over plain decoding's, of steps with a draft. in_vain: of how many batches in a row, by their
    size, drafts have not paid. The longer that goes on, the less is tried in the next one. Where drafts are `hopeless`
    by the step times, the longest rest comes first.
    """

    def __init__(self, in_vain: dict[int, int], size: int, hopeless: bool = False) -> None:
        self.in_vain, self.size, self.before, self.waiting = in_vain, size, in_vain.get(size, 0), 0
        self.gain, self.rest = Mean(START if self.before < 2 else RETRY), min(REST << self.before, LONGEST_REST)
        if hopeless:
            self.gain, self.waiting, self.rest = Mean(RETRY), LONGEST_REST, LONGEST_REST

    @property
    def trial(self) -> bool:
        """Whether the next draft is the first one, or the first after a rest."""
        return self.gain.steps == PRIOR

    def drafts(self) -> bool:
        """Whether the next step drafts; counts the steps of a rest."""
        self.waiting -= 1
        return self.waiting < 0

    def note(self, gain: float) -> bool:
        """Takes in a step with a draft; returns whether drafting rests now."""
        self.gain.add(gain)
        if self.gain.value < 1:
            self.in_vain[self.size] = self.before + 1
            self.waiting, self.rest, self.gain = self.rest, min(2 * self.rest, LONGEST_REST), Mean(RETRY)
            return True
        if self.gain.value > START:
            self.rest, self.before = REST, -1  # whatever follows, in this batch it has paid
            self.in_vain[self.size] = 0
        return False


class Record:
    """What drafts of one kind were worth: those of the network, or those that were copied for nothing."""

    def __init__(self, in_vain: dict[int, int]) -> None:
        self.trust, self.in_vain = Trust(1.0), in_vain
        self._pauses: dict[int, Pauses] = {}

    def pauses(self, rows: int, hopeless: bool = False) -> Pauses:
        """Those of batches with 1 row, 2 and 3, 4 to 7, and so on; hopeless: see `Pauses`, of the first call for a
        size."""
        size = rows.bit_length()
        if size not in self._pauses:
            self._pauses[size] = Pauses(self.in_vain, size, hopeless)
        return self._pauses[size]

    def note(self, rows: int, accepted: float, expected: float, gain: float) -> None:
        """Takes in a step with such a draft: accepted and expected tokens of a row, and `gain` as in `Pauses`."""
        self.trust.note(accepted, expected)
        if self.pauses(rows).note(gain):
            self.trust.forgive()


class Pace:
    """Chooses tree sizes of a running batch, and pauses drafting where it loses to plain steps. See `Trees`."""

    def __init__(self, budget: Budget):
        self.budget, self.nodes = budget, budget.nodes
        self.network, self.copies = Record(budget.network), Record(budget.copies)
        self.drafted = False  # whether this step paid for a draft

    def drafts(self, rows: int) -> bool:
        """See `Trees`."""
        self.drafted = self.network.pauses(rows, self.budget.curve(rows, 0).hopeless).drafts()
        return self.drafted

    def min_probability(self, rows: int, context: int) -> float:
        """Probability below which no node of any row saves time."""
        return self.budget.curve(rows, context).min_probability * self._worth(rows) / rows / MOST_TRUST

    def size(self, candidates: Candidates, context: int) -> int:
        """See `Trees`."""
        if candidates.free:
            self.drafted = False
        rows, reach = candidates.scores.shape
        record = self.copies if candidates.free else self.network
        if not reach or (candidates.free and not record.pauses(rows).drafts()):
            return 0
        curve = self.budget.curve(rows, context)
        best = candidates.scores.exp().sort(1, descending=True).values[:, : len(curve.whole) - 1]
        emitted = 1 + record.trust.value * np.concatenate([[0.0], best.mean(0).cumsum(0).cpu().numpy()])
        cost = curve.cost(candidates.free)[: len(emitted)] / curve.plain
        value = emitted - self._worth(rows) * cost
        if record.pauses(rows).trial:
            value[cost > cost[1] + STAKE] = -math.inf
        nodes = int(value.argmax())
        if candidates.free and not nodes:
            record.trust.forgive()
        return nodes

    def note(self, context: int, tree: TokenTree, acceptance: Acceptance) -> None:
        """Updates the averages after a step, those of its kind of draft."""
        rows, nodes = tree.tokens.shape[0], tree.tokens.shape[1] - 1
        if not self.drafted and not nodes:
            return
        sums = torch.stack([acceptance.counts.sum(), (tree.scores.exp() * tree.valid).sum()])  # one wait for a GPU
        accepted, expected = (value / rows for value in sums.tolist())
        curve = self.budget.curve(rows, context)
        gain = (1 + accepted) * curve.plain / float(curve.cost(not self.drafted)[nodes])
        (self.network if self.drafted else self.copies).note(rows, accepted, expected - 1, gain)

    def _worth(self, rows: int) -> float:
        """Tokens that a plain step's time is worth."""
        return max(self.network.pauses(rows).gain.value, 1.0)
