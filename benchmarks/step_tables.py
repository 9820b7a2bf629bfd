"""Tables of step times for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctc_drafter.evaluate.report_page import MODELS, TABLE, TIME, table
from ctc_drafter.files import number

BETAS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
PAPER_BETA = TABLE["MT-bench", "CTC-drafter"][1]
# Our stages as the paper groups them: its transform is what makes a tree of the frames.
GROUPS = {"base model": ("verify",), "draft": ("draft",), "transform": ("tree",)}


def markdown_steps(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of each result; says so when there is none."""
    return "\n\n".join(part for result in results for part in parts_of(result)) or "Not measured yet."


def parts_of(result: Mapping[str, Any]) -> Iterator[str]:
    meta, cells = result["meta"], [cell for cell in result["cells"] if "failed" not in cell]
    yield f"### {heading(meta, result['cells'])}"
    yield f"`{meta['command']}`; commit {(meta['commit'] or 'unknown')[:9]}, {place(meta)}."
    yield from (
        f"{cell['model']}, {cell['rows']} rows, context {cell['context']}: {cell['failed']}."
        for cell in result["cells"]
        if "failed" in cell
    )
    if cells:
        yield time_table(cells)
        yield "Where the time of a step goes, in percent of it; in the last line the paper's, on Vicuna 7B:"
        yield stage_table(cells)
        yield gamma_note()
        yield gamma_table(cells)


def heading(meta: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    kinds = ", ".join(sorted({cell["dtype"] for cell in cells}))
    return f"{meta['suite']}, {kinds}{', compiled' if meta['compiled'] else ''}"


def place(meta: Mapping[str, Any]) -> str:
    hardware, versions = meta["hardware"], meta["versions"]
    on_gpu = meta["device"] != "cpu" and hardware["gpu"]
    machine = hardware["gpu"] if on_gpu else f"{hardware['cpu']}, {meta['threads']} threads"
    return f"{machine}, torch {versions['torch']}, transformers {versions['transformers']}, {meta['rounds']} rounds"


def name_of(cell: Mapping[str, Any]) -> list[str]:
    return [cell["model"], str(cell["rows"]), str(cell["context"]), str(cell["vocab"])]


WHICH = ("model", "rows", "context", "vocabulary")


def sizes_of(cells: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({step["nodes"] for cell in cells for step in cell["steps"]} - {0})


def step_at(cell: Mapping[str, Any], nodes: int) -> Mapping[str, Any] | None:
    return next((step for step in cell["steps"] if step["nodes"] == nodes), None)


def time_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of a plain step, and of trees in plain steps."""
    sizes = sizes_of(cells)
    head = [
        *WHICH,
        "million parameters",
        "plain ms",
        *(f"{size} nodes" for size in sizes),
        "roofline",
        "peak GB so far",
    ]
    lines = []
    for cell in cells:
        steps = [step_at(cell, size) for size in sizes]
        ratios = [f"{step['ms']:.2f} ms ({step['ratio']:.2f}x)" if step else "-" for step in steps]
        plain = cell["steps"][0]["ms"]
        tail = [f"{cell['roofline']:.0%}", number(cell["memory_gb"], 1)]
        lines.append([*name_of(cell), f"{cell['parameters'] / 1e6:.0f}", f"{plain:.2f}", *ratios, *tail])
    return table(head, lines)


def shares(step: Mapping[str, Any]) -> list[float]:
    """Of a step's time, by the paper's groups, what is left last."""
    known = [sum(step["stages_ms"].get(stage, 0.0) for stage in stages) / step["ms"] for stages in GROUPS.values()]
    return [*known, max(0.0, 1 - sum(known))]


def stage_table(cells: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [*name_of(cell), str(step["nodes"]), *(f"{share:.1%}" for share in shares(step))]
        for cell in cells
        for step in cell["steps"][1:]
    ]
    papers = [f"{share:.1%}" for share in TIME.values()]
    return table([*WHICH, "nodes", *TIME], [*lines, ["the paper's", "1", "-", "-", "64", *papers]])


def gamma_note() -> str:
    papers = ", ".join(f"{beta} for {model}" for beta, model in zip(PAPER_BETA, MODELS, strict=True))
    return (
        "γ by β, which is β over the ratio: random weights say nothing of β. "
        f"The paper's β on MT-bench is {papers}; the column of its mean is marked."
    )


def gamma_table(cells: Sequence[Mapping[str, Any]]) -> str:
    mean = sum(PAPER_BETA) / len(PAPER_BETA)
    betas = sorted([*BETAS, mean])
    head = [*WHICH, "nodes", *(f"β {beta:.2f} (paper)" if beta == mean else f"β {beta:g}" for beta in betas)]
    lines = [
        [*name_of(cell), str(step["nodes"]), *(f"{beta / step['ratio']:.2f}" for beta in betas)]
        for cell in cells
        for step in cell["steps"][1:]
    ]
    return table(head, lines)
