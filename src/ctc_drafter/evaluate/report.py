"""Results for people to read."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def results_table(result: dict[str, Any]) -> Table:
    """One line per row of `evaluate`'s results; what was not measured is a dash. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("task", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "skipped", "tokens/s", "γ", "β", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        figures = [number(row["tokens_per_s"], 1), number(row["gamma"], 2), number(row["beta"], 2)]
        counts = [str(row["tokens"]), str(row["skipped"])]
        table.add_row(row["task"], row["method"], *counts, *figures, f"{row['identical']} of {row['compared']}")
    return table


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
