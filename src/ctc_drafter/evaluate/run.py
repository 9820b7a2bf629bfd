"""One measurement for every method: same run, same prompts, same counter, plain decoding as the yardstick."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.generate import DEFAULT_FLOOR, DEFAULT_NODES, Generation, generate, plain_generate
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.evaluate.environment import environment
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.methods import method_of
from ctc_drafter.target import Target
from ctc_drafter.text import decode, encode_conversation, eos_ids
from ctc_drafter.types import UserError

PLAIN = "plain"
STAGES_NOTE = (
    "stages_ms: milliseconds per verification (prefill: per prompt), from one extra timed batch of each task "
    "that enters no other figure"
)

# (prompts as token ids, timed) -> what was generated
Method = Callable[[list[list[int]], bool], Generation]


@dataclass
class Conversation:
    """A prompt at work: its place in the task and plain decoding's answers so far."""

    index: int
    prompt: Prompt
    answers: list[str] = field(default_factory=list)
    skipped: bool = False


@dataclass
class Tally:
    """What one method did on one task. `outputs` maps a prompt's index to its tokens, turn by turn."""

    outputs: dict[int, list[list[int]]] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0
    stages_ms: dict[str, float] = field(default_factory=dict)

    def add(self, indices: Sequence[int], generation: Generation, seconds: float) -> None:
        for index, tokens in zip(indices, generation.tokens, strict=True):
            self.outputs.setdefault(index, []).append(tokens)
        self.stats += generation.stats
        self.seconds += seconds

    @property
    def tokens(self) -> int:
        """Every method's tokens are counted here: all that it returned, eos included."""
        return sum(len(tokens) for turns in self.outputs.values() for tokens in turns)

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Bench:
    """What stays the same over a whole evaluation."""

    target: Target
    tokenizer: PreTrainedTokenizerBase
    methods: dict[str, Method]
    max_new_tokens: int

    def encode(self, conversation: Conversation) -> list[int]:
        answers = conversation.answers
        return encode_conversation(self.tokenizer, conversation.prompt.turns[: len(answers) + 1], answers)

    def fits(self, conversation: Conversation) -> bool:
        """Whether the context holds all turns, should every answer to come use all of `max_new_tokens`."""
        turns, answers = conversation.prompt.turns, conversation.answers
        missing = len(turns) - len(answers)
        blank = ["x"] * (missing - 1)
        prompt = encode_conversation(self.tokenizer, turns, [*answers, *blank])
        return len(prompt) + missing * self.max_new_tokens <= self.target.context

    def ready(self, batch: list[Conversation], turn: int) -> list[Conversation]:
        """The conversations that have this turn; marks and leaves out those that the context cannot hold."""
        for conversation in batch:
            if len(conversation.prompt.turns) > turn and not conversation.skipped:
                conversation.skipped = not self.fits(conversation)
        return [c for c in batch if len(c.prompt.turns) > turn and not c.skipped]

    def measure(self, batch: list[Conversation], order: Sequence[str], tallies: dict[str, Tally]) -> None:
        """All turns of a batch, by every method in this order. Plain decoding's answers are everyone's history."""
        for turn in range(max(len(conversation.prompt.turns) for conversation in batch)):
            rows = self.ready(batch, turn)
            if not rows:
                return
            prompts = [self.encode(conversation) for conversation in rows]
            for name in order:
                start = time.perf_counter()
                generation = self.methods[name](prompts, False)
                seconds = time.perf_counter() - start
                tallies[name].add([conversation.index for conversation in rows], generation, seconds)
            for conversation in rows:
                answer = tallies[PLAIN].outputs[conversation.index][-1]
                conversation.answers.append(decode(self.tokenizer, answer))

    def first_turn(self, prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
        """Token ids of the first batch that fits."""
        conversations = [Conversation(index, prompt) for index, prompt in enumerate(prompts)]
        return [self.encode(c) for c in conversations if self.fits(c)][:batch_size]

    def time_stages(self, prompts: list[list[int]], tallies: dict[str, Tally]) -> None:
        """One more run of each method with the stage timers on, which slow it: for `stages_ms` alone."""
        for name, run in self.methods.items() if prompts else ():
            stats = run(prompts, True).stats
            shares = {stage: len(prompts) if stage == "prefill" else max(1, stats.steps) for stage in stats.stages_ms}
            tallies[name].stages_ms = {stage: ms / shares[stage] for stage, ms in stats.stages_ms.items()}


def decoding_methods(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    nodes: int,
    floor: float,
) -> dict[str, Method]:
    """The methods by name, plain decoding first."""
    eos = eos_ids(target.model, tokenizer)

    def plain(prompts: list[list[int]], timed: bool) -> Generation:
        return plain_generate(target, prompts, max_new_tokens=max_new_tokens, eos=eos, timed=timed)

    def drafted(prompts: list[list[int]], timed: bool) -> Generation:
        return generate(
            target, drafter, prompts, max_new_tokens=max_new_tokens, nodes=nodes, floor=floor, eos=eos, timed=timed
        )

    return {PLAIN: plain, method_of(drafter): drafted}


def evaluate(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    nodes: int = DEFAULT_NODES,
    floor: float = DEFAULT_FLOOR,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures plain and drafted decoding on the first `limit` prompts of each task.

    Both run in turn on each batch, the order alternating, after a warm-up. Returns `{"meta", "rows"}`, a row per
    method and task. `identical` of `compared` prompts have, over all turns, plain decoding's very tokens; `skipped`
    prompts do not fit the target's context. `meta` adds to the meta object. `save` gets the object after every
    batch. After Ctrl-C the object holds what was finished, and `meta["complete"]` is false.
    """
    torch.manual_seed(seed)
    methods = decoding_methods(target, drafter, tokenizer, max_new_tokens=max_new_tokens, nodes=nodes, floor=floor)
    bench = Bench(target, tokenizer, methods, max_new_tokens)
    tasks = [Task(task.name, task.prompts[:limit]) for task in tasks]
    settings = {"dtype": str(target.dtype).removeprefix("torch."), "device": str(target.device), "seed": seed}
    settings |= {
        "threads": torch.get_num_threads(),
        "nodes": nodes,
        "floor": floor,
        "batch_size": batch_size,
        "limit": limit,
    }
    settings |= {"max_new_tokens": max_new_tokens, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    head = {**environment(), **settings, "note": STAGES_NOTE, "complete": False, **(meta or {})}
    result: dict[str, Any] = {"meta": head, "rows": []}
    try:
        for rows in _measured_rows(bench, tasks, batch_size, console or Console(stderr=True)):
            result["rows"] = rows
            if save:
                save(result)
        head["complete"] = True
    except KeyboardInterrupt:
        pass
    if save:
        save(result)
    return result


def _measured_rows(
    bench: Bench, tasks: Sequence[Task], batch_size: int, console: Console
) -> Iterator[list[dict[str, Any]]]:
    """Runs everything; yields the rows known so far after each batch."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done: list[dict[str, Any]] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("warm-up", total=sum(len(task.prompts) for task in tasks))
        warm = next((first for task in tasks if (first := bench.first_turn(task.prompts, batch_size))), [])
        for run in bench.methods.values() if warm else ():
            run(warm, False)
        for task in tasks:
            progress.update(bar, description=task.name)
            tallies = {name: Tally() for name in bench.methods}
            conversations = [Conversation(index, prompt) for index, prompt in enumerate(task.prompts)]
            for start in range(0, len(conversations), batch_size):
                batch = conversations[start : start + batch_size]
                names = list(bench.methods)
                bench.measure(batch, names if start // batch_size % 2 == 0 else names[::-1], tallies)
                progress.advance(bar, len(batch))
                yield done + task_rows(task.name, tallies, conversations[: start + batch_size])
            bench.time_stages(bench.first_turn(task.prompts, batch_size), tallies)
            done = done + task_rows(task.name, tallies, conversations)
            yield done


def task_rows(task: str, tallies: dict[str, Tally], conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """A row of the results for each method."""
    finished = [conversation.index for conversation in conversations if not conversation.skipped]
    plain = tallies[PLAIN]
    rows = []
    for name, tally in tallies.items():
        speed, base = tally.tokens_per_s, plain.tokens_per_s
        stats = tally.stats
        rows.append(
            {
                "method": name,
                "task": task,
                "prompts": len(finished),
                "skipped": len(conversations) - len(finished),
                "tokens": tally.tokens,
                "steps": stats.steps,
                "beta": stats.beta if stats.steps else None,
                "tokens_per_s": speed,
                "gamma": speed / base if speed and base else None,
                "identical": sum(tally.outputs[index] == plain.outputs[index] for index in finished),
                "compared": len(finished),
                "accept_histogram": stats.accept_histogram,
                "stages_ms": tally.stages_ms,
                "seconds": tally.seconds,
            }
        )
    return rows


def check_place(path: Path | None) -> None:
    """Raises `UserError` before the work, not after it, when results cannot be written there."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"cannot write {path}; give a file in a folder that exists")


def write_json(path: Path, value: object) -> None:
    """Writes the whole file or nothing. Raises `UserError` when the place cannot be written."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; give a place that can be written") from error
