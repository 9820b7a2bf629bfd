"""The target answers the prompts: the only text that a drafter should learn from."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.target import Target
from ctc_drafter.text import eos_ids, fingerprint
from ctc_drafter.train.data import Prompt
from ctc_drafter.train.manifest import (
    MANIFEST,
    claim,
    config_hash,
    digest,
    disk_errors,
    template_hash,
    versions,
    write_atomic,
)
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class Distilled:
    """What a call did: rows and tokens written now, rows found finished, prompts too long for the target."""

    rows: int
    tokens: int
    found: int
    too_long: int
    seconds: float


def distill(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    shard_size: int = 256,
    eos: Collection[int] | None = None,
    name: str = "",
    progress: bool = True,
) -> Distilled:
    """Writes the target's greedy answers to `out/shard-00000.jsonl` and on, `shard_size` prompts each.

    A row is `{"id", "prompt_ids", "answer_ids"}`, in the order of the prompts, the end token included where it
    was written. A shard appears whole or not at all, so that the same call may be killed and repeated at any
    time: it goes on after the last finished shard. `name` is kept in the manifest; prompts that leave no room
    for `max_new_tokens` are left out. Raises `UserError` for a folder of another run and for a full disk.
    """
    fitting = [prompt for prompt in prompts if len(prompt.ids) + max_new_tokens <= target.context]
    if not fitting:
        raise UserError(f"no prompt leaves {max_new_tokens} of the target's {target.context} tokens; allow fewer")
    eos = eos_ids(target.model, tokenizer) if eos is None else tuple(sorted(eos))
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "shard_size": shard_size, "eos": eos}
    shards = [fitting[at : at + shard_size] for at in range(0, len(fitting), shard_size)]
    with disk_errors(out):
        _open_folder(out, _manifest(target, tokenizer, fitting, settings, name))

    started = time.perf_counter()
    rows = tokens = found = 0
    with _progress(progress) as bar:
        task = bar.add_task("distill", total=len(fitting), tokens=0)
        for index, shard in enumerate(shards):
            path = out / f"shard-{index:05d}.jsonl"
            if path.exists():
                found += len(shard)
                bar.update(task, completed=rows + found)
                continue
            answers: list[list[int]] = [[]] * len(shard)
            for batch in _batches(shard, batch_size):
                generation = plain_generate(
                    target, [shard[i].ids for i in batch], max_new_tokens=max_new_tokens, eos=eos
                )
                for i, answer in zip(batch, generation.tokens, strict=True):
                    answers[i] = answer
                rows, tokens = rows + len(batch), tokens + sum(map(len, generation.tokens))
                bar.update(task, completed=rows + found, tokens=tokens)
            with disk_errors(out):
                write_atomic(path, map(_line, shard, answers))
    return Distilled(rows, tokens, found, len(prompts) - len(fitting), time.perf_counter() - started)


def _batches(shard: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, so that little of a batch is padding."""
    order = sorted(range(len(shard)), key=lambda i: len(shard[i].ids))
    return (order[at : at + size] for at in range(0, len(order), size))


def _line(prompt: Prompt, answer: list[int]) -> str:
    return json.dumps({"id": prompt.id, "prompt_ids": prompt.ids, "answer_ids": answer})


def _manifest(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    name: str,
) -> dict[str, Any]:
    return {
        "target": name or target.model.config.name_or_path or type(target.model).__name__,
        "config": config_hash(target.model.config),
        "dtype": str(target.dtype).removeprefix("torch."),
        "tokenizer": fingerprint(tokenizer),
        "template": template_hash(tokenizer),
        "prompts": len(prompts),
        "prompts_hash": digest(" ".join(prompt.id for prompt in prompts)),
        "settings": settings,
        "versions": versions(),
    }


def _open_folder(out: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder this run's, and removes what a killed one left half written."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists() and any(out.glob("shard-*")):
        raise UserError(f"{out} holds shards but no {MANIFEST}; use another output folder")
    claim(out / MANIFEST, manifest)
    for temporary in out.glob(".shard-*.tmp"):
        temporary.unlink()


class _TokenRate(ProgressColumn):
    """Tokens per second since this call began."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['tokens'] / max(task.elapsed or 0.0, 1e-9):,.0f} tokens/s")


def _progress(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _TokenRate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        disable=not show,
    )
