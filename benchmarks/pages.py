"""Inserts tables of results files into Markdown pages; shared command-line helpers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ctc_drafter.cli import bad_input
from ctc_drafter.evaluate.hf_generate import HF, HF_LOOKUP
from ctc_drafter.evaluate.results import BUDGET
from ctc_drafter.files import markdown_table, number, read_json
from ctc_drafter.load import keep_quiet
from ctc_drafter.types import UserError

# Results as Markdown tables.


def markdown_figures(results: Sequence[dict[str, Any]]) -> str:
    """The rows of several results as one Markdown table, and where they were measured."""
    head = ["task", "dtype", "threads", "batch", "method", "tokens/s", "speedup", "tokens/step", "identical"]
    rows = []
    for result in results:
        meta = result["meta"]
        for row in result["rows"]:
            method = row["method"] + (", budget" if row["nodes"] == BUDGET else "")
            compiled = meta.get("compiled") and row["method"] not in (HF, HF_LOOKUP)  # which run as they are
            kind = meta["dtype"] + (", compiled" if compiled else "")
            cells = [row["task"], kind, str(meta["threads"]), str(meta["batch_size"]), method]
            cells += [number(row["tokens_per_s"], 0), number(row["gamma"], 2), number(row["beta"], 2)]
            rows.append([*cells, f"{row['identical']} of {row['compared']}"])
    places = {
        f"{m['hardware']['gpu'] or m['hardware']['cpu']}, torch {m['versions']['torch']}, "
        f"transformers {m['versions']['transformers']}, trees of {m['nodes']} nodes, "
        f"at most {m['max_new_tokens']} new tokens{'' if m['complete'] else ', unfinished run'}"
        for m in (result["meta"] for result in results)
    }
    return "\n".join([markdown_table(head, rows), "", *(f"Measured on: {place}." for place in sorted(places))])


def main(
    page: Annotated[Path, typer.Argument(help="Markdown page with the markers.")],
    files: Annotated[list[Path], typer.Argument(help="Results files of eval.")],
) -> None:
    """Writes the figures of results files into a page."""
    write_figures(page, files, markdown_figures)


# Shared command-line helpers (`python -m benchmarks.NAME`).

END = "<!-- end of figures -->"


def write_figures(
    page: Path, files: Iterable[Path], markdown: Callable[[list[dict[str, Any]]], str], name: str = "results"
) -> None:
    """Writes what `markdown` makes of results files into a page, between the markers of that name.

    Raises `UserError` for files that cannot be read, and for a page without the markers.
    """
    results = [read_result(file) for file in sorted(files)]
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {page}: {error.strerror}; give the page that has the markers") from error
    page.write_text(insert_figures(text, markdown(results), name), encoding="utf-8")


def insert_figures(page: str, figures: str, name: str = "results") -> str:
    """`page` with the part between the two markers of that name replaced. Raises `UserError` when they are missing."""
    marker = f"<!-- figures: {name} -->"
    before, start, rest = page.partition(marker)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"the page has no {marker} and {END} to put figures between")
    return f"{before}{start}\n{figures}\n{end}{after}"


def read_result(file: Path) -> dict[str, Any]:
    """A results file. Raises `UserError` when it is none."""
    found = read_json(file)
    if not isinstance(found, dict) or "meta" not in found:
        raise UserError(f"{file} is no results file: it does not say how it was measured")
    return found


def run(app: Callable[[], None]) -> None:
    """The application of a module, for `python -m`. Bad input and a missing extra end it with one line."""
    try:
        app()
    except Exception as error:
        message = bad_input(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run_alone(work: Callable[..., None]) -> None:
    """As `run`, for a module with one command."""
    keep_quiet()
    run(lambda: typer.run(work))


if __name__ == "__main__":
    run_alone(main)
