"""Counters and stage timers of a decoding run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stats:
    """Counters of one call to `generate` or `plain_generate`, all rows together.

    tokens: emitted tokens, after cutting at eos and at the limit. The first token of a row comes from the
        prefill and costs no step.
    steps: verifications (one forward of one row) after the prefill.
    accept_histogram: entry a counts the verifications that accepted a drafted tokens, cut ones as accepted.
    seconds: wall time, prefill included. prefill_seconds: the part until the first token.
    stages_ms: total milliseconds per stage; empty unless timing was asked for.
    """

    tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    accept_histogram: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    stages_ms: dict[str, float] = field(default_factory=dict)

    @property
    def beta(self) -> float:
        """Emitted tokens per verification, bonus included; the prefill's token is not counted."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_step(self) -> float:
        """`beta` by the name that figures are shown with."""
        return self.beta

    def count(self, accepted: int, emitted: int) -> None:
        """One verification of one row."""
        self.steps += 1
        self.step_tokens += emitted
        self.tokens += emitted
        self.accept_histogram += [0] * (accepted + 1 - len(self.accept_histogram))
        self.accept_histogram[accepted] += 1

    def __add__(self, other: Stats) -> Stats:
        size = max(len(self.accept_histogram), len(other.accept_histogram))
        left, right = (s.accept_histogram + [0] * (size - len(s.accept_histogram)) for s in (self, other))
        stages = {
            name: self.stages_ms.get(name, 0.0) + other.stages_ms.get(name, 0.0)
            for name in {**self.stages_ms, **other.stages_ms}
        }
        return Stats(
            self.tokens + other.tokens,
            self.steps + other.steps,
            self.step_tokens + other.step_tokens,
            [a + b for a, b in zip(left, right, strict=True)],
            self.seconds + other.seconds,
            self.prefill_seconds + other.prefill_seconds,
            stages,
        )


class Stopwatch:
    """Adds up the milliseconds of named stages. Does nothing unless `timed`: a GPU must be waited for."""

    def __init__(self, device: torch.device, timed: bool):
        self.device, self.timed = device, timed
        self.total_ms: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if not self.timed:
            yield
            return
        start = self._now()
        yield
        self.total_ms[stage] += (self._now() - start) * 1e3

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
