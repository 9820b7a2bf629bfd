"""Dataset, batching and validation split of distilled answers."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ctc_drafter.files import bounded_lines
from ctc_drafter.provenance import MANIFEST, different, read_manifest
from ctc_drafter.types import UserError

logger = logging.getLogger(__name__)
MOST_ID = 1 << 31  # of a token
MANY_CUT = 0.9  # of all answers: seldom right


EMPTY_ROW = -1  # index of a row that teaches nothing
STATES = ("features", "last")  # of the target, where they were computed beforehand; see `feature_files`


@dataclass(frozen=True)
class DistilledRow:
    """An answered prompt: ids `int32 [T]`, the index of the answer's first token, a number made of the row's id.

    source: a number made of the corpus's row, which other prompts may share; None if that is not known.
    """

    ids: torch.Tensor
    answer_start: int
    key: int
    source: int | None = None


class DistilledDataset(Dataset[dict[str, Any]]):
    """Answered prompts, as items `{"input_ids": int64 [T], "answer_start": int, "key": int}`.

    `manifest` says what wrote them; None if that is not known.
    """

    def __init__(self, rows: Sequence[DistilledRow], manifest: dict[str, Any] | None = None):
        self.rows, self.manifest = list(rows), manifest

    @classmethod
    def load(cls, folders: Sequence[Path], max_length: int | None = None) -> DistilledDataset:
        """Reads the shards of one or more distillation folders, or of folders that hold some.

        Rows longer than `max_length` lose their end; rows that then have no answer are left out. Raises
        `UserError` for folders without shards, damaged shards and folders that different targets wrote.
        """
        folders = [part for folder in folders for part in parts_of(folder)]
        manifest, rows = _common_manifest(folders), []
        for folder in folders:
            for row in shard_rows(folder):
                ids = torch.tensor((row["prompt_ids"] + row["answer_ids"])[:max_length], dtype=torch.int32)
                if 0 < len(row["prompt_ids"]) < len(ids):
                    source = row_key(row["source"]) if "source" in row else None
                    rows.append(DistilledRow(ids, len(row["prompt_ids"]), row_key(row["id"]), source))
        if not rows:
            raise UserError(f"{', '.join(map(str, folders))}: no answers to train on; run distill first")
        return cls(rows, manifest)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; `EMPTY_ROW` gives one that has no answer."""
        if index == EMPTY_ROW:
            return {"input_ids": torch.zeros(2, dtype=torch.long), "answer_start": 2, "key": 0}
        row = self.rows[index]
        return {"input_ids": row.ids.long(), "answer_start": row.answer_start, "key": row.key}

    def check_vocabulary(self, size: int) -> None:
        """Raises `UserError` if a row holds a token that a vocabulary of this size does not have."""
        largest = max((int(row.ids.max()) for row in self.rows), default=0)
        if largest >= size:
            raise UserError(
                f"the training rows hold token {largest}, the target's vocabulary ends at {size - 1}; "
                "distill again with this target"
            )

    def cut_share(self) -> float:
        """The share of answers that end with none of the tokens which the manifest says end one; 0 if it does not."""
        ends = (self.manifest or {}).get("settings", {}).get("eos", ())
        return sum(int(row.ids[-1]) not in ends for row in self.rows) / len(self.rows) if ends and self.rows else 0.0

    def cut_warning(self) -> str:
        """What is wrong with text whose answers hardly ever come to their end; empty where enough of them do."""
        share = self.cut_share()
        return cut_message(share) if share > MANY_CUT else ""

    def answer_counts(self, vocab_size: int) -> torch.Tensor:
        """Token counts of the answers, `int64 [vocab_size]`. Raises `UserError` for other tokens."""
        self.check_vocabulary(vocab_size)
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for row in self.rows:
            counts += torch.bincount(row.ids[row.answer_start :], minlength=vocab_size)
        return counts

    def split(self, held_out: float) -> tuple[DistilledDataset, DistilledDataset]:
        """Training rows, and about a share `held_out` of all rows.

        A row's side depends on the row of the corpus that it was made of, so that no text is on both; where that is not
        known, on its id.
        """
        parts: tuple[list[DistilledRow], list[DistilledRow]] = ([], [])
        for row in self.rows:
            side = row.key if row.source is None else row.source
            parts[side % 10_000 < held_out * 10_000].append(row)
        return DistilledDataset(parts[0], self.manifest), DistilledDataset(parts[1], self.manifest)


def row_key(row_id: str) -> int:
    """63 bits of a hash of the id."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") >> 1


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids int64 [B, T]`, and `lengths`, `answer_start` and `key`, each `int64 [B]`.

    Rows that bring `STATES` along have them padded too, `[B, T, ...]`.
    """
    ids = [row["input_ids"] for row in rows]
    brought = [name for name in STATES if name in rows[0]]
    states = {name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True) for name in brought}
    return states | {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "lengths": torch.tensor([len(row) for row in ids]),
        "answer_start": torch.tensor([row["answer_start"] for row in rows]),
        "key": torch.tensor([row["key"] for row in rows]),
    }


class LengthSampler(Sampler[int]):
    """A shuffled order whose batches hold rows of like length.

    The order depends on seed and epoch alone, not on global random state: a resumed run sees the same batches.
    Several processes take whole batches in turn; rows of `EMPTY_ROW` at the end give all of them as many.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 32, processes: int = 1):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.padding = -len(lengths) % (batch_size * processes) if processes > 1 else 0
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.padding

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}:{self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        span = self.window * self.batch_size
        windows = (sorted(order[at : at + span], key=lambda i: self.lengths[i]) for at in range(0, len(order), span))
        batches = [part[at : at + self.batch_size] for part in windows for at in range(0, len(part), self.batch_size)]
        # A batch that is not full stays last, or it would shift all after it.
        rest = [batches.pop()] if len(order) % self.batch_size else []
        rng.shuffle(batches)
        return iter([index for batch in batches + rest for index in batch] + [EMPTY_ROW] * self.padding)


def parts_of(folder: Path) -> list[Path]:
    """The distillation folders that a folder is or holds, at any depth; itself if there are none.

    Raises `UserError` for a file.
    """
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, but a drafter learns from what the target answers: first "
            f"ctc-drafter distill --prompts {folder} --out answers/, then give --data answers/"
        )
    found = {
        file.parent for pattern in (MANIFEST, "shard-*.jsonl", "shard-*.jsonl.gz") for file in folder.rglob(pattern)
    }
    return sorted(found) or [folder]


def shard_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a distillation folder, in order. Raises `UserError` for a folder without shards and for damaged ones."""
    shards = sorted([*folder.glob("shard-*.jsonl"), *folder.glob("shard-*.jsonl.gz")])
    if not shards:
        raise UserError(f"{folder} has no shards; run distill with this folder as its output first")
    for shard in shards:
        try:
            for number, line in enumerate(bounded_lines(shard), start=1):
                try:
                    row = _row(line)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise UserError(
                        f"{shard} line {number} is damaged; delete this shard and run distill again"
                    ) from error
                yield row
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{shard} is damaged; delete it and run distill again") from error


def _row(line: bytes | None) -> dict[str, Any]:
    """Raises `ValueError`, `TypeError`, `KeyError` or `RecursionError` for what is no row."""
    row = json.loads(line or b"")
    if not isinstance(row["id"], str) or not isinstance(row.get("source", ""), str):
        raise TypeError("its id or source is no text")
    for key in ("prompt_ids", "answer_ids"):
        if not isinstance(row[key], list) or not all(type(token) is int and 0 <= token < MOST_ID for token in row[key]):
            raise ValueError(f"its {key} are no tokens")
    assert isinstance(row, dict)
    return row


def _common_manifest(folders: Sequence[Path]) -> dict[str, Any] | None:
    """Common manifest of the folders; all must name the same target, tokenizer and template."""
    first: dict[str, Any] | None = None
    for folder in folders:
        manifest = read_manifest(folder / MANIFEST)
        if manifest is None:
            continue
        first = first or manifest
        for key in ("config", "tokenizer", "template", "weights"):
            unsaid = key == "weights" and not (manifest.get(key) and first.get(key))
            if not unsaid and manifest.get(key) != first.get(key):
                raise UserError(
                    f"{folder} and {folders[0]} come from different targets: {different(key, first, manifest)}"
                )
        first = {**manifest, **{key: value for key, value in first.items() if value}}
    return first


def cut_message(share: float) -> str:
    """Of text of which this share of the answers was cut."""
    return (
        f"{share:.0%} of the answers were cut before their end: a drafter learns little of how answers end, "
        "and the target may not know where to stop; give distill --max-new-tokens more, or check the chat template"
    )
