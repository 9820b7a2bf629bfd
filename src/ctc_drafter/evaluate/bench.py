"""`ctc-drafter bench`: several drafters, tasks, tree sizes and depths in one run."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.copying import Copying
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import PROMPT_LOOKUP, method_of
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.evaluate.also import also_contenders
from ctc_drafter.evaluate.costs import draft_flops, own_text
from ctc_drafter.evaluate.methods import decoding
from ctc_drafter.evaluate.results import CHAIN, PLAIN, Journal
from ctc_drafter.evaluate.runner import Bench, head, measure_all
from ctc_drafter.evaluate.tasks import Task
from ctc_drafter.evaluate.walk import TOGETHER, Walking
from ctc_drafter.files import write_json
from ctc_drafter.provenance import read_manifest, source_hash
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

# Methods, tasks and tree sizes in one run: equal prompts, equal counters, every output compared with plain's.

SIZES: tuple[int | str, ...] = (CHAIN, 8, 16, 32, 64)
WATCHED = 4


@dataclass(frozen=True)
class Entry:
    """A drafter under the name that results give it, and what is known of it, see `about_drafter`."""

    drafter: Drafter
    facts: dict[str, Any]
    sampler: Sampler = ARGMAX
    sizes: tuple[int | str, ...] | None = None  # None: those of the run


@dataclass(frozen=True)
class BenchSettings:
    """sizes: "chain" and nodes of trees. watched: prompts of a task that run once more for the calibration curve.

    tokens_only: count tokens per step along plain decoding's answers, and time nothing, see `walk.py`.
    """

    sizes: tuple[int | str, ...] = SIZES
    limit: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 1
    seed: int = 0
    watched: int = WATCHED
    also: tuple[str, ...] = ()
    tokens_only: bool = False


def bench(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    entries: Mapping[str, Entry],
    tasks: Sequence[Task],
    settings: BenchSettings,
    *,
    meta: dict[str, Any],
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures plain decoding and every entry at every size, taking turns on each prompt.

    Returns `{"meta", "rows", "records"}`: rows as `evaluate`'s, and a record for each prompt and contender, see
    `Record`. What is measured is kept in `OUT.partial.jsonl` until all is done: the same call goes on from there.
    Without a floor a tree of n nodes has n nodes. Raises `UserError` if that file belongs to another run.
    """
    made = decoding(target, tokenizer, settings.max_new_tokens)
    if settings.tokens_only:
        layers = sorted({layer for entry in entries.values() for layer in entry.drafter.feature_layers})
        asked = {size for entry in entries.values() for size in entry.sizes or settings.sizes}
        made = Walking(target, made.eos, made.max_new_tokens, tuple(asked), tuple(layers))
    contenders = [made.plain()]
    for name, entry in entries.items():
        sizes = entry.sizes or settings.sizes
        contenders += [made.of_size(name, entry.drafter, size, entry.sampler) for size in sizes]
    contenders += also_contenders(made, settings.also)
    together = max(settings.batch_size, TOGETHER) if settings.tokens_only else settings.batch_size
    given = settings.max_new_tokens, together, settings.watched, not settings.tokens_only
    work = Bench(target, tokenizer, contenders, *given)
    chosen = [task.some(settings.limit) for task in tasks]
    about = {"seed": settings.seed, "nodes": list(settings.sizes), "floor": 0.0, "limit": settings.limit}
    about |= {"tokens_only": settings.tokens_only, "batch_size": settings.batch_size}
    about["target_parameters"] = sum(weight.numel() for weight in target.model.parameters())
    text = own_text(target)
    about["drafters"] = {
        name: entry.facts | {"draft_flops": draft_flops(target, entry.drafter, text)} for name, entry in entries.items()
    }
    result: dict[str, Any] = {"meta": head(work, about) | meta, "rows": []}
    journal = Journal(partial(out), identity(result["meta"], chosen, settings))

    measure_all(work, chosen, result, journal=journal, console=console)
    result["records"] = [asdict(record) for record in journal.records]
    if out is not None:
        write_json(out, result)
    if result["meta"]["complete"]:
        journal.close()
    return result


def partial(out: Path | None) -> Path | None:
    """The journal file of a run, OUT.partial.jsonl."""
    return None if out is None else out.with_name(f"{out.name}.partial.jsonl")


def identity(meta: dict[str, Any], tasks: Sequence[Task], settings: BenchSettings) -> dict[str, Any]:
    """The settings that two runs must share for one to resume the other."""
    prompts = {task.name: hashlib.sha256(repr(task.prompts).encode()).hexdigest()[:16] for task in tasks}
    kept = ("versions", "hardware", "dtype", "device", "threads", "compiled", "engine", "peers")
    shared = {name: meta.get(name) for name in ("target", "template", "drafters", *kept)}
    drafters = meta["drafters"].items()  # operations are counted anew, and near-ties may fall otherwise
    shared["drafters"] = {name: {k: v for k, v in facts.items() if k != "draft_flops"} for name, facts in drafters}
    return {"source": source_hash(), **shared, **asdict(settings), "prompts": prompts}


def parse_sizes(text: str) -> tuple[int | str, ...]:
    """`chain,8,16` as sizes. Raises `UserError` for others."""
    found: list[int | str] = []
    if text.strip() == "auto":
        raise UserError(
            f"--nodes auto is for generate, and bench compares fixed sizes; give {CHAIN} or numbers from 1, or measure "
            "sizes that step times choose with eval --budget"
        )
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part != CHAIN and not (part.isdecimal() and int(part) > 0):
            raise UserError(f"--nodes {part} is no size; give {CHAIN} or numbers from 1, with commas between them")
        found.append(CHAIN if part == CHAIN else int(part))
    if not found:
        raise UserError(f"no size was named; give --nodes {CHAIN},8,16")
    return tuple(dict.fromkeys(found))


def parse_drafters(texts: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` as names with their folders or hub ids; `prompt_lookup` needs none. Raises `UserError` for others."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if name == PROMPT_LOOKUP and not equals:
            place = PROMPT_LOOKUP
        if not name or not place:
            raise UserError(f"--drafter {text} names no folder; write NAME=DIR, or {PROMPT_LOOKUP}")
        if name == PLAIN or name in found:
            raise UserError(f"--drafter {text}: the name {name} is taken; give another one")
        found[name] = place
    return found


# The same drafters with shorter drafts: autoregressive methods have a best depth.


def at_depths(entries: Mapping[str, Entry], depths: Sequence[int]) -> dict[str, Entry]:
    """An entry for each drafter and depth that it can draft; `of` among its facts is the drafter's own name.

    Without depths the entries as they are. Raises `UserError` if a drafter drafts fewer tokens than every depth.
    """
    if not depths:
        return dict(entries)
    found = {}
    for name, entry in entries.items():
        longest = longest_draft(entry.drafter)
        fit = [depth for depth in depths if depth <= longest]
        if not fit:
            raise UserError(f"{name} drafts {longest} tokens at most; give --depths one that is not more")
        for depth in fit:
            known = entry.facts | {"of": name, "draft_length": depth}
            found[f"{name}, depth {depth}"] = replace(entry, drafter=shortened(entry.drafter, depth), facts=known)
    return found


def longest_draft(drafter: Drafter) -> int:
    """Tokens. Raises `UserError` for a drafter that does not know."""
    found = drafter.config if isinstance(drafter, TrainableDrafter) else drafter
    if not hasattr(found, "draft_length"):
        raise UserError(f"{type(drafter).__name__} has no depth; leave it out, or leave out --depths")
    return int(found.draft_length)


def shortened(drafter: Drafter, depth: int) -> Drafter:
    """A drafter on the same weights with drafts of at most `depth` tokens, copies of the text included.

    Heads beyond the depth are not asked, EAGLE makes as many passes, blocks of DFlash and DSpark have as many masks;
    CTC fills all its frames and searches them for shorter prefixes.
    """
    if isinstance(drafter, PromptLookup):
        return replace(drafter, draft_length=depth)
    if isinstance(drafter, Copying):
        longest = min(depth, drafter.draft_length), min(depth, drafter.lookup_length)
        return Copying(shortened(drafter.inner, depth), *longest)
    assert isinstance(drafter, TrainableDrafter)
    twin = copy.copy(drafter)
    twin.config, twin._prepared = copy.copy(drafter.config), None
    twin.config.draft_length = depth
    if getattr(twin.config, "lookup_length", 0):
        twin.config.lookup_length = min(depth, twin.config.lookup_length)
    return twin


def parse_depths(text: str) -> tuple[int, ...]:
    """`3,5,7` as numbers. Raises `UserError` for others."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not (part.isdecimal() and int(part) > 0):
            raise UserError(f"--depths {part} is no depth; give numbers from 1, with commas between them")
    return tuple(dict.fromkeys(map(int, parts)))


# Metadata of a drafter: method, size, training.


def about_drafter(drafter: Drafter, folder: Path | None) -> dict[str, Any]:
    """`method`, `parameters` (what the drafter adds to its target), `draft_length`, `learning_rate` and `training`.

    `training` has `steps`, `tokens` (text that was read, repeats counted) and `seconds`, from the logs of the folder
    that the drafter was loaded from; None where they do not say.
    """
    found: dict[str, Any] = {"method": method_of(drafter), "parameters": 0, "training": None}
    found["draft_length"] = getattr(drafter, "draft_length", None)
    if isinstance(drafter, TrainableDrafter):
        found["parameters"] = sum(weight.numel() for weight in drafter.parameters())
        found["draft_length"] = max(drafter.config.draft_length, getattr(drafter.config, "lookup_length", 0))
        found["training"] = training(folder) if folder else None
        found["learning_rate"] = learning_rate(folder) if folder else None
    return found


def learning_rate(folder: Path) -> float | None:
    """The one that the trainer ran with, by what it wrote beside the drafter."""
    settings = (read_manifest(folder / "train.json") or {}).get("settings") or {}
    return settings.get("learning_rate")


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
