"""Results files of `bench`, read back for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ctc_drafter.evaluate.contenders import CHAIN
from ctc_drafter.evaluate.records import PLAIN, Key
from ctc_drafter.files import read_json
from ctc_drafter.types import UserError

PLAIN_KEY: Key = (PLAIN, None)
USUAL_SIZE = 16


@dataclass(frozen=True)
class Results:
    """One file. name: its stem."""

    name: str
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @cached_property
    def methods(self) -> list[str]:
        """Those that draft trees, in the order of the run."""
        return list(dict.fromkeys(row["method"] for row in self.rows if row["nodes"] is not None))

    @cached_property
    def stock(self) -> list[str]:
        """transformers' own ways, if they were measured."""
        return list(dict.fromkeys(r["method"] for r in self.rows if r["nodes"] is None and r["method"] != PLAIN))

    @cached_property
    def sizes(self) -> list[int | str]:
        """Chain first, then by number of nodes."""
        found = {row["nodes"] for row in self.rows if row["nodes"] is not None}
        return sorted(found, key=lambda size: (size != CHAIN, size if size != CHAIN else 0))

    @property
    def prompts(self) -> str:
        """How many prompts of each task were measured, and of which categories, where a task has several."""
        plain = [record for record in self.records if record["method"] == PLAIN and not record["skipped"]]
        parts = []
        for task in self.tasks:
            of = Counter(record["category"] for record in plain if record["task"] == task)
            kinds = ", ".join(f"{category} {count}" for category, count in of.items())
            parts.append(f"{task} {of.total()}" + (f" ({kinds})" if len(of) > 1 or task not in of else ""))
        return "; ".join(parts)

    @property
    def size(self) -> int | str:
        """The one that is shown where there is room for one."""
        return USUAL_SIZE if USUAL_SIZE in self.sizes else self.sizes[-1]

    @property
    def ours(self) -> str | None:
        """The CTC drafter of this package, the first one if there are several."""
        known = self.meta.get("drafters", {})
        return next((name for name in self.methods if known.get(name, {}).get("method") == "ctc"), None)

    def row(self, task: str, key: Key) -> dict[str, Any] | None:
        wanted = (task, *key)
        return next((row for row in self.rows if (row["task"], row["method"], row["nodes"]) == wanted), None)

    @property
    def place(self) -> str:
        """Where the figures come from, for captions."""
        meta, hardware = self.meta, self.meta["hardware"]
        machine = hardware["gpu"] or f"{hardware['cpu']}, {meta['threads']} thread{'s' * (meta['threads'] > 1)}"
        unfinished = "" if meta["complete"] else ", unfinished run"
        return (
            f"results/{self.name}.json, commit {(meta['commit'] or 'unknown')[:9]}, {machine}, "
            f"{meta['dtype']}, batch {meta['batch_size']}{unfinished}"
        )


def read_results(files: Sequence[Path]) -> list[Results]:
    """The bench's files among these, by name; others (of `eval`, `exactness`) are left out.

    Raises `UserError` for unreadable files, or when none is left.
    """
    found = []
    for file in sorted(files, key=lambda file: file.name):
        value = read_json(file)
        if isinstance(value, dict) and value.get("records"):
            found.append(Results(file.stem, value["meta"], value["rows"], value["records"]))
    if not found:
        raise UserError("none of these files is a bench's; write one with ctc-drafter bench --json FILE")
    return found
