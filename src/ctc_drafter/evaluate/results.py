"""Records, journal and results files of a measurement; the table for the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ctc_drafter.drafters.copying import ALL, NONE, OWN
from ctc_drafter.files import disk_errors, number, read_json, write_atomic
from ctc_drafter.types import UserError

# Records per method and prompt, the rows summed from them, and a journal that survives a kill.

PLAIN = "plain"
Key = tuple[str, int | str | None]  # method and nodes: a contender


# Results files of `bench`, read back for the report.

PLAIN_KEY: Key = (PLAIN, None)
USUAL_SIZE = 16


# What a method is called in tables and figures, where its name alone would claim too much: our drafter of EAGLE's kind,
# trained here, is not its authors' checkpoint.
TITLES = {"eagle": "EAGLE-style"}


def title_of(method: str) -> str:
    """ "eagle, depth 4" is "EAGLE-style, depth 4"; other names are their own."""
    name, comma, rest = method.partition(",")
    return TITLES.get(name, name) + comma + rest


@dataclass(frozen=True)
class Results:
    """One results file, or the part of it where nobody or everybody copies. name: its stem, and which part."""

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
        """Source of the figures, for captions: file, commit, hardware."""
        meta, hardware = self.meta, self.meta["hardware"]
        machine = hardware["gpu"] or f"{hardware['cpu']}, {meta['threads']} thread{'s' * (meta['threads'] > 1)}"
        unfinished = "" if meta["complete"] else ", unfinished run"
        return (
            f"results/{meta.get('file', self.name)}.json, commit {(meta['commit'] or 'unknown')[:9]}, {machine}, "
            f"{computed_in(meta)}, batch {meta['batch_size']}{unfinished}"
        )


def read_results(files: Sequence[Path]) -> list[Results]:
    """The bench's files among these, by name, each once for those who copy and for those who do not; others (of `eval`,
    `exactness`) are left out.

    Raises `UserError` for unreadable files, or when none is left.
    """
    found = []
    for file in sorted(files, key=lambda file: file.name):
        value = read_json(file)
        if isinstance(value, dict) and value.get("records"):
            for mode, part in apart(value):
                name = f"{file.stem}-{COPYING[mode].replace(' ', '-')}" if mode in COPYING else file.stem
                meta = part["meta"] | {"file": file.stem}
                found.append(Results(name, meta, part["rows"], part["records"]))
    if not found:
        raise UserError("none of these files is a bench's; write one with ctc-drafter bench --json FILE")
    return found


# The same results, apart by who copied.

COPYING = {NONE: "nobody copies", ALL: "everybody copies"}


def apart(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(mode, result) for each mode of a result of `bench`, or (`own`, the result) if it has none.

    Each has the rows and records of its drafters, and those of plain decoding and others that are no drafters.
    """
    known: dict[str, dict[str, Any]] = result["meta"].get("drafters") or {}
    mode_of = {name: facts["copies"] for name, facts in known.items() if facts.get("copies")}
    if not mode_of:
        return [(OWN, dict(result))]
    found = []
    for mode in dict.fromkeys(mode_of.values()):
        parts = {
            part: [each for each in result[part] if mode_of.get(each["method"], mode) == mode]
            for part in ("rows", "records")
            if part in result
        }
        drafters = {name: facts for name, facts in known.items() if mode_of.get(name, mode) == mode}
        found.append((mode, {**result, **parts, "meta": {**result["meta"], "drafters": drafters}}))
    return found


@dataclass(frozen=True)
class Record:
    """All turns of a prompt by one contender.

    nodes: "chain", a tree's size, None for plain decoding. tokens: all that it returned, eos included. steps:
    verifications. accepted: entry a counts those that accepted a drafted tokens. seconds: wall time, prefill included;
    prompts that are decoded together share theirs evenly. identical: every token is plain decoding's. skipped: the
    context cannot hold the prompt and its answers.
    """

    task: str
    index: int
    prompt: str
    category: str
    method: str
    nodes: int | str | None
    turns: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    identical: bool = True
    skipped: bool = False
    accepted: list[int] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.method, self.nodes


def histogram(counts: Iterable[int]) -> list[int]:
    """Counts of the values 0, 1, 2..."""
    found = Counter(counts)
    return [found[value] for value in range(max(found, default=-1) + 1)]


def add_histograms(parts: Sequence[Sequence[int]]) -> list[int]:
    return [
        sum(part[i] for part in parts if i < len(part)) for i in range(max((len(part) for part in parts), default=0))
    ]


def row_of(task: str, key: Key, records: Sequence[Record], plain: Sequence[Record]) -> dict[str, Any]:
    """A row of the results from a contender's records of a task and plain decoding's.

    `beta`: emitted tokens per verification; the first token of a turn comes from the prefill and is not counted.
    """
    done = [record for record in records if not record.skipped]
    tokens, steps, seconds = (sum(getattr(r, name) for r in done) for name in ("tokens", "steps", "seconds"))
    speed, base = rate(tokens, seconds), rate(sum(r.tokens for r in plain), sum(r.seconds for r in plain))
    return {
        "method": key[0],
        "nodes": key[1],
        "task": task,
        "prompts": len(done),
        "skipped": len(records) - len(done),
        "tokens": tokens,
        "steps": steps,
        "beta": (tokens - sum(record.turns for record in done)) / steps if steps else None,
        "tokens_per_s": speed,
        "gamma": speed / base if speed and base else None,
        "identical": sum(record.identical for record in done),
        "compared": len(done),
        "accept_histogram": add_histograms([record.accepted for record in done]),
        "stages_ms": {},
        "seconds": seconds,
    }


def agreement(same: int, compared: int) -> str:
    """How many outputs were plain decoding's; a dash where none was compared (`bench --tokens-only`)."""
    return f"{same} of {compared}" if compared else "-"


def rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds else None


class Journal:
    """Append-only file next to the results: settings first, then measured records.

    A run with the same settings goes on from there; a line that a kill cut off does not count. Without a path nothing
    is kept. Raises `UserError` for the file of another run.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path = path
        self.records: list[Record] = []
        self.extras: list[dict[str, Any]] = []
        if path is None:
            return
        lines, wanted = whole_lines(path), json.loads(json.dumps(settings))
        if lines and lines[0] != wanted:
            raise UserError(f"{path} holds another run ({difference(lines[0], wanted)}); delete it to start anew")
        for line in lines[1:]:
            self.records += [Record(**record) for record in line.get("records", ())]
            self.extras += [line["extra"]] if "extra" in line else []
        with disk_errors(path):
            write_atomic(path, map(json.dumps, lines or [settings]))  # without a line that was cut off

    def add(self, records: Sequence[Record]) -> None:
        """Appends records that belong together, all or none."""
        self.records += records
        self._write({"records": [asdict(record) for record in records]})

    def add_extra(self, extra: dict[str, Any]) -> None:
        self.extras.append(extra)
        self._write({"extra": extra})

    def done(self, task: str) -> set[int]:
        """Places of the prompts that were measured."""
        return {record.index for record in self.records if record.task == task}

    def close(self) -> None:
        """Everything is in the results: the file goes."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room there, then run again") from error


def whole_lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    key = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
    return f"{key} was {old.get(key)}, is now {new.get(key)}"


def weights_of(meta: Mapping[str, Any], method: str) -> str | None:
    """The type of the weights that a method computed with; None where no other engine was measured: all are alike."""
    peers = meta.get("peers")
    return str(peers.get(method, {}).get("weights", computed_in(meta).partition(",")[0])) if peers else None


def computed_in(meta: Mapping[str, Any]) -> str:
    """Numbers and engine of our own steps, such as `float32, compiled`; results of earlier versions name no engine."""
    engine = str(meta.get("engine", "compiled" if meta.get("compiled") else ""))
    if engine.startswith("OpenVINO "):
        return f"{engine.removeprefix('OpenVINO ')}, OpenVINO"
    return str(meta["dtype"]) + (f", {engine}" if engine in ("compiled", "exact") else "")


def engines_of(meta: Mapping[str, Any]) -> list[str]:
    """A sentence for each other engine that was measured: its version, and the instructions it was built for."""
    found = []
    for method, facts in (meta.get("peers") or {}).items():
        built = f", built for {facts['built_for']}" if "built_for" in facts else ""
        found.append(f"`{method.partition(':')[0]}` is {facts['engine']}{built}.")
    return list(dict.fromkeys(found))


def results_table(result: dict[str, Any]) -> Table:
    """One line per row of `evaluate`'s results; what was not measured is a dash. Fits 80 columns.

    Beside other engines each row says what its weights are, in place of how many tokens it wrote.
    """
    meta, table = result.get("meta", {}), Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    peers = bool(meta.get("peers"))
    for name in ("task", "method"):
        table.add_column(name, no_wrap=True)
    counts = ["weights"] if peers else ["nodes", "tokens"]
    for name in (*counts, "tokens/s", "speedup", "tokens\n/step" if peers else "tokens/step", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        method, nodes = row["method"], row.get("nodes")
        if peers:
            method += "" if nodes is None else f", {nodes}"
            cells = [str(weights_of(meta, row["method"]))]
        else:
            cells = [str("-" if nodes is None else nodes), str(row["tokens"])]
        cells += [number(row["tokens_per_s"], 1), number(row["gamma"], 2), number(row["beta"], 2)]
        table.add_row(row["task"], method, *cells, agreement(row["identical"], row["compared"]))
    skipped = {row["task"]: row["skipped"] for row in result["rows"] if row["skipped"]}
    if skipped:
        table.caption = "Left out, too long for the context: " + ", ".join(f"{n} of {t}" for t, n in skipped.items())
    return table


CHAIN, BUDGET = "chain", "budget"
