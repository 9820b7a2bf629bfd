"""How much sooner the server's tokens come than plain decoding would have written them, estimated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np
import torch

from ctc_drafter.decode.batch import Batch, Method
from ctc_drafter.decode.rows import Row
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.drafters.silent import Silent

PROMPT, STEPS = 64, 8


class Speedup:
    """γ: seconds that plain steps of the same number of rows would have taken, over the seconds that were taken.

    plain: seconds of a plain step by number of rows, as `time_plain_steps` measures them; numbers between are
    interpolated. An estimate: plain steps slow down with long texts, and are timed once on short ones.
    """

    def __init__(self, plain: Mapping[int, float]):
        self.sizes, self.seconds = np.array(sorted(plain)), np.array([plain[size] for size in sorted(plain)])
        self.plain_seconds = self.taken_seconds = 0.0

    def count(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of `rows` rows that emitted `tokens` tokens."""
        self.plain_seconds += tokens / rows * float(np.interp(rows, self.sizes, self.seconds))
        self.taken_seconds += seconds

    @property
    def gamma(self) -> float:
        """0 before the first step."""
        return self.plain_seconds / self.taken_seconds if self.taken_seconds else 0.0


@torch.inference_mode()
def time_plain_steps(method: Method, batch_size: int) -> dict[int, float]:
    """Median seconds of a plain step with 1, 2, 4, ... rows; warms the target up as well."""
    plain = Method(method.target, Silent(), 1, 0.0, method.chooser)
    sizes = [*(1 << power for power in range((batch_size - 1).bit_length())), batch_size]
    return {size: _median_step(plain, size) for size in sizes}


def _median_step(method: Method, rows: int) -> float:
    batch = Batch(method, Stopwatch(method.target.device, timed=False))
    width = max(1, min(PROMPT, method.target.context - STEPS - 2))
    batch.admit([Row(row, [0] * width, STEPS) for row in range(rows)])
    seconds = []
    for _ in range(STEPS if width == PROMPT else 1):
        begin = time.perf_counter()
        batch.step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
