"""What is known of a drafter: its method, its size, what its training took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.registry import method_of
from ctc_drafter.drafters.trainable import TrainableDrafter


def facts(drafter: Drafter, folder: Path | None) -> dict[str, Any]:
    """`method`, `parameters` (what the drafter adds to its target), `draft_length` and `training`.

    `training` has `steps`, `tokens` (text that was read, repeats counted) and `seconds`, from the logs of the folder
    that the drafter was loaded from; None where they do not say.
    """
    found: dict[str, Any] = {"method": method_of(drafter), "parameters": 0, "training": None}
    found["draft_length"] = getattr(drafter, "draft_length", None)
    if isinstance(drafter, TrainableDrafter):
        found["parameters"] = sum(weight.numel() for weight in drafter.parameters())
        found["draft_length"] = max(drafter.config.draft_length, getattr(drafter.config, "lookup_length", 0))
        found["training"] = training(folder) if folder else None
    return found


def training(folder: Path) -> dict[str, float | None] | None:
    """From `train_log.jsonl`, which the trainer wrote; None without it."""
    log = folder / "train_log.jsonl"
    if not log.is_file():
        return None
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        name: max((entry[key] for entry in entries if key in entry), default=None)
        for name, key in (("steps", "step"), ("tokens", "tokens"), ("seconds", "seconds"))
    }
