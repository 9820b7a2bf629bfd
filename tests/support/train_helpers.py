"""Text that tiny targets wrote, as distilled rows, and drafters that learn it in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset, DistilledRow, row_key
from ctc_drafter.train.settings import TrainSettings
from helpers import tiny_drafter, tiny_target

QUIET = {"progress": False, "learning_rate": 3e-3, "warmup_steps": 2, "batch_size": 2, "anchors": 8}


def settings(**overrides: Any) -> TrainSettings:
    return TrainSettings(**{**QUIET, **overrides})


def written_rows(target: Target, count: int = 6, answer: int = 24, seed: int = 0) -> DistilledDataset:
    """Greedy answers of unequal lengths to random prompts."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(target.vocab_size) for _ in range(rng.randint(2, 9))] for _ in range(count)]
    answers = plain_generate(target, prompts, max_new_tokens=answer, eos=()).tokens
    rows = []
    for index, (prompt, tokens) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor(prompt + tokens[: answer - index], dtype=torch.int32)
        rows.append(DistilledRow(ids, len(prompt), row_key(str(index))))
    return DistilledDataset(rows)


def pair(seed: int = 0) -> tuple[Target, CTCDrafter]:
    target = tiny_target(seed)
    return target, tiny_drafter(target, seed, predictor_rank=8, predictor_width=16)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
