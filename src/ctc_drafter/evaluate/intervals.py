"""95% bootstrap intervals over prompts; all methods are resampled together, so that ratios are paired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ctc_drafter.evaluate.results import PLAIN_KEY, Key, Results

RESAMPLES = 2000
FEWEST = 8  # prompts


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval; None of fewer prompts than `FEWEST`, whose interval would mean nothing."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        between = "" if self.interval is None else f" ({self.interval[0]:.2f}–{self.interval[1]:.2f})"
        return f"{self.value:.2f}{between}"


class Bootstrap:
    """Bootstrap over the prompts of a task or category. The same seed gives the same intervals."""

    def __init__(self, results: Results, task: str, category: str | None = None, seed: int = 0):
        wanted = [
            record
            for record in results.records
            if record["task"] == task and not record["skipped"] and category in (None, record["category"])
        ]
        prompts = sorted({record["index"] for record in wanted})
        place = {index: i for i, index in enumerate(prompts)}
        self.sums: dict[Key, np.ndarray] = {}  # emitted by steps, steps, tokens, seconds of each prompt, [4, P]
        for record in wanted:
            key = (record["method"], record["nodes"])
            sums = self.sums.setdefault(key, np.zeros((4, len(prompts))))
            sums[:, place[record["index"]]] = numbers(record)
        rng = np.random.default_rng(seed)
        count = len(prompts)
        enough = count >= FEWEST
        drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) if enough else np.zeros((0, count))
        self.weights = np.concatenate([np.ones((1, count)), drawn])  # the first is the sample itself

    def beta(self, key: Key) -> Estimate | None:
        return estimate(self._beta(key))

    def gamma(self, key: Key) -> Estimate | None:
        return estimate(ratio(self._speed(key), self._speed(PLAIN_KEY)))

    def beta_ratio(self, key: Key, other: Key) -> Estimate | None:
        return estimate(ratio(self._beta(key), self._beta(other)))

    def _beta(self, key: Key) -> np.ndarray | None:
        totals = self._totals(key)
        return None if totals is None else ratio(totals[0], totals[1])

    def _speed(self, key: Key) -> np.ndarray | None:
        totals = self._totals(key)
        return None if totals is None else ratio(totals[2], totals[3])

    def _totals(self, key: Key) -> np.ndarray | None:
        return self.sums[key] @ self.weights.T if key in self.sums else None


def numbers(record: dict[str, Any]) -> tuple[float, float, float, float]:
    return record["tokens"] - record["turns"], record["steps"], record["tokens"], record["seconds"]


def ratio(above: np.ndarray | None, below: np.ndarray | None) -> np.ndarray | None:
    """NaN where there is nothing below."""
    if above is None or below is None:
        return None
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def estimate(values: np.ndarray | None) -> Estimate | None:
    """The first value, and the middle 95% of the others, if there are any."""
    if values is None or np.isnan(values[0]):
        return None
    ends = np.nanpercentile(values[1:], [2.5, 97.5]) if len(values) > 1 else None
    return Estimate(float(values[0]), None if ends is None else (float(ends[0]), float(ends[1])))
