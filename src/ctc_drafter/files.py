"""Files: atomic writes, JSON in and out, disk errors, the cache folder, Markdown tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from ctc_drafter.types import UserError

SPACED = " --- "  # cells below the head of a Markdown table
CACHE = "CTC_DRAFTER_CACHE"  # environment variable: another folder than the user's cache


def cache_folder() -> Path:
    """The folder of what can be made again: `CTC_DRAFTER_CACHE`, else `ctc-drafter` in the user's cache folder."""
    return Path(os.environ.get(CACHE) or platformdirs.user_cache_dir("ctc-drafter", appauthor=False))


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder to write to; it is on disk before it gets its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file atomically: all lines or none."""
    with whole_or_nothing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write to {out}: {reason}; finished parts are kept: make room there, "
            "then run the same command again to go on"
        ) from error


def check_place(path: Path | None) -> None:
    """Raises `UserError` before the work, not after it, when results cannot be written there."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"cannot write {path}; give a file in a folder that exists")


def write_json(path: Path, value: object) -> None:
    """Writes the whole file or nothing. Raises `UserError` when the place cannot be written."""
    try:
        write_atomic(path, [json_text(value)])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give a place that can be written") from error


def json_text(value: object) -> str:
    """Indented, but a line for each record of a result."""
    if not isinstance(value, dict) or not value.get("records"):
        return json.dumps(value, indent=1)
    lines = ",\n".join("  " + json.dumps(record) for record in value["records"])
    return json.dumps(value | {"records": []}, indent=1).replace('"records": []', f'"records": [\n{lines}\n ]')


def read_json(file: Path) -> Any:
    """Raises `UserError` for files that are missing or hold something else."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give results files") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON; give results files") from error


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]], rule: str = "---") -> str:
    """A Markdown table, without a last line break; pipes in cells are escaped. rule: the cells below the head."""
    heads = list(head)
    lines = [_markdown_row(heads), "|" + "|".join([rule] * len(heads)) + "|", *map(_markdown_row, rows)]
    return "\n".join(lines)


def _markdown_row(cells: Iterable[object]) -> str:
    texts = (str(cell).replace("|", "\\|") for cell in cells)
    return "|" + "|".join(f" {text} " if text else " " for text in texts) + "|"


def number(value: float | None, digits: int = 2) -> str:
    """A figure of a table; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"
