"""Times of decoding steps, stage by stage: all ways in turn, several rounds, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ctc_drafter.decode.batch import Batch, Method
from ctc_drafter.decode.choose import ARGMAX
from ctc_drafter.decode.rows import Row
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.drafters.base import Silent
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.target.model import Target

ROUNDS, WARM = 7, 2
STAGES = ("draft", "tree", "verify", "accept", "compact")


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step: the median over rounds, each round's, and the median of each stage."""

    ms: float
    rounds: tuple[float, ...]
    stages: dict[str, float]


def plain_method(target: Target) -> Method:
    """Plain decoding as a method: the same loop without a draft."""
    return Method(target, Silent(), 1, 0.0, ARGMAX)


@torch.inference_mode()
def time_steps(methods: Sequence[Method], rows: int, context: int, rounds: int = ROUNDS) -> list[StepTime]:
    """A step of each method in turn on made-up text, `rounds` times after a few that do not count.

    So a change of the machine hits all of them alike. Rows start with `context` cached tokens.
    """
    clock = Stopwatch(methods[0].target.device, timed=True)
    batches = [started(method, rows, context, clock) for method in methods]
    taken: list[list[dict[str, float]]] = [[] for _ in batches]
    for turn in range(WARM + rounds):
        for place, batch in enumerate(batches):
            clock.total_ms.clear()
            begin = time.perf_counter()
            tokens, accepted = batch.step().emitted()
            whole = (time.perf_counter() - begin) * 1e3
            for row, emitted, count in zip(batch.rows, tokens, accepted, strict=True):
                row.tokens += emitted[: count + 1]
            if turn >= WARM:
                taken[place].append({"whole": whole, **{stage: clock.total_ms.get(stage, 0.0) for stage in STAGES}})
    return [median_of(each) for each in taken]


def median_of(taken: Sequence[dict[str, float]]) -> StepTime:
    wholes = tuple(each["whole"] for each in taken)
    stages = {stage: statistics.median(each[stage] for each in taken) for stage in STAGES}
    return StepTime(statistics.median(wholes), wholes, stages)


def started(method: Method, rows: int, context: int, clock: Stopwatch) -> Batch:
    batch = Batch(replace(method, drafter=network_of(method.drafter)), clock)  # made-up text may run in circles
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(method.target.vocab_size, (rows, context), generator=generator).tolist()
    made = [Row(place, prompt, method.target.context) for place, prompt in enumerate(prompts)]
    for row, token in zip(made, batch.admit(made), strict=True):
        row.tokens.append(token)
    return batch


def fitting(target: Target, context: int, nodes: int, rounds: int = ROUNDS) -> int:
    """`context`, or as much of it as leaves room for the steps of a measurement."""
    return max(1, min(context, target.context - (rounds + WARM) * (nodes + 1) - 1))
