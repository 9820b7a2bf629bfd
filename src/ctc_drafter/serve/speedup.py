"""How much sooner the server's tokens come than plain decoding would have written them, estimated."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ctc_drafter.decode.profile import fitting, plain_method, time_steps
from ctc_drafter.target.model import Target

PROMPT = 64


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


def time_plain_steps(target: Target, batch_size: int) -> dict[int, float]:
    """Median seconds of a plain step with 1, 2, 4, ... rows; warms the target up as well."""
    sizes = [*(1 << power for power in range((batch_size - 1).bit_length())), batch_size]
    plain, context = [plain_method(target)], fitting(target, PROMPT, 0)
    return {size: time_steps(plain, size, context)[0].ms / 1e3 for size in sizes}
