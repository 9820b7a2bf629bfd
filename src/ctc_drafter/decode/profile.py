"""Step times of this machine, measured once and cached, for the tree size budget."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from pydantic import TypeAdapter
from rich import box
from rich.table import Table
from torch import nn

from ctc_drafter.decode.batch import AUTO, DEFAULT_NODES, Batch, DecodingConfig, Method
from ctc_drafter.decode.budget import Budget, StepTimes
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.drafters.base import Drafter, NoDrafter
from ctc_drafter.drafters.trainable import TrainableDrafter, network_of
from ctc_drafter.files import cache_folder, whole_or_nothing
from ctc_drafter.provenance import environment, source_hash
from ctc_drafter.target.model import Target
from ctc_drafter.target.packed import PackedLinear
from ctc_drafter.types import Acceptance, Candidates, TokenTree, first_line

# Step times of this machine, measured once for each target, drafter and setting, and cached on disk.

LOG = logging.getLogger(__name__)
SECONDS = 6.0  # that a first use waits for, about
MOST_ROWS = 64  # that are measured unasked; larger batches go by their times
LARGEST = 1024  # rows whose times are looked for
BATCHES = (1, 4, 16)
CONTEXTS = (64, 768)
REACH = {"cpu": 16}  # nodes of a tree at most, by the kind of device: on a CPU each one is felt
REACH_ELSEWHERE = 64
FILE = TypeAdapter(StepTimes)


def settled(method: Method, rows: int) -> Method:
    """The method with the budget that `nodes="auto"` stands for, for up to `rows` rows at a time.

    Where step times cannot be measured, trees have a fixed size, and the log says so once.
    """
    config = method.config
    if config.nodes != AUTO or config.budget is not None:
        return method
    budget = automatic(method.target, method.drafter, rows)
    return method if budget is None else replace(method, config=replace(config, budget=budget))


def automatic(target: Target, drafter: Drafter, rows: int) -> Budget | None:
    """The budget of this machine for up to `rows` rows; its step times are measured within about `SECONDS`, or a dozen
    steps where those take longer, and kept on disk and in this process. None where they cannot be."""
    if isinstance(drafter, NoDrafter):
        return None
    nodes, known = reach(target), ""
    with MEASURING:
        try:
            known = key(target, drafter, [rounded(rows)], [nodes])
            if known not in BUDGETS:
                BUDGETS[known] = budget_for(target, drafter, nodes, rows)
        except Exception as error:  # whatever it is, decoding needs no step times
            if known not in BUDGETS:
                why = first_line(error)
                LOG.warning("step times cannot be measured (%s); trees have up to %d nodes", why, DEFAULT_NODES)
            BUDGETS[known] = None
        return BUDGETS[known]


BUDGETS: dict[str, Budget | None] = {}  # of this process
MEASURING = threading.Lock()


def reach(target: Target) -> int:
    """Nodes of a tree at most, where a budget chooses."""
    return REACH.get(target.device.type, REACH_ELSEWHERE)


def budget_for(target: Target, drafter: Drafter, nodes: int, rows: int) -> Budget:
    """The budget of this machine for up to `nodes` nodes and `rows` rows; see `step_times`."""
    return Budget(step_times(target, drafter, nodes, rows), nodes)


def step_times(target: Target, drafter: Drafter, nodes: int, rows: int) -> StepTimes:
    """Times of steps with up to `nodes` nodes and `rows` rows: those on disk, for more rows perhaps, or measured now
    within about `SECONDS` and written there."""
    enough = [1 << power for power in range(LARGEST.bit_length()) if 1 << power >= rows]
    for each in (*enough, MOST_ROWS) if rows > MOST_ROWS else enough:
        with contextlib.suppress(OSError, ValueError):  # none yet, or one that was cut off
            return FILE.validate_json(place_of(target, drafter, *grid(target, nodes, each)).read_bytes())
    return measured_again(target, drafter, nodes, min(rows, MOST_ROWS), SECONDS)


def measured_again(target: Target, drafter: Drafter, nodes: int, rows: int, seconds: float | None = None) -> StepTimes:
    """`step_times`, whatever is on disk; without `seconds` as long as it takes."""
    sizes, batches = grid(target, nodes, rows)
    LOG.info("measuring step times, once for this target, drafter and machine ...")
    times = measure(target, drafter, batches=batches, sizes=sizes, seconds=seconds)
    with contextlib.suppress(OSError, RuntimeError):  # a machine that lets nothing be written measures every time
        place = place_of(target, drafter, sizes, batches)
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(place) as temporary:
            temporary.write_bytes(FILE.dump_json(times))
    return times


def grid(target: Target, nodes: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tree sizes and numbers of rows that are measured."""
    most = rounded(rows)
    return (*(size for size in target.profile_sizes if size < nodes), nodes), (
        *(size for size in BATCHES if size < most),
        most,
    )


def rounded(rows: int) -> int:
    """The next power of two: few numbers of rows are measured, whatever is asked for."""
    return 1 << max(0, rows - 1).bit_length()


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
    known = [
        *(facts(target.model), str(target.dtype), target.cache, target.engine),
        *drafter_facts(drafter),
        *(machine(), target.device.type, str(torch.get_num_threads())),
        *(torch.__version__, transformers.__version__, str(tuple(batches)), str(tuple(sizes))),
    ]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


FACTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # they take milliseconds, and are asked for at each call


def facts(model: nn.Module) -> str:
    """Sizes and kinds of layers: packed, quantised, with adapters."""
    if model not in FACTS:
        config: Any = getattr(model, "config", None)
        sizes = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)
        kinds = {type(layer).__name__ for layer in model.modules()}
        if isinstance(model, TrainableDrafter):  # which packs its layers itself, when it begins to draft
            kinds = kinds - {PackedLinear.__name__} | {nn.Linear.__name__}
        FACTS[model] = "\n".join([sizes, *sorted(kinds)])
    return FACTS[model]


def drafter_facts(drafter: Drafter) -> list[str]:
    """The same of a drafter and of those inside, with its dtypes."""
    found = [type(drafter).__name__]
    if isinstance(drafter, nn.Module):
        found += [facts(drafter), *sorted({str(weight.dtype) for weight in drafter.parameters()})]
    inner = getattr(drafter, "__dict__", {}).get("inner")
    return found if inner is None else [*found, *drafter_facts(inner)]


@lru_cache(maxsize=1)
def machine() -> str:
    """This machine and this code."""
    return f"{environment()['hardware']}\n{source_hash()}"


@dataclass(frozen=True)
class Cell:
    """Milliseconds of a plain step, of drafting, and of whole steps by size; seconds until the first of them."""

    plain: float
    draft: float
    whole: tuple[float, ...]
    start: float

    @property
    def round(self) -> float:
        """Seconds of one step of each size."""
        return (self.plain + sum(self.whole)) / 1e3


@torch.inference_mode()
def measure(
    target: Target,
    drafter: Drafter,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    sizes: Sequence[int] = Target.profile_sizes,
    seconds: float | None = None,
) -> StepTimes:
    """Median times of whole steps on made-up text, all sizes in turn: a change of the machine hits them alike.

    With `seconds`, what matters most comes first, and what there is no time left for is left out: short texts before
    long ones, the largest batch before the others, since smaller ones bear larger trees. What fails is left out, too;
    raises where nothing can be measured.
    """
    contexts = sorted({fitting(target, context, growth(sizes) - 1, 1) for context in contexts})
    plan = [(rows, context) for context in contexts for rows in urgent_first(batches)]
    end = math.inf if seconds is None else time.perf_counter() + seconds
    cells: dict[tuple[int, int], Cell] = {}
    for number, (rows, context) in enumerate(plan):
        now = time.perf_counter()
        if cells and now + foreseen(cells, rows, context) > end:
            continue
        try:
            until = now + (end - now) / (len(plan) - number)
            cells[rows, context] = measure_cell(target, drafter, rows, context, sizes, until)
        except Exception as error:
            if seconds is None or (not cells and number == len(plan) - 1):
                raise
            LOG.debug("no step times of %d rows at %d tokens: %s", rows, context, first_line(error))
    batches, contexts = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    table = [[nearest(cells, rows, context) for context in contexts] for rows in batches]
    return StepTimes(
        tuple(batches),
        tuple(contexts),
        tuple(sizes),
        plain=tuple(tuple(cell.plain for cell in line) for line in table),
        draft=tuple(tuple(cell.draft for cell in line) for line in table),
        whole=tuple(tuple(cell.whole for cell in line) for line in table),
    )


def urgent_first(batches: Sequence[int]) -> list[int]:
    """The largest, the smallest, and what is between."""
    return list(dict.fromkeys([max(batches), min(batches), *sorted(batches)]))


def foreseen(cells: dict[tuple[int, int], Cell], rows: int, context: int) -> float:
    """Seconds of another cell at the least, by the slowest there is: its prompts, and two rounds."""
    a_token = max(cell.start / (rows * context) for (rows, context), cell in cells.items())
    return a_token * rows * context + 2 * max(cell.round for cell in cells.values())


def nearest(cells: dict[tuple[int, int], Cell], rows: int, context: int) -> Cell:
    """That of these rows whose texts are most alike in length."""
    return cells[min((place for place in cells if place[0] == rows), key=lambda place: abs(place[1] - context))]


def growth(sizes: Sequence[int]) -> int:
    """Nodes and roots of a plain step and one of each size: tokens that a round adds to a text at most."""
    return sum(sizes) + len(sizes) + 1


class Rehearsal:
    """Steps of the size that is told, in place of a `Pace`: what each costs where a budget chooses it. See `Trees`."""

    def __init__(self, nodes: int):
        self.nodes, self.told, self.asked = nodes, 0, False

    def drafts(self, rows: int) -> bool:
        return self.told > 0

    def min_probability(self, rows: int, context: int) -> float:
        return 0.0

    def size(self, candidates: Candidates, context: int) -> int:
        self.asked = True
        return self.told

    def note(self, context: int, tree: TokenTree, acceptance: Acceptance) -> None:
        return


def measure_cell(
    target: Target, drafter: Drafter, rows: int, context: int, sizes: Sequence[int], until: float = math.inf
) -> Cell:
    """Times of steps with drafts that are asked for the largest size, as a budget asks for it.

    After `until`, of `time.perf_counter`, no round is begun but for the second, which then counts.
    """
    begin, trees, clock = time.perf_counter(), Rehearsal(max(sizes)), Stopwatch(target.device, timed=True)
    batch = started(Method(target, drafter, DecodingConfig(max(sizes), 0.0)), rows, context, clock)
    batch.trees, start = trees, time.perf_counter() - begin
    taken: dict[int, list[dict[str, float]]] = {size: [] for size in (0, *sizes)}
    over = False
    for turn in range(WARM + ROUNDS):
        for trees.told, figures in taken.items():
            trees.asked = False
            found = timed_step(batch, clock)
            if not trees.asked:  # a step of the target's own, see `RowCache.resting`
                found = timed_step(batch, clock)
            if turn >= WARM or over:
                figures.append(found)
        longest = max(len(row.read) for row in batch.rows)
        over = time.perf_counter() > until or longest + growth(sizes) > target.context
        if over and taken[0]:
            break
    plain, *drafted = map(median_of, taken.values())
    draft = statistics.median(each.stages["draft"] for each in drafted)
    return Cell(plain.ms, draft, tuple(each.ms for each in drafted), start)


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
            figures = timed_step(batch, clock)
            if turn >= WARM:
                taken[place].append(figures)
    return [median_of(each) for each in taken]


def timed_step(batch: Batch, clock: Stopwatch) -> dict[str, float]:
    """Milliseconds of a step, whole and by stage; its rows take what it emits."""
    clock.total_ms.clear()
    begin = time.perf_counter()
    tokens, accepted = batch.step().emitted()
    whole = (time.perf_counter() - begin) * 1e3
    for row, emitted, count in zip(batch.rows, tokens, accepted, strict=True):
        row.tokens += emitted[: count + 1]
    return {"whole": whole, **{stage: clock.total_ms.get(stage, 0.0) for stage in STAGES}}


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
