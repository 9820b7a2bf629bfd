"""Step times of this machine, measured once and cached, for the tree size budget."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter
from rich import box
from rich.table import Table
from torch import nn

from ctc_drafter.decode.batch import Batch, DecodingConfig, Method
from ctc_drafter.decode.budget import Budget, StepTimes
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.drafters.base import Drafter, NoDrafter
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.files import cache_folder, whole_or_nothing
from ctc_drafter.provenance import environment, source_hash
from ctc_drafter.target.model import Target

# Step times of this machine, measured once for each target, drafter and setting, and cached on disk.

LOG = logging.getLogger(__name__)
BATCHES = (1, 4, 16)
CONTEXTS = (128, 768)
FILE = TypeAdapter(StepTimes)


def budget_for(target: Target, drafter: Drafter, nodes: int, rows: int) -> Budget:
    """The budget of this machine for up to `nodes` nodes and `rows` rows; see `step_times`."""
    return Budget(step_times(target, drafter, nodes, rows), nodes)


def step_times(target: Target, drafter: Drafter, nodes: int, rows: int) -> StepTimes:
    """Times of steps with up to `nodes` nodes and `rows` rows: those on disk, or measured now and written there."""
    try:
        return FILE.validate_json(place_of(target, drafter, *grid(target, nodes, rows)).read_bytes())
    except (OSError, ValueError):  # none yet, or one that was cut off
        return measured_again(target, drafter, nodes, rows)


def measured_again(target: Target, drafter: Drafter, nodes: int, rows: int) -> StepTimes:
    """`step_times`, whatever is on disk."""
    sizes, batches = grid(target, nodes, rows)
    LOG.info("measuring step times, once for this target, drafter and machine ...")
    times, place = measure(target, drafter, batches=batches, sizes=sizes), place_of(target, drafter, sizes, batches)
    with contextlib.suppress(OSError):  # a machine that lets nothing be written measures every time
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(place) as temporary:
            temporary.write_bytes(FILE.dump_json(times))
    return times


def grid(target: Target, nodes: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tree sizes and numbers of rows that are measured."""
    return (*(size for size in target.profile_sizes if size < nodes), nodes), (
        *(size for size in BATCHES if size < rows),
        rows,
    )


def place_of(target: Target, drafter: Drafter, sizes: Sequence[int], batches: Sequence[int]) -> Path:
    return cache_folder() / f"steps-{key(target, drafter, batches, sizes)}.json"


def profile_json(times: StepTimes, target: Target, meta: dict[str, Any]) -> dict[str, Any]:
    """A results file: where, how and what."""
    dtype = str(target.dtype).removeprefix("torch.")
    facts = {"dtype": dtype, "threads": torch.get_num_threads(), "compiled": target.compiled, "engine": target.engine}
    return {"meta": environment() | facts | meta, "times": FILE.dump_python(times)}


def profile_table(times: StepTimes) -> Table:
    """Milliseconds by rows and context: a plain step, then steps by nodes, in plain steps as well."""
    table = Table(box=box.SIMPLE_HEAD)
    columns = ["rows", "context", "plain ms", "draft ms", *(f"{size} nodes" for size in times.sizes)]
    for name in columns:
        table.add_column(name, justify="right")
    for b, rows in enumerate(times.batches):
        for c, context in enumerate(times.contexts):
            plain = times.plain[b][c]
            steps = (f"{ms:.2f} ({ms / plain:.2f}x)" for ms in times.whole[b][c])
            table.add_row(str(rows), str(context), f"{plain:.2f}", f"{times.draft[b][c]:.2f}", *steps)
    return table


def key(target: Target, drafter: Drafter, batches: Sequence[int], sizes: Sequence[int]) -> str:
    """Cache key: a hash of everything known that step times depend on."""
    config = drafter.config.to_json_string() if hasattr(drafter, "config") else ""
    kinds = sorted({str(p.dtype) for p in drafter.parameters()}) if isinstance(drafter, nn.Module) else []
    known = [
        *(target.model.config.to_json_string(), str(target.dtype), target.cache, target.engine),
        *(type(drafter).__name__, config),
        *(str(environment()["hardware"]), target.device.type, str(torch.get_num_threads()), *kinds),
        *(source_hash(), torch.__version__, transformers.__version__, str(tuple(batches)), str(tuple(sizes))),
    ]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


@torch.inference_mode()
def measure(
    target: Target,
    drafter: Drafter,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    sizes: Sequence[int] = Target.profile_sizes,
) -> StepTimes:
    """Median times of whole steps on made-up text, all sizes in turn: a change of the machine hits them alike."""
    contexts = sorted({fitting(target, context, max(sizes)) for context in contexts})
    cells = [[measure_cell(target, drafter, rows, context, sizes) for context in contexts] for rows in batches]
    return StepTimes(
        tuple(batches),
        tuple(contexts),
        tuple(sizes),
        plain=tuple(tuple(cell[0] for cell in line) for line in cells),
        draft=tuple(tuple(cell[1] for cell in line) for line in cells),
        whole=tuple(tuple(cell[2] for cell in line) for line in cells),
    )


def measure_cell(
    target: Target, drafter: Drafter, rows: int, context: int, sizes: Sequence[int]
) -> tuple[float, float, tuple[float, ...]]:
    """ms of a plain step, of its drafting part, and of whole steps by size."""
    drafted = [Method(target, drafter, DecodingConfig(size, 0.0)) for size in sizes]
    plain, *found = time_steps([plain_method(target), *drafted], rows, context)
    return plain.ms, statistics.median(each.stages["draft"] for each in found), tuple(each.ms for each in found)


# Times of decoding steps, stage by stage: all ways in turn, several rounds, medians.

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
    return Method(target, NoDrafter(), DecodingConfig(1, 0.0))


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
    made = [SequenceState(place, prompt, method.target.context) for place, prompt in enumerate(prompts)]
    for row, token in zip(made, batch.admit(made), strict=True):
        row.tokens.append(token)
    return batch


def fitting(target: Target, context: int, nodes: int, rounds: int = ROUNDS) -> int:
    """`context`, or as much of it as leaves room for the steps of a measurement."""
    return max(1, min(context, target.context - (rounds + WARM) * (nodes + 1) - 1))
