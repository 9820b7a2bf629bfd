"""Distillation: the target answers prompts, in shards that survive a kill."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctc_drafter.chat import eos_ids, fingerprint
from ctc_drafter.decode.generate import plain_generate_many
from ctc_drafter.decode.sampling import ARGMAX, Sampled, Sampler, row_seeds, warpers
from ctc_drafter.files import disk_errors, remove_leftovers, write_atomic
from ctc_drafter.provenance import (
    MANIFEST,
    claim,
    config_hash,
    digest,
    read_manifest,
    template_hash,
    versions,
    weights_hash,
)
from ctc_drafter.target.model import Target
from ctc_drafter.train.progress import Progress
from ctc_drafter.train.prompts import Prompt
from ctc_drafter.types import UserError, lacks_memory

# Distillation: the target answers the prompts.


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily at temperature 0, else by a seed of each prompt's own."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_p < 1 and not self.temperature:
            raise UserError("top_p says nothing about greedy answers; give --temperature as well")

    def seed_of(self, prompt: Prompt) -> int:
        """31 bits that depend on seed and prompt alone."""
        return int(digest(f"{self.seed}:{prompt.id}"), 16) & 0x7FFFFFFF


# Answers in shards: files that appear whole or not at all, so that distillation may be killed at any time.

# What the first versions did, whose manifests do not say it.
GREEDY_SETTINGS = {"temperature": 0.0, "top_p": 1.0, "seed": 0}


GREEDY = Sampling()


def distill(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    shard_size: int = 256,
    eos: Collection[int] | None = None,
    name: str = "",
    sampling: Sampling = GREEDY,
    source: dict[str, Any] | None = None,
    progress: bool = True,
) -> Distilled:
    """Writes the target's answers to `out/shard-00000.jsonl` and on, `shard_size` prompts each; see `Shards`.

    `batch_size` answers are decoded at a time, and the next prompt begins when one ends. The same call may be killed
    and repeated at any time: it goes on with the answers that are not there yet, also with more prompts behind the
    same ones. `name`, and `source` of the prompts, are kept in the manifest; prompts that leave no room for
    `max_new_tokens` are left out. Raises `UserError` for a folder of another run, for a full disk and for too little
    memory: a smaller `batch_size` goes on.
    """
    chosen = fitting(prompts, max_new_tokens, target.context)
    eos = eos_ids(target.model, tokenizer) if eos is None else tuple(sorted(eos))
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "shard_size": shard_size, "eos": eos}
    settings["sampling"] = asdict(sampling)
    about = {"target": name or target.model.config.name_or_path or type(target.model).__name__}
    about |= {
        "weights": weights_hash(target.model),
        "dtype": str(target.dtype).removeprefix("torch."),
        "ids": "written",
    }
    manifest = about | origin(target.model.config, tokenizer, chosen) | {"settings": settings, "source": source or {}}
    with batch_errors(batch_size), Shards(out, chosen, shard_size, manifest, progress) as shards:
        pending = [chosen[place] for place in shards.pending]
        answers = plain_generate_many(
            target,
            [prompt.ids for prompt in pending],
            in_flight=batch_size,
            max_new_tokens=max_new_tokens,
            eos=eos,
            sampler=sampler_for(pending, sampling),
        )
        for index, answer in answers:
            cut = len(answer) == max_new_tokens and answer[-1] not in eos
            shards.add(shards.pending[index], answer, cut)
        return shards.summary(too_long=len(prompts) - len(chosen))


@contextmanager
def batch_errors(batch_size: int) -> Iterator[None]:
    """Turns a lack of memory into one line that says what lowers it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        advice = f"--batch-size {batch_size // 2}" if batch_size > 1 else "a smaller --dtype, or a --server"
        raise UserError(
            f"too little memory for {batch_size} answers at a time; give {advice}: finished answers are kept, and the "
            "same command goes on"
        ) from error


def sampler_for(prompts: Sequence[Prompt], sampling: Sampling) -> Sampler:
    if not sampling.temperature:
        return ARGMAX
    # Each is the first choice of a request of its own, as a server has it.
    seeds = [row_seeds(sampling.seed_of(prompt), [0])[0] for prompt in prompts]
    return Sampled(seeds, warpers(temperature=sampling.temperature, top_p=sampling.top_p))


OLDER: dict[str, Any] = {"ids": "written", "weights": None, "revision": None, "settings": {"sampling": GREEDY_SETTINGS}}


@dataclass(frozen=True)
class Distilled:
    """Result of a distillation.

    rows and tokens were written now, `found` prompts had been seen to before, too_long were too long for the target.
    cut: answers of this call that ended at the limit of tokens. left_out: reason -> rows that were not written.
    """

    rows: int
    tokens: int
    found: int
    too_long: int
    seconds: float
    cut: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class Shards:
    """The output folder of a distillation: `shard-00000.jsonl` and on, `size` prompts each.

    A row is `{"id", "source", "prompt_ids", "answer_ids"}`, in the order of the prompts, the end token included where
    it was written. Answers of unfinished shards are in a journal, a line each, which goes when all shards are there.
    Use it as a context: progress is shown while it is open. Raises `UserError` for a folder of another run and for a
    full disk.

    pending: places of the prompts that were neither answered nor left out when it was opened.
    """

    def __init__(self, out: Path, prompts: Sequence[Prompt], size: int, manifest: dict[str, Any], progress: bool):
        self.out, self.prompts, self.size = out, prompts, size
        self.rows = self.tokens = self.cut = 0
        self.left_out: Counter[str] = Counter()
        self.started = self.synced = time.monotonic()
        with disk_errors(out):
            _open_folder(out, prompts, size, manifest)
            missing = [place for place in range(len(prompts)) if not shard_path(out, place // size).exists()]
            self._kept = _open_journal(out, prompts, missing)
        self.pending = [place for place in missing if place not in self._kept]
        self._left = Counter(place // size for place in self.pending)
        self.found = len(prompts) - len(self.pending)
        self._journal: IO[str] | None = None
        self._progress = Progress("distill", len(prompts), self.found, show=progress)
        for index in sorted({place // size for place in missing}):
            self._finish(index)

    def __enter__(self) -> Shards:
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()
        if self._journal is not None:
            self._journal.close()
        if not self._left.total():
            (self.out / JOURNAL).unlink(missing_ok=True)

    def add(self, place: int, answer: list[int], cut: bool) -> None:
        """Keeps the answer to the prompt at this place; cut: whether it ended at the limit of tokens."""
        self.rows, self.tokens, self.cut = self.rows + 1, self.tokens + len(answer), self.cut + cut
        self._keep(place, {"answer_ids": answer})

    def leave_out(self, place: int, reason: str) -> None:
        """Counts a prompt without a usable answer."""
        self.left_out[reason] += 1
        self._keep(place, {"left_out": reason})

    def _keep(self, place: int, what: dict[str, Any]) -> None:
        self._kept[place] = what
        with disk_errors(self.out):
            if self._journal is None:
                self._journal = (self.out / JOURNAL).open("a", encoding="utf-8")
            self._journal.write(_noted(place, self.prompts[place], what) + "\n")
            self._journal.flush()
            if time.monotonic() - self.synced > SYNC:
                os.fsync(self._journal.fileno())
                self.synced = time.monotonic()
        self._left[place // self.size] -= 1
        self._finish(place // self.size)
        self._progress.update(self.found + self.rows + self.left_out.total(), self.tokens)

    def _finish(self, index: int) -> None:
        """Writes a shard if nothing of it is missing."""
        if self._left[index]:
            return
        places = range(index * self.size, min((index + 1) * self.size, len(self.prompts)))
        kept = [(self.prompts[place], self._kept.pop(place).get("answer_ids")) for place in places]
        with disk_errors(self.out):
            write_atomic(shard_path(self.out, index), (_line(p, answer) for p, answer in kept if answer is not None))

    def summary(self, too_long: int) -> Distilled:
        seconds = time.monotonic() - self.started
        return Distilled(self.rows, self.tokens, self.found, too_long, seconds, self.cut, dict(self.left_out))


def shard_path(out: Path, index: int) -> Path:
    return out / f"shard-{index:05d}.jsonl"


def known_ids(out: Path, prompts: Sequence[Prompt], size: int) -> str | None:
    """`ids` of the manifest of a folder that has all its shards; None for others."""
    found = read_manifest(out / MANIFEST) or {}
    whole = all(shard_path(out, index).exists() for index in range(-(-len(prompts) // size)))
    return found.get("ids", OLDER["ids"]) if whole and found.get("prompts") == len(prompts) else None


def fitting(prompts: Sequence[Prompt], max_new_tokens: int, context: int) -> list[Prompt]:
    """Prompts that leave room for an answer. Raises `UserError` if none does."""
    found = [prompt for prompt in prompts if len(prompt.ids) + max_new_tokens <= context]
    if not found:
        raise UserError(f"no prompt leaves {max_new_tokens} of the target's {context} tokens; allow fewer")
    return found


def origin(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Manifest entries of the target's configuration, the tokenizer and the prompts."""
    return {
        "revision": getattr(config, "_commit_hash", None) or "",  # the hub's; folders have none
        "config": config_hash(config),
        "tokenizer": fingerprint(tokenizer),
        "template": template_hash(tokenizer),
        "prompts": len(prompts),
        "prompts_hash": prompts_hash(prompts),
        "versions": versions(),
    }


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    return digest(" ".join(prompt.id for prompt in prompts))


def _line(prompt: Prompt, answer: list[int]) -> str:
    source = {"source": prompt.source} if prompt.source else {}
    return json.dumps({"id": prompt.id, **source, "prompt_ids": prompt.ids, "answer_ids": answer})


def _open_folder(out: Path, prompts: Sequence[Prompt], size: int, manifest: dict[str, Any]) -> None:
    """Claims the folder for this run, and removes half-written files of a killed one.

    A folder whose prompts are the first of these grows: its last shard, if it is short, is opened again.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists() and any(out.glob("shard-*")):
        raise UserError(f"{out} holds shards but no {MANIFEST}; use another output folder")
    found = read_manifest(out / MANIFEST) or {}
    before = found.get("prompts", len(prompts))
    grows = before < len(prompts) and found.get("prompts_hash") == prompts_hash(prompts[:before])
    wanted = manifest | {key: found[key] for key in ("prompts", "prompts_hash") if grows}
    # The prompts' hash says what they are, and any batch size gives the same answers but for rounding.
    claim(out / MANIFEST, wanted, OLDER, {"source", "batch_size"})
    remove_leftovers(out, "shard-*")
    if not grows:
        return
    short = shard_path(out, before // size)
    if before % size and short.exists():
        places = {prompt.id: place for place, prompt in enumerate(prompts)}
        answered = {row["id"]: row["answer_ids"] for row in map(json.loads, short.read_text("utf-8").splitlines())}
        lines = [_noted(places[key], prompts[places[key]], {"answer_ids": ids}) for key, ids in answered.items()]
        write_atomic(out / JOURNAL, [*map(json.dumps, read_journal(out / JOURNAL)), *lines])
        short.unlink()
    write_atomic(out / MANIFEST, [json.dumps(manifest, indent=2)])


# The journal: answers of unfinished shards in the order in which they ended, each safe as soon as it is there.

JOURNAL = "journal.jsonl"
SYNC = 60.0  # seconds after which what was written is on disk, and not only with the operating system


def _noted(place: int, prompt: Prompt, what: dict[str, Any]) -> str:
    return json.dumps({"place": place, "id": prompt.id, **what})


def read_journal(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last one that a kill cut off is dropped."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a crash of the machine may leave anything
            continue
    return [row for row in rows if isinstance(row, dict)]


def _open_journal(out: Path, prompts: Sequence[Prompt], missing: Collection[int]) -> dict[int, dict[str, Any]]:
    """What the journal holds for the `missing` places; the file is left with these lines alone, or not at all."""
    wanted = set(missing)
    rows = [row for row in read_journal(out / JOURNAL) if row.get("place") in wanted]
    kept = {row["place"]: row for row in rows if row.get("id") == prompts[row["place"]].id}
    if kept:
        write_atomic(out / JOURNAL, map(json.dumps, kept.values()))
    else:
        (out / JOURNAL).unlink(missing_ok=True)
    return {place: {key: row[key] for key in ("answer_ids", "left_out") if key in row} for place, row in kept.items()}
