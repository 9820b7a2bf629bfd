"""What modules with a command line of their own share (`python -m ctc_drafter.evaluate.NAME`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from ctc_drafter.files import read_json
from ctc_drafter.types import UserError

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


def run(app: typer.Typer) -> None:
    """The application; bad input ends it with one line."""
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
