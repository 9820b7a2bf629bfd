"""Files: atomic writes, locks, JSON in and out, disk errors, the cache folder, Markdown tables."""

from __future__ import annotations

import gzip
import json
import logging
import os
import platform
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ctc_drafter.types import UserError, first_line

LOG = logging.getLogger(__name__)
# In errors of torch and safetensors that are no OSError.
OF_A_DISK = ("No space left", "I/O error", "file write failed", "failed writing file", "unexpected pos", "os error")
SPACED = " --- "  # cells below the head of a Markdown table
CACHE = "CTC_DRAFTER_CACHE"  # environment variable: another folder than the user's cache


def cache_folder() -> Path:
    """The folder of what can be made again: `CTC_DRAFTER_CACHE`, else `ctc-drafter` in the user's cache folder."""
    return Path(os.environ.get(CACHE) or platformdirs.user_cache_dir("ctc-drafter", appauthor=False))


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary file of this process in the same folder to write to; it is on disk before it gets its name.

    Links are followed. What is no regular file (a device, a pipe, /dev/stdout) is written to as it is, not replaced.
    """
    if path.is_symlink():
        path = path.resolve()
    if (path.exists() and not path.is_file()) or path.is_relative_to("/dev") or path.is_relative_to("/proc"):
        yield path
        return
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes temporary files of `whole_or_nothing` whose process has ended, for names that fit the pattern."""
    for file in {*folder.glob(f".{pattern}.tmp"), *folder.glob(f".{pattern}.*-*-*.tmp")}:
        found = re.fullmatch(r".*\.(?P<node>.*)-(?P<process>\d+)-\d+\.tmp", file.name)
        if found is None or (found["node"] == platform.node() and not psutil.pid_exists(int(found["process"]))):
            file.unlink(missing_ok=True)


@contextmanager
def made_once(place: Path, doing: str) -> Iterator[None]:
    """While open, other processes and threads that would make what is to stand at `place` wait; the log says that
    another one is `doing` it. Makes the folder above.

    The lock ends with its process: one that was killed keeps nobody waiting. Raises `OSError` where it cannot be
    written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        LOG.info("waiting for another process that is %s", doing)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file atomically: all lines or none."""
    with whole_or_nothing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into one line that says how to go on, whatever library met it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(word in str(error) for word in OF_A_DISK):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write to {out}: {reason}; finished parts are kept: make room there, "
            "then run the same command again to go on"
        ) from error


def check_place(path: Path | None) -> None:
    """Raises `UserError` before the work, not after it, when results cannot be written there."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"cannot write {path}; give a file in a folder that exists")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, if they are not there. Raises `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder}: {error.strerror}; give a place that can be written"
        ) from error


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


LONGEST_ROW = 16 << 20  # bytes of a line: what is longer is no row


def bounded_lines(file: Path) -> Iterator[bytes | None]:
    """Lines of a file, of a packed one if it ends in .gz, one at a time; None for one longer than `LONGEST_ROW`.

    A few megabytes of archive may hold gigabytes, and a file without line breaks is one line. Raises `OSError`,
    `EOFError` and `zlib.error` for damaged archives.
    """
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as lines:
        while line := lines.readline(LONGEST_ROW):
            if len(line) < LONGEST_ROW or line.endswith(b"\n"):
                yield line
                continue
            while (rest := lines.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield None


def read_json(file: Path) -> Any:
    """Raises `UserError` for files that are missing or hold something else."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give results files") from error
    except (ValueError, RecursionError) as error:
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
