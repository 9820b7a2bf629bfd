"""Step time benchmarks: plain steps and trees by model, batch, context and vocabulary.

python -m benchmarks.steps measure cpu --json results/steps-cpu-float32.json
python -m benchmarks.steps measure gpu --json results/steps-gpu.json
python -m benchmarks.steps measure growth --json results/steps-growth.json
python -m benchmarks.steps report docs/performance.md results/steps-*.json
"""

from __future__ import annotations

import resource
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from benchmarks.pages import run, write_figures
from benchmarks.step_tables import markdown_steps
from ctc_drafter.decode.batch import DecodingConfig, Method
from ctc_drafter.decode.profile import ROUNDS, WARM, StepTime, fitting, plain_method, time_steps
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import blank_drafter
from ctc_drafter.evaluate.bench import parse_sizes
from ctc_drafter.files import check_place, write_json
from ctc_drafter.load import chosen_device, keep_quiet, load_drafter, load_target
from ctc_drafter.provenance import environment
from ctc_drafter.steps import Steps
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

# Step times by model, tree, batch, context and vocabulary.
#
# Weights may be random: times do not depend on what is written, as long as all nodes are verified. They cannot say
# how many tokens a step brings, β, so speedups are a line over it.

SHIPPED = "shipped"


ON_CPU = (SHIPPED, "llama-60m", "llama-300m", "llama-1b")
ON_GPU = ("vicuna-7b", "vicuna-13b", "vicuna-33b", "llama-3.1-8b")
CONTEXTS, BATCHES, VOCABULARIES = (512, 2048, 8192, 16384), (1, 4, 16, 32), (8000, 32000, 128256)


def cpu_suite(models: Sequence[str], dtype: str, context: int) -> list[Cell]:
    """Cells of the CPU suite: one row, every model."""
    return [Cell(model, dtype, context=context) for model in models]


def gpu_suite(models: Sequence[str], dtype: str, context: int) -> list[Cell]:
    """Every model with one row; then batches at one context, and contexts with one row."""
    cells = [Cell(model, dtype, context=context) for model in models]
    wider = [replace(cell, rows=rows) for cell in cells for rows in BATCHES[1:]]
    longer = [replace(cell, context=each) for cell in cells for each in CONTEXTS if each != context]
    return sorted([*cells, *wider, *longer], key=lambda cell: models.index(cell.model))


def growth_suite(models: Sequence[str], dtype: str, context: int) -> list[Cell]:
    """Context, batch and vocabulary by themselves."""
    cells = [Cell(model, dtype, context=context, nodes=(8,)) for model in models]
    grown = [[replace(cell, context=context * times) for times in (2, 4, 8)] for cell in cells]
    grown += [[replace(cell, rows=rows) for rows in (2, 4, 8)] for cell in cells]
    grown += [[replace(cell, vocab=vocab) for vocab in VOCABULARIES] for cell in cells if cell.model != SHIPPED]
    every = [*cells, *(cell for each in grown for cell in each)]
    return sorted(every, key=lambda cell: (models.index(cell.model), cell.vocab or 0))


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


SUITES = {"cpu": cpu_suite, "gpu": gpu_suite, "growth": growth_suite}
USUAL = {"cpu": (ON_CPU, "float32", 256), "gpu": (ON_GPU, "bfloat16", 512), "growth": (("llama-60m",), "float32", 256)}

app = typer.Typer(add_completion=False, help=__doc__)


READ_ROUNDS = 5


@app.command()
def measure(
    suite: Annotated[str, typer.Argument(help="Suite: cpu, gpu or growth.")],
    out: Annotated[Path, typer.Option("--json", help="JSON file for the results.")],
    models: Annotated[str | None, typer.Option("--models", help="Comma-separated models: shipped or shapes.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Floating-point type: float32, bfloat16 or float16.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Context length of the default cell in tokens.")
    ] = None,
    nodes: Annotated[str | None, typer.Option("--nodes", help="Comma-separated tree sizes.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measured steps of each kind.")] = ROUNDS,
    device: Annotated[str, typer.Option("--device", help="Device: auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Number of CPU threads.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the targets' steps first.")] = False,
) -> None:
    """Measures a suite; the file is written again after every cell."""
    if suite not in SUITES:
        raise UserError(f"there is no suite {suite}; give some of {','.join(SUITES)}")
    check_place(out)
    keep_quiet()
    if threads:
        torch.set_num_threads(threads)
    usual_models, usual_dtype, usual_context = USUAL[suite]
    chosen = tuple(models.split(",")) if models else usual_models
    cells = SUITES[suite](chosen, dtype or usual_dtype, context or usual_context)
    if nodes:
        sizes = tuple(size for size in parse_sizes(nodes) if isinstance(size, int))
        if not sizes:
            raise UserError("a chain costs what a tree of its length does; give --nodes numbers")
        cells = [replace(cell, nodes=sizes) for cell in cells]
    place = chosen_device(device)
    result: dict[str, Any] = {"meta": meta(suite, place, compiled, rounds), "cells": []}
    for found in measured(cells, place, compiled, rounds):
        result["cells"].append(found)
        write_json(out, result)
    print(markdown_steps([result]))


def meta(suite: str, device: str, compiled: bool, rounds: int) -> dict[str, Any]:
    command = shlex.join(["python", "-m", "benchmarks.steps", *sys.argv[1:]])
    about = {"suite": suite, "device": device, "compiled": compiled, "rounds": rounds, "command": command}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**environment(), **about, "threads": torch.get_num_threads(), "date": date}


@app.command()
def report(page: Path, files: Annotated[list[Path] | None, typer.Argument()] = None) -> None:
    """Writes results into a page, between its markers."""
    write_figures(page, files or [], markdown_steps)


def main() -> None:
    run(app)


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
        target, tokenizer = load_target("tiny", cell.dtype, device)
        drafter = load_drafter("tiny", target, tokenizer)
    else:
        shape = named_shape(cell.model)
        shape = shape.with_vocab(cell.vocab) if cell.vocab else shape
        room = cell.context + (rounds + WARM) * (max(cell.nodes) + 1) + 1
        target = random_target(shape, room, getattr(torch, cell.dtype), device)
        drafter = random_drafter(target)
    if compiled:
        target = Steps(compiled=True).of(target, [drafter], max(cell.nodes), cell.rows)
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
    trees = [Method(target, pair.drafter, DecodingConfig(size, 0.0)) for size in sizes]
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


# Llamas of known sizes with random weights, and an untrained drafter for each, for timing only.


@dataclass(frozen=True)
class LlamaShape:
    """vocab, hidden, layers, inner (of the MLP), heads, kv_heads. tied: the LM head is the embedding."""

    vocab: int
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    tied: bool = False

    def with_vocab(self, vocab: int) -> LlamaShape:
        return replace(self, vocab=vocab)

    def config(self, context: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=context,
            tie_word_embeddings=self.tied,
        )


# The large ones are those of the models' own configurations.
SHAPES = {
    "tiny": LlamaShape(512, 64, 2, 128, 4, 2),  # for trying the benchmark itself
    "llama-60m": LlamaShape(32000, 512, 8, 1408, 8, 4),
    "llama-300m": LlamaShape(32000, 1024, 20, 2816, 16, 8),
    "llama-1b": LlamaShape(32000, 2048, 20, 5632, 32, 8),
    "vicuna-7b": LlamaShape(32000, 4096, 32, 11008, 32, 32),
    "vicuna-13b": LlamaShape(32000, 5120, 40, 13824, 40, 40),
    "vicuna-33b": LlamaShape(32000, 6656, 60, 17920, 52, 52),
    "llama-3.1-8b": LlamaShape(128256, 4096, 32, 14336, 32, 8),
}


def named_shape(name: str) -> LlamaShape:
    """Raises `UserError` for a name that is none."""
    if name not in SHAPES:
        raise UserError(f"there is no shape {name}; give some of {','.join(SHAPES)}")
    return SHAPES[name]


def random_target(shape: LlamaShape, context: int, dtype: torch.dtype, device: str) -> Target:
    """Made on the device, so that no second copy of a large one is needed."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(context), dtype=dtype).eval()
    columns_first(model)
    return Target.wrap(model)


def random_drafter(target: Target) -> CTCDrafter:
    """Of the sizes that a fresh one has: `ctc-drafter train` without options."""
    with torch.device(target.device):
        drafter = blank_drafter("ctc")(target.config)
    assert isinstance(drafter, CTCDrafter)
    made: CTCDrafter = drafter.to(target.dtype).eval()
    columns_first(made)
    return made


# Roofline of a plain step: bytes to read over memory bandwidth.

SAMPLE = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes: more than caches hold


def step_bytes(target: Target, rows: int, context: int) -> int:
    """Bytes that a plain step reads: weights, of the embedding only the rows' tokens, and cached keys and values."""
    config, model = target.config, target.model
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    embedding = cast(torch.Tensor, target.embed.weight)
    if embedding is not target.head.weight:
        weights[id(embedding)] = rows * embedding.shape[1] * embedding.element_size()
    return sum(weights.values()) + rows * context * cached_bytes(config, target.dtype)


def cached_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    if getattr(config, "is_heterogeneous", False):
        return sum(2 * layer_width(layer) * dtype.itemsize for layer in config.per_layer_config)
    per_token: int = 2 * config.num_hidden_layers * layer_width(config) * dtype.itemsize
    return per_token


def layer_width(config: PreTrainedConfig) -> int:
    """Numbers of a token's keys in one layer."""
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size(config)


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second: the median of a few sums over more memory than the caches hold."""
    sample = torch.ones(SAMPLE.get(device.type, SAMPLE["cpu"]) // 4, device=device)
    taken = []
    for _ in range(READ_ROUNDS):
        wait_for(device)
        begin = time.perf_counter()
        sample.sum()
        wait_for(device)
        taken.append(time.perf_counter() - begin)
    return sample.numel() * 4 / statistics.median(taken)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
