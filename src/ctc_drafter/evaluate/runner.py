"""Runs all methods on the same prompts in one run, with plain decoding as the baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Unpack

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import decode, encode_conversation
from ctc_drafter.decode.batch import DecodingConfig, DecodingOptions
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import PROMPT_LOOKUP
from ctc_drafter.evaluate.also import also_contenders
from ctc_drafter.evaluate.methods import Calibration, Contender, contenders_of, decoding, fixed_size, steps_of
from ctc_drafter.evaluate.results import Journal, Record, histogram, row_of
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.provenance import environment
from ctc_drafter.target.model import Target
from ctc_drafter.train.progress import Progress

TIMED = 5  # batches of a task that run once more with a clock on each stage
STAGES_NOTE = (
    "stages_ms: milliseconds per verification (prefill: per prompt), medians of extra timed batches of each task "
    "that enter no other figure"
)


@dataclass
class Conversation:
    """State of a prompt: its index in the task and plain decoding's answers so far."""

    index: int
    prompt: Prompt
    answers: list[str] = field(default_factory=list)
    skipped: bool = False


@dataclass
class Tally:
    """Figures of one method on one prompt, turn by turn."""

    outputs: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Fixed parts of an evaluation. The first contender is plain decoding.

    watched: prompts of each task that run once more to count what trees promised. timed: whether seconds count.
    """

    target: Target
    tokenizer: PreTrainedTokenizerBase
    contenders: Sequence[Contender]
    max_new_tokens: int
    batch_size: int
    watched: int = 0
    timed: bool = True

    def encode(self, conversation: Conversation) -> list[int]:
        prompt, answers = conversation.prompt, conversation.answers
        return encode_conversation(self.tokenizer, prompt.turns[: len(answers) + 1], answers, system=prompt.system)

    def fits(self, conversation: Conversation) -> bool:
        """Whether the context holds all turns."""
        return self.length(conversation) <= self.target.context

    def length(self, conversation: Conversation) -> int:
        """Tokens of all turns, should every answer to come use all of `max_new_tokens`."""
        turns, answers = conversation.prompt.turns, conversation.answers
        missing = len(turns) - len(answers)
        blank = ["x"] * (missing - 1)
        system = conversation.prompt.system
        prompt = encode_conversation(self.tokenizer, turns, [*answers, *blank], system=system)
        return len(prompt) + missing * self.max_new_tokens

    def prepare(self, tasks: Sequence[Task]) -> None:
        """What contenders do before anything is timed: other engines load their weights, and make room for the longest
        text."""
        waiting = [contender.prepare for contender in self.contenders if contender.prepare]
        if not waiting:
            return
        all_prompts = (prompt for task in tasks for prompt in task.prompts)
        lengths = [self.length(Conversation(index, prompt)) for index, prompt in enumerate(all_prompts)]
        longest = max((length for length in lengths if length <= self.target.context), default=0)
        for prepare in waiting if longest else ():
            # Answers are read as text and may have more tokens then.
            prepare(self.batch_size, longest + self.max_new_tokens)

    def ready(self, batch: Sequence[Conversation], turn: int) -> list[Conversation]:
        """The conversations that have this turn; marks and leaves out those that the context cannot hold."""
        for conversation in batch:
            if len(conversation.prompt.turns) > turn and not conversation.skipped:
                conversation.skipped = not self.fits(conversation)
        return [c for c in batch if len(c.prompt.turns) > turn and not c.skipped]

    def measure(self, task: str, batch: Sequence[Conversation], order: Sequence[Contender]) -> list[Record]:
        """All turns of a batch, by every contender in this order. Plain decoding's answers are everyone's history."""
        tallies = {(each.key, c.index): Tally() for each in order for c in batch}
        for turn in range(max(len(conversation.prompt.turns) for conversation in batch)):
            rows = self.ready(batch, turn)
            if not rows:
                break
            prompts = [self.encode(conversation) for conversation in rows]
            for contender in order:
                start = time.perf_counter()
                generation = contender.run(prompts, False, None)
                share = (time.perf_counter() - start) / len(rows) if self.timed else 0.0
                each = zip(rows, generation.tokens, generation.accepted, steps_of(generation), strict=True)
                for row, tokens, accepted, steps in each:
                    tally = tallies[contender.key, row.index]
                    tally.outputs.append(tokens)
                    tally.accepted += accepted
                    tally.steps += steps
                    tally.seconds += share
            for row in rows:
                answer = tallies[self.contenders[0].key, row.index].outputs[-1]
                row.answers.append(decode(self.tokenizer, answer))
        plain = self.contenders[0].key
        return [
            record_of(task, c, each, tallies[each.key, c.index], tallies[plain, c.index])
            for each in self.contenders
            for c in batch
        ]

    def first_turns(self, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
        """Token ids of the first `count` prompts that fit."""
        fitting = filter(self.fits, (Conversation(index, prompt) for index, prompt in enumerate(prompts)))
        return [self.encode(conversation) for conversation, _ in zip(fitting, range(count), strict=False)]

    def look_closer(self, task: Task, contender: Contender) -> dict[str, Any]:
        """Figures from extra, untimed runs: `stages_ms`, `calibration`."""
        found: dict[str, Any] = {"task": task.name, "method": contender.method, "nodes": contender.nodes}
        count = TIMED * self.batch_size
        if self.timed and (prompts := self.first_turns(task.some(count).prompts, count)):
            found["stages_ms"] = self.stages_ms(prompts, contender)
        if self.watched and contender.nodes is not None:
            calibration, prompts = Calibration(), self.first_turns(task.some(self.watched).prompts, self.watched)
            for start in range(0, len(prompts), self.batch_size):
                contender.run(prompts[start : start + self.batch_size], False, calibration)
            found["calibration"] = asdict(calibration)
        return found

    def stages_ms(self, prompts: list[list[int]], contender: Contender) -> dict[str, float]:
        """See `STAGES_NOTE`. Medians: what else the machine does now and then must not count."""
        seen: dict[str, list[float]] = {}
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            stats = contender.run(batch, True, None).stats
            for stage, ms in stats.stages_ms.items():
                seen.setdefault(stage, []).append(ms / (len(batch) if stage == "prefill" else max(1, stats.steps)))
        return {stage: statistics.median(each) for stage, each in seen.items()}


def record_of(task: str, conversation: Conversation, contender: Contender, tally: Tally, plain: Tally) -> Record:
    about = (task, conversation.index, conversation.prompt.id, conversation.prompt.category, *contender.key)
    if conversation.skipped:
        return Record(*about, identical=False, skipped=True)
    return Record(
        *about,
        turns=len(tally.outputs),
        tokens=sum(map(len, tally.outputs)),
        steps=tally.steps,
        seconds=tally.seconds,
        identical=tally.outputs == plain.outputs,
        accepted=histogram(tally.accepted),
    )


def evaluate(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    config: DecodingConfig | None = None,
    also: Sequence[str] = (),
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
    **options: Unpack[DecodingOptions],
) -> dict[str, Any]:
    """Measures plain and drafted decoding on `limit` prompts of each task.

    Trees are as `config` says, or its fields by name. All run in turn on each batch, the order alternating, after a
    warm-up; with a `budget` trees of its choice too, `also` prompt lookup in trees of the same size, and the ways of
    transformers and of other engines, see `also.py`.
    Returns `{"meta", "rows"}`, a row per method and task. `identical` of `compared` prompts have, over all turns, plain
    decoding's very tokens; `skipped` prompts do not fit the target's context. `meta` adds to the meta object. `save`
    gets the object after every batch. After Ctrl-C the object holds what was finished, and `meta["complete"]` is false.
    """
    config = DecodingConfig.of(config, options).without_sampler("all ways are measured greedily")
    made = decoding(target, tokenizer, max_new_tokens)
    contenders = contenders_of(made, drafter, config)
    if PROMPT_LOOKUP in also:
        contenders.append(made.drafted(PROMPT_LOOKUP, PromptLookup(), config.fixed_nodes, fixed_size(config)))
    contenders += also_contenders(made, [name for name in also if name != PROMPT_LOOKUP])
    bench = Bench(target, tokenizer, contenders, max_new_tokens, batch_size)
    settings = {"seed": seed, "nodes": config.fixed_nodes, "floor": config.fixed_floor, "limit": limit}
    result = {"meta": head(bench, settings) | (meta or {}), "rows": []}
    measure_all(bench, [task.some(limit) for task in tasks], result, save=save, console=console)
    return result


def head(bench: Bench, settings: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a results file."""
    target = bench.target
    peers = {contender.method: contender.facts for contender in bench.contenders if contender.facts}
    return {
        **environment(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        "compiled": target.compiled,
        "exact": target.alone,
        "engine": target.engine,
        "batch_size": bench.batch_size,
        "max_new_tokens": bench.max_new_tokens,
        **({"peers": peers} if peers else {}),
        **settings,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "note": STAGES_NOTE,
        "complete": False,
    }


def measure_all(
    bench: Bench,
    tasks: Sequence[Task],
    result: dict[str, Any],
    *,
    journal: Journal | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
) -> None:
    """Fills in `result["rows"]`, saved after each batch; what the journal knows already is not measured again.

    Ctrl-C ends it with what is finished; `result["meta"]["complete"]` says whether that is all.
    """
    torch.manual_seed(result["meta"]["seed"])
    journal = journal or Journal(None, {})
    try:
        for _ in _batches(bench, tasks, journal, console or Console(stderr=True)):
            if save:
                result["rows"] = rows_of(bench, tasks, journal)
                save(result)
        result["meta"]["complete"] = True
    except KeyboardInterrupt:
        pass
    result["rows"] = rows_of(bench, tasks, journal)
    if save:
        save(result)


def _batches(bench: Bench, tasks: Sequence[Task], journal: Journal, console: Console) -> Iterator[None]:
    """Measures all that the journal lacks; yields after each batch."""
    total, tokens = sum(len(task.prompts) for task in tasks), 0
    done = sum(len(journal.done(task.name)) for task in tasks)
    with Progress("warm-up", total, done, transient=True, console=console) as progress:
        bench.prepare(tasks)
        firsts = (bench.first_turns(task.prompts, bench.batch_size) for task in tasks if bench.timed)
        warm = next(filter(None, firsts), [])
        for contender in bench.contenders if warm else ():
            contender.run(warm, False, None)
        for task in tasks:
            progress.update(done, tokens, task.name)
            conversations = [Conversation(index, prompt) for index, prompt in enumerate(task.prompts)]
            measured = journal.done(task.name)
            for number, start in enumerate(range(0, len(conversations), bench.batch_size)):
                batch = conversations[start : start + bench.batch_size]
                if start not in measured:
                    order = list(bench.contenders) if number % 2 == 0 else list(bench.contenders)[::-1]
                    records = bench.measure(task.name, batch, order)
                    tokens += sum(record.tokens for record in records)
                    journal.add(records)
                    yield
                    done += len(batch)
                    progress.update(done, tokens)
            known = {(extra["task"], extra["method"], extra["nodes"]) for extra in journal.extras}
            for contender in bench.contenders:
                if (task.name, *contender.key) not in known:
                    journal.add_extra(bench.look_closer(task, contender))


def rows_of(bench: Bench, tasks: Sequence[Task], journal: Journal) -> list[dict[str, Any]]:
    """A row for each contender and task that was begun."""
    rows = []
    for task in tasks:
        known = [record for record in journal.records if record.task == task.name]
        for contender in bench.contenders if known else ():
            own, plain = ([r for r in known if r.key == key] for key in (contender.key, bench.contenders[0].key))
            row = row_of(task.name, contender.key, own, [record for record in plain if not record.skipped])
            if not bench.timed:  # outputs are plain decoding's from the start, and comparing them would say nothing
                row |= {"identical": 0, "compared": 0}
            for extra in journal.extras:
                if (extra["task"], extra["method"], extra["nodes"]) == (task.name, *contender.key):
                    row |= {name: extra[name] for name in ("stages_ms", "calibration") if name in extra}
            rows.append(row)
    return rows
