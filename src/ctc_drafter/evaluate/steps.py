"""The step benchmarks: which cells a suite has, and `docs/performance.md` of what came out.

python -m ctc_drafter.evaluate.steps measure cpu --json results/steps-cpu-float32.json
python -m ctc_drafter.evaluate.steps measure gpu --json results/steps-gpu.json
python -m ctc_drafter.evaluate.steps measure growth --json results/steps-growth.json
python -m ctc_drafter.evaluate.steps report docs/performance.md results/steps-*.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ctc_drafter.decode.profile import ROUNDS
from ctc_drafter.evaluate.bench import parse_sizes
from ctc_drafter.evaluate.cells import SHIPPED, Cell, measured
from ctc_drafter.evaluate.command import run, write_figures
from ctc_drafter.evaluate.performance import markdown_steps
from ctc_drafter.files import check_place, write_json
from ctc_drafter.load import chosen_device, keep_quiet
from ctc_drafter.provenance import environment
from ctc_drafter.types import UserError

ON_CPU = (SHIPPED, "llama-60m", "llama-300m", "llama-1b")
ON_GPU = ("vicuna-7b", "vicuna-13b", "vicuna-33b", "llama-3.1-8b")
CONTEXTS, BATCHES, VOCABULARIES = (512, 2048, 8192, 16384), (1, 4, 16, 32), (8000, 32000, 128256)


def cpu_suite(models: Sequence[str], dtype: str, context: int) -> list[Cell]:
    """One row, every model."""
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


SUITES = {"cpu": cpu_suite, "gpu": gpu_suite, "growth": growth_suite}
USUAL = {"cpu": (ON_CPU, "float32", 256), "gpu": (ON_GPU, "bfloat16", 512), "growth": (("llama-60m",), "float32", 256)}

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(
    suite: Annotated[str, typer.Argument(help="cpu, gpu or growth.")],
    out: Annotated[Path, typer.Option("--json", help="Where the results go.")],
    models: Annotated[str | None, typer.Option("--models", help="shipped or shapes, with commas between.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Cached tokens of the usual cell.")] = None,
    nodes: Annotated[str | None, typer.Option("--nodes", help="Tree sizes, with commas between.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Steps of each kind that count.")] = ROUNDS,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
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
    command = shlex.join(["python", "-m", "ctc_drafter.evaluate.steps", *sys.argv[1:]])
    about = {"suite": suite, "device": device, "compiled": compiled, "rounds": rounds, "command": command}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**environment(), **about, "threads": torch.get_num_threads(), "date": date}


@app.command()
def report(page: Path, files: Annotated[list[Path] | None, typer.Argument()] = None) -> None:
    """Writes results into a page, between its markers."""
    write_figures(page, files or [], markdown_steps)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
