"""What steps cost, by model, tree, batch, context and vocabulary.

Weights may be random: times do not depend on what is written, as long as all nodes are verified. They cannot say how
many tokens a step brings, β, so speedups are a line over it.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ctc_drafter.decode.batch import Method
from ctc_drafter.decode.profile import WARM, StepTime, fitting, plain_method, time_steps
from ctc_drafter.decode.sampling import ARGMAX
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.evaluate.roofline import read_bandwidth, step_bytes
from ctc_drafter.evaluate.shapes import named_shape, random_drafter, random_target
from ctc_drafter.load import compiled_for, load_drafter, load_target
from ctc_drafter.target.model import Target

SHIPPED = "shipped"
NODES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Cell:
    """One comparison: plain steps and trees of each size, in turn, on one model and one batch.

    model: `shipped`, or the name of a shape. vocab: in place of the shape's own.
    """

    model: str
    dtype: str
    rows: int = 1
    context: int = 256
    vocab: int | None = None
    nodes: tuple[int, ...] = NODES


@dataclass(frozen=True)
class Pair:
    """A target and its drafter, and how fast their machine read memory before they were there, in bytes per second."""

    target: Target
    drafter: Drafter
    bandwidth: float


def pair_for(cell: Cell, device: str, compiled: bool, rounds: int) -> Pair:
    """Raises `UserError` for an unknown model."""
    bandwidth = read_bandwidth(torch.device(device))
    if cell.model == SHIPPED:
        target, tokenizer = load_target(None, cell.dtype, device)
        drafter = load_drafter(None, target, tokenizer)
    else:
        shape = named_shape(cell.model)
        shape = shape.with_vocab(cell.vocab) if cell.vocab else shape
        room = cell.context + (rounds + WARM) * (max(cell.nodes) + 1) + 1
        target = random_target(shape, room, getattr(torch, cell.dtype), device)
        drafter = random_drafter(target)
    if compiled:
        target = compiled_for(target, drafter, max(cell.nodes), cell.rows)
    return Pair(target, drafter, bandwidth)


def measured(cells: Sequence[Cell], device: str, compiled: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A result of each cell, see `result_of`. Neighbours that differ in batch and context alone share a model."""
    pair, made_for = None, None
    for cell in cells:
        wanted = replace(cell, rows=1, context=0)
        try:
            if pair is None or made_for != wanted:
                pair = None  # frees the last one first
                longest = [each for each in cells if replace(each, rows=1, context=0) == wanted]
                roomy = replace(cell, context=max(c.context for c in longest), rows=max(c.rows for c in longest))
                pair, made_for = pair_for(roomy, device, compiled, rounds), wanted
            yield result_of(cell, pair, rounds)
        except torch.OutOfMemoryError:
            yield asdict(cell) | {"failed": "out of memory"}


def result_of(cell: Cell, pair: Pair, rounds: int) -> dict[str, Any]:
    """The cell, `parameters`, `steps`: plain decoding (`nodes` 0), then each size, with milliseconds, `ratio` to plain,
    and stages; `roofline`: the share of the memory bandwidth that a plain step uses; `memory_gb` at most so far."""
    target, sizes = pair.target, cell.nodes
    context = fitting(target, cell.context, max(sizes), rounds)
    trees = [Method(target, pair.drafter, size, 0.0, ARGMAX) for size in sizes]
    plain, *found = time_steps([plain_method(target), *trees], cell.rows, context, rounds)
    least = step_bytes(target, cell.rows, context) / pair.bandwidth * 1e3
    return asdict(cell) | {
        "context": context,
        "vocab": target.vocab_size,
        "parameters": target.model.num_parameters(),
        "steps": [step_of(size, time, plain) for size, time in zip((0, *sizes), (plain, *found), strict=True)],
        "roofline": least / plain.ms,
        "memory_gb": peak_memory(target.device) / 2**30,
    }


def step_of(nodes: int, time: StepTime, plain: StepTime) -> dict[str, Any]:
    # Ratios of each round's neighbours, not of medians: what slowed one down slowed the other.
    ratios = [a / b for a, b in zip(time.rounds, plain.rounds, strict=True)]
    return {
        "nodes": nodes,
        "ms": time.ms,
        "ms_rounds": list(time.rounds),
        "ratio": statistics.median(ratios),
        "stages_ms": time.stages,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes, of the device or else of this process, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
