"""Results for people to read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ctc_drafter.evaluate.contenders import BUDGET
from ctc_drafter.types import UserError

END = "<!-- end of figures -->"


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
            kind = meta["dtype"] + (", compiled" if meta.get("compiled") else "")
            cells = [row["task"], kind, str(meta["threads"]), str(meta["batch_size"]), method]
            cells += [number(row["tokens_per_s"], 0), number(row["gamma"], 2), number(row["beta"], 2)]
            lines.append(f"| {' | '.join(cells)} | {row['identical']} of {row['compared']} |")
    places = {
        f"{m['hardware']['gpu'] or m['hardware']['cpu']}, torch {m['versions']['torch']}, "
        f"transformers {m['versions']['transformers']}, trees of {m['nodes']} nodes, "
        f"at most {m['max_new_tokens']} new tokens"
        for m in (result["meta"] for result in results)
    }
    return "\n".join([*lines, "", *(f"Measured on: {place}." for place in sorted(places))])


def insert_figures(page: str, figures: str, name: str = "results") -> str:
    """`page` with the part between the two markers of that name replaced. Raises `UserError` when they are missing."""
    marker = f"<!-- figures: {name} -->"
    before, start, rest = page.partition(marker)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"the page has no {marker} and {END} to put figures between")
    return f"{before}{start}\n{figures}\n{end}{after}"


def main(page: Path, files: Sequence[Path]) -> None:
    """Writes the figures of results files into a page: `python -m ctc_drafter.evaluate.report PAGE FILE...`."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    page.write_text(insert_figures(page.read_text(encoding="utf-8"), markdown_figures(results)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
