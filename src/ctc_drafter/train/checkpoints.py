"""Checkpoints that are whole or do not count: a checksum of every file, written last."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ctc_drafter.files import write_atomic
from ctc_drafter.types import UserError

logger = logging.getLogger(__name__)
SEAL = "files.json"


def seal(checkpoint: Path) -> None:
    """Marks a checkpoint as whole."""
    files = {file.name: _checksum(file) for file in sorted(checkpoint.iterdir()) if file.name != SEAL}
    write_atomic(checkpoint / SEAL, [json.dumps(files, indent=2)])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, None if there is none yet.

    Newer ones that a killed run left unsealed are removed. Raises `UserError` if the newest sealed one is
    missing files or has changed.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if not (checkpoint / SEAL).is_file():
            logger.warning("%s was cut off while it was written; going on from the one before", checkpoint)
            shutil.rmtree(checkpoint)
            continue
        _verify(checkpoint)
        return checkpoint
    return None


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """`global_step`, `max_steps`, `log_history` and more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def _verify(checkpoint: Path) -> None:
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        damaged = [name for name, checksum in files.items() if _checksum(checkpoint / name) != checksum]
    except (OSError, ValueError, AttributeError):
        damaged = ["a file"]
    if damaged:
        raise UserError(
            f"{checkpoint} is damaged ({damaged[0]} is missing or has changed); "
            "delete this folder to go on from the checkpoint before"
        )


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
