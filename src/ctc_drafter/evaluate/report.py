"""Results for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ctc_drafter.evaluate.command import write_figures
from ctc_drafter.evaluate.contenders import BUDGET
from ctc_drafter.evaluate.stock import HF, HF_LOOKUP
from ctc_drafter.load import run_alone


def results_table(result: dict[str, Any]) -> Table:
    """One line per row of `evaluate`'s results; what was not measured is a dash. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("task", "method"):
        table.add_column(name, no_wrap=True)
    table.add_column("nodes", justify="right", no_wrap=True)
    for name in ("tokens", "tokens/s", "γ", "β", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        figures = [number(row["tokens_per_s"], 1), number(row["gamma"], 2), number(row["beta"], 2)]
        counts = [str("-" if row.get("nodes") is None else row["nodes"]), str(row["tokens"])]
        table.add_row(row["task"], row["method"], *counts, *figures, f"{row['identical']} of {row['compared']}")
    skipped = {row["task"]: row["skipped"] for row in result["rows"] if row["skipped"]}
    if skipped:
        table.caption = "Left out, too long for the context: " + ", ".join(f"{n} of {t}" for t, n in skipped.items())
    return table


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown_figures(results: Sequence[dict[str, Any]]) -> str:
    """The rows of several results as one Markdown table, and where they were measured."""
    lines = [
        "| task | dtype | threads | batch | method | tokens/s | γ | β | identical |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        meta = result["meta"]
        for row in result["rows"]:
            method = row["method"] + (", budget" if row["nodes"] == BUDGET else "")
            compiled = meta.get("compiled") and row["method"] not in (HF, HF_LOOKUP)  # which run as they are
            kind = meta["dtype"] + (", compiled" if compiled else "")
            cells = [row["task"], kind, str(meta["threads"]), str(meta["batch_size"]), method]
            cells += [number(row["tokens_per_s"], 0), number(row["gamma"], 2), number(row["beta"], 2)]
            lines.append(f"| {' | '.join(cells)} | {row['identical']} of {row['compared']} |")
    places = {
        f"{m['hardware']['gpu'] or m['hardware']['cpu']}, torch {m['versions']['torch']}, "
        f"transformers {m['versions']['transformers']}, trees of {m['nodes']} nodes, "
        f"at most {m['max_new_tokens']} new tokens{'' if m['complete'] else ', unfinished run'}"
        for m in (result["meta"] for result in results)
    }
    return "\n".join([*lines, "", *(f"Measured on: {place}." for place in sorted(places))])


def main(
    page: Annotated[Path, typer.Argument(help="The page with the markers.")],
    files: Annotated[list[Path], typer.Argument(help="Results of eval.")],
) -> None:
    """Writes the figures of results files into a page."""
    write_figures(page, files, markdown_figures)


if __name__ == "__main__":
    run_alone(main)
