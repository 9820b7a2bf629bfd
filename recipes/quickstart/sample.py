"""Samples distilled text for the package: `python -m recipes.quickstart.sample FOLDER...`.

`ctc-drafter bench --quick` trains small drafters on it, on any machine and without a corpus.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctc_drafter.provenance import MANIFEST
from ctc_drafter.quickstart import SAMPLE_DIR
from ctc_drafter.train.data import DistilledDataset, DistilledRow
from ctc_drafter.types import UserError

TOKENS = 400_000


def write_sample(folders: Sequence[Path], out: Path, tokens: int = TOKENS) -> int:
    """Takes rows evenly from distilled folders until they hold about `tokens` tokens; returns how many they hold.

    Every folder gives its share, in the format of its shards, compressed; the same folders give the same bytes.
    Raises `UserError` for folders that hold no rows, or were written by different targets.
    """
    every = DistilledDataset.load(folders)
    if every.manifest is None:
        raise UserError(f"{folders[0]} has no {MANIFEST}; give folders that distill wrote")
    total = sum(len(row.ids) for row in every.rows)
    chosen = list(spread_evenly(every.rows, min(1.0, tokens / total)))
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(as_json(row), separators=(",", ":")) + "\n" for row in chosen)
    (out / "shard-00000.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    shutil.copyfile(folders[0] / MANIFEST, out / MANIFEST)
    return sum(len(row.ids) for row in chosen)


def spread_evenly(rows: Sequence[DistilledRow], share: float) -> Iterator[DistilledRow]:
    """Rows at equal distances in tokens, so that their text is about `share` of all."""
    seen = taken = 0
    for row in rows:
        seen += len(row.ids)
        if taken + len(row.ids) <= seen * share:
            taken += len(row.ids)
            yield row


def as_json(row: DistilledRow) -> dict[str, object]:
    ids = row.ids.tolist()
    return {"id": f"{row.key:x}", "prompt_ids": ids[: row.answer_start], "answer_ids": ids[row.answer_start :]}


if __name__ == "__main__":
    try:
        written = write_sample([Path(name) for name in sys.argv[1:]], SAMPLE_DIR)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{SAMPLE_DIR}: {written} tokens")
