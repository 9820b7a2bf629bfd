"""What modules with a command line of their own share (`python -m ctc_drafter.evaluate.NAME`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from ctc_drafter.evaluate.report import insert_figures
from ctc_drafter.types import UserError


def write_figures(
    page: Path, files: Iterable[Path], markdown: Callable[[list[dict[str, Any]]], str], name: str = "results"
) -> None:
    """Writes what `markdown` makes of results files into a page, between the markers of that name."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(files)]
    page.write_text(insert_figures(page.read_text(encoding="utf-8"), markdown(results), name), encoding="utf-8")


def run(app: typer.Typer) -> None:
    """The application; bad input ends it with one line."""
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
