"""Distillation: the target answers prompts, in shards that survive a kill."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctc_drafter.chat import eos_ids, fingerprint
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampled, Sampler, row_seeds, warpers
from ctc_drafter.files import disk_errors, write_atomic
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
    batch_size: int = 16,
    shard_size: int = 256,
    eos: Collection[int] | None = None,
    name: str = "",
    sampling: Sampling = GREEDY,
    source: dict[str, str] | None = None,
    progress: bool = True,
) -> Distilled:
    """Writes the target's answers to `out/shard-00000.jsonl` and on, `shard_size` prompts each; see `Shards`.

    The same call may be killed and repeated at any time: it goes on after the last finished shard. `name`, and `source`
    of the prompts, are kept in the manifest; prompts that leave no room for `max_new_tokens` are left out. Raises
    `UserError` for a folder of another run, for a full disk and for too little memory: a smaller `batch_size` goes on.
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
        for index in shards.missing:
            shard = shards.of(index)
            answers: list[list[int]] = [[]] * len(shard)
            for batch in _batches(shard, batch_size):
                generation = plain_generate(
                    target,
                    [shard[i].ids for i in batch],
                    max_new_tokens=max_new_tokens,
                    eos=eos,
                    sampler=sampler_for([shard[i] for i in batch], sampling),
                )
                for i, answer in zip(batch, generation.tokens, strict=True):
                    answers[i] = answer
                    shards.count(answer, cut=len(answer) == max_new_tokens and answer[-1] not in eos)
            shards.write(index, answers)
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
            f"too little memory for {batch_size} answers at a time; give {advice}: finished shards are kept, and the "
            "same command goes on"
        ) from error


def sampler_for(prompts: Sequence[Prompt], sampling: Sampling) -> Sampler:
    if not sampling.temperature:
        return ARGMAX
    # Each is the first choice of a request of its own, as a server has it.
    seeds = [row_seeds(sampling.seed_of(prompt), [0])[0] for prompt in prompts]
    return Sampled(seeds, warpers(temperature=sampling.temperature, top_p=sampling.top_p))


def _batches(shard: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, so that little of a batch is padding."""
    order = sorted(range(len(shard)), key=lambda i: len(shard[i].ids))
    return (order[at : at + size] for at in range(0, len(order), size))


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
    it was written. Use it as a context: progress is shown while it is open. Raises `UserError` for a folder of another
    run and for a full disk.
    """

    def __init__(self, out: Path, prompts: Sequence[Prompt], size: int, manifest: dict[str, Any], progress: bool):
        self.out, self.prompts, self.size = out, prompts, size
        self.rows = self.tokens = self.cut = 0
        self.left_out: Counter[str] = Counter()
        self.started = time.perf_counter()
        with disk_errors(out):
            _open_folder(out, manifest)
        shards = range(-(-len(prompts) // size))
        self.missing = [index for index in shards if not shard_path(out, index).exists()]
        self.found = len(prompts) - sum(len(self.of(index)) for index in self.missing)
        self._bar = _progress(progress)
        self._task = self._bar.add_task("distill", total=len(prompts), completed=self.found, tokens=0)

    def __enter__(self) -> Shards:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def of(self, index: int) -> Sequence[Prompt]:
        """The prompts of a shard."""
        return self.prompts[index * self.size : (index + 1) * self.size]

    def count(self, answer: list[int], cut: bool) -> None:
        """Counts an answer, for progress and summary."""
        self.rows, self.tokens, self.cut = self.rows + 1, self.tokens + len(answer), self.cut + cut
        self._show()

    def leave_out(self, reason: str) -> None:
        """Counts a prompt without a usable answer."""
        self.left_out[reason] += 1
        self._show()

    def write(self, index: int, answers: Sequence[list[int] | None]) -> None:
        """A whole shard; None where there is no answer."""
        answered = [(p, a) for p, a in zip(self.of(index), answers, strict=True) if a is not None]
        with disk_errors(self.out):
            write_atomic(shard_path(self.out, index), (_line(prompt, answer) for prompt, answer in answered))

    def summary(self, too_long: int) -> Distilled:
        seconds = time.perf_counter() - self.started
        return Distilled(self.rows, self.tokens, self.found, too_long, seconds, self.cut, dict(self.left_out))

    def _show(self) -> None:
        done = self.found + self.rows + self.left_out.total()
        self._bar.update(self._task, completed=done, tokens=self.tokens)


def shard_path(out: Path, index: int) -> Path:
    return out / f"shard-{index:05d}.jsonl"


def known_ids(out: Path, prompts: Sequence[Prompt], size: int) -> str | None:
    """`ids` of the manifest of a folder that has all its shards; None for others."""
    whole = all(shard_path(out, index).exists() for index in range(-(-len(prompts) // size)))
    return (read_manifest(out / MANIFEST) or {}).get("ids", OLDER["ids"]) if whole else None


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
        "prompts_hash": digest(" ".join(prompt.id for prompt in prompts)),
        "versions": versions(),
    }


def _line(prompt: Prompt, answer: list[int]) -> str:
    source = {"source": prompt.source} if prompt.source else {}
    return json.dumps({"id": prompt.id, **source, "prompt_ids": prompt.ids, "answer_ids": answer})


def _open_folder(out: Path, manifest: dict[str, Any]) -> None:
    """Claims the folder for this run, and removes half-written files of a killed one."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists() and any(out.glob("shard-*")):
        raise UserError(f"{out} holds shards but no {MANIFEST}; use another output folder")
    # The prompts' hash says what they are, and any batch size gives the same answers.
    claim(out / MANIFEST, manifest, OLDER, {"source", "batch_size"})
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
