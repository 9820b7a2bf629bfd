"""The decoding loop: `generate`, `generate_many`, and plain decoding, their oracle: `plain_generate(_many)`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Unpack

import torch
from transformers import Cache, StoppingCriteriaList

from ctc_drafter.decode.batch import Batch, DecodingConfig, DecodingOptions, Method
from ctc_drafter.decode.prefill import Beginning, beginning, check_prompts, prefill, prefill_groups, reread
from ctc_drafter.decode.profile import settled
from ctc_drafter.decode.sampling import Sampler, chosen
from ctc_drafter.decode.sequence import OnTokens, OutputWriter, SequenceState
from ctc_drafter.decode.stats import Stats, Stopwatch
from ctc_drafter.decode.tree import build_tree
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target.cache import add_rows, compact, gap_free_order, keep_rows, placed, shorten, takes_places
from ctc_drafter.target.model import Target
from ctc_drafter.target.row_cache import RowCache
from ctc_drafter.target.threads import one_thread_beside
from ctc_drafter.types import Candidates, UserError

# The decoding loop, and plain decoding, which is its oracle.

NO_CRITERIA = StoppingCriteriaList()
OnLogits = Callable[[Sequence[SequenceState], torch.Tensor], None]


@dataclass(frozen=True)
class Generation:
    """tokens: the new tokens of each row, eos included where it was written. stats: see `Stats`.

    accepted: of each row, how many drafted tokens each of its verifications accepted.
    """

    tokens: list[list[int]]
    stats: Stats
    accepted: list[list[int]] = field(default_factory=list)


def generate(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    config: DecodingConfig | None = None,
    eos: Collection[int] | None = None,
    criteria: StoppingCriteriaList = NO_CRITERIA,
    on_tokens: OnTokens | None = None,
    timed: bool = False,
    **options: Unpack[DecodingOptions],
) -> Generation:
    """The target's continuation of each prompt, drafted in trees and verified.

    `config` is a `DecodingConfig`; its fields may be given by name instead: `nodes=32`, `budget=...`. Trees are as
    large as pays unless it says otherwise; the first call measures step times, see `profile.settled`. A row ends at an
    `eos`, by default those of the target's generation config, at `max_new_tokens`, or where `criteria` say so; like
    transformers' own `generate` it may go on beyond the context that the target is made for.

    `on_tokens(row, tokens)` is called with what each verification emits. Rows may differ in length and finish
    at different times; a finished row leaves the batch.
    Raises `UserError` for prompts or settings that cannot be decoded.
    """
    method = Method(target, drafter, DecodingConfig.of(config, options))
    rows = new_rows(target, prompts, max_new_tokens, eos)
    return run(settled(method, len(rows)), rows, criteria, on_tokens, timed)


@torch.inference_mode()
def run(
    method: Method,
    rows: Sequence[SequenceState],
    criteria: StoppingCriteriaList = NO_CRITERIA,
    on_tokens: OnTokens | None = None,
    timed: bool = False,
    on_logits: OnLogits | None = None,
) -> Generation:
    """Decodes rows that start together until all of them are done; see `generate`.

    `on_logits(rows, logits [R, 1+D, V])` is told, before they are emitted, what tokens were chosen from: of a row's
    first logits as many count as it emits.
    """
    device = method.target.device
    begin, clock, stats = time.perf_counter(), Stopwatch(device, timed), Stats()
    batch, writer = Batch(method, clock), OutputWriter(stats, on_tokens, criteria, device)
    first, logits = batch.enter(rows)
    if on_logits is not None:
        on_logits(rows, logits.unsqueeze(1))
    batch.keep(writer.start(rows, first.tolist()))
    stats.prefill_seconds = time.perf_counter() - begin
    while batch.rows:
        step = batch.step()
        if on_logits is not None:
            on_logits(batch.rows, step.emitted_logits())
        batch.keep(writer.write(batch.rows, *step.emitted()))
    stats.seconds, stats.stages_ms = time.perf_counter() - begin, dict(clock.total_ms)
    return Generation([row.tokens for row in rows], stats, [row.accepted for row in rows])


@torch.inference_mode()
def plain_generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    config: DecodingConfig | None = None,
    sampler: Sampler | None = None,
    eos: Collection[int] | None = None,
    criteria: StoppingCriteriaList = NO_CRITERIA,
    on_tokens: OnTokens | None = None,
    timed: bool = False,
) -> Generation:
    """A token a step, with the same kernel, cache, choice and stopping rules as `generate`.

    Of the config only the sampler counts; one given by name comes first.
    """
    sampler = DecodingConfig.of(config, {} if sampler is None else {"sampler": sampler}).sampler
    rows = new_rows(target, prompts, max_new_tokens, eos)
    begin, clock, stats = time.perf_counter(), Stopwatch(target.device, timed), Stats()
    batch, writer = PlainBatch(target, sampler, clock), OutputWriter(stats, on_tokens, criteria, target.device)
    check_prompts(target, prompts)
    batch.keep(writer.start(rows, batch.admit(rows)))
    stats.prefill_seconds = time.perf_counter() - begin
    while batch.rows:
        batch.keep(writer.write(batch.rows, *batch.step().emitted()))
    stats.seconds, stats.stages_ms = time.perf_counter() - begin, dict(clock.total_ms)
    return Generation([row.tokens for row in rows], stats, [row.accepted for row in rows])


@dataclass(frozen=True)
class PlainStep:
    """One token more for every row, `int64 [B]`."""

    tokens: torch.Tensor

    def emitted(self) -> tuple[list[list[int]], list[int]]:
        """Tokens to emit, as `Step.emitted`: no drafted one is accepted."""
        return self.tokens.unsqueeze(1).tolist(), [0] * len(self.tokens)


class PlainBatch:
    """Rows that are decoded a token a step, and may come and go between steps as those of a `Batch`.

    A row that leaves makes its place in the cache free for the next one, without a copy of the others; the cache is as
    wide as its longest row.
    """

    cache: Cache | RowCache
    lengths: torch.Tensor  # committed tokens, int64 [B]
    root: torch.Tensor  # newest tokens, int64 [B]

    def __init__(self, target: Target, sampler: Sampler, clock: Stopwatch):
        self.target, self.sampler, self.clock = target, sampler, clock
        self.rows: list[SequenceState] = []
        self.begun: Beginning | None = None  # what rows began with lately

    def admit(self, rows: Sequence[SequenceState]) -> list[int]:
        """Prefills new rows, which take the last places, in groups that are little padded; returns their first
        tokens."""
        return [token for group in prefill_groups(rows) for token in self._enter(group)]

    def _enter(self, rows: Sequence[SequenceState]) -> list[int]:
        prompts = [row.prompt for row in rows]
        with one_thread_beside(self.target), self.clock("prefill"):
            check_prompts(self.target, prompts, rows[0].index)
            begun = beginning(self.target, prompts, self.begun)
            self.begun = begun or self.begun
            state = prefill(self.target, prompts, first=rows[0].index, begun=begun)
            self.sampler.validate(rows[0], state.logits[:1])
            root = chosen(self.sampler, state.logits, rows)
            if self.rows:
                add_rows(self.cache, state.cache)
                self.lengths = torch.cat([self.lengths, state.lengths])
                self.root = torch.cat([self.root, root])
            else:
                self.cache, self.lengths, self.root = state.cache, state.lengths, root
        self.rows += rows
        return root.tolist()

    def keep(self, places: Sequence[int]) -> None:
        """Leaves only these places of the batch; the last rows take the places of those that leave."""
        if len(places) == len(self.rows):
            return
        order = gap_free_order(places)
        self.rows = [self.rows[place] for place in order]
        if self.rows:
            keep_rows(self.cache, order)
            kept = torch.tensor(order, device=self.root.device)
            self.lengths, self.root = self.lengths[kept], self.root[kept]

    def step(self) -> PlainStep:
        """One token more for every row."""
        with one_thread_beside(self.target):
            with self.clock("prefill"):
                reread(self.target, self.cache, self.lengths, self.rows)
            with self.clock("verify"):
                logits = step(self.target, self.cache, self.lengths, self.root)
            with self.clock("accept"):
                self.lengths, self.root = self.lengths + 1, chosen(self.sampler, logits[:, -1], self.rows)
        return PlainStep(self.root)


def step(target: Target, cache: Cache | RowCache, lengths: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Logits `[B, 1, V]` after one more token per row, which enters the cache. A row that fills it alone needs no mask.
    Several always have one: only then transformers makes rows of the heads that share keys (`layout.grouped_heads`)."""
    if isinstance(cache, RowCache):
        logits = cache.verify(target, build_tree(root, Candidates.nothing(root), 0)).logits
        cache.commit([0] * len(root))
        return logits
    tokens, positions, slots = root.unsqueeze(1), lengths.unsqueeze(1), cache.get_seq_length()
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    moves = not takes_places(cache)
    if longest < slots and not moves:  # the longest row has left
        shorten(cache, longest)
        slots = longest
    if shortest == slots and len(root) == 1:
        return target.forward(tokens, positions, cache).logits
    if moves:
        cached = torch.arange(slots, device=lengths.device).expand(len(root), -1)
        seen = torch.cat([cached < positions, torch.ones_like(positions, dtype=torch.bool)], 1)
        key_positions = torch.cat([cached, positions], 1)
        logits = target.forward(tokens, positions, cache, seen.unsqueeze(1), key_positions).logits
        compact(cache, lengths, slots, torch.zeros_like(positions), torch.zeros_like(lengths))
        return logits
    key_positions = torch.arange(longest + 1, device=lengths.device).expand(len(root), -1)
    seen = (key_positions <= positions).unsqueeze(1)
    if shortest == slots:  # all as long as the cache
        return target.forward(tokens, positions, cache, seen, key_positions).logits
    with placed(cache, positions, longest + 1):
        return target.forward(tokens, positions, cache, seen, key_positions).logits


def new_rows(
    target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Collection[int] | None, first: int = 0
) -> list[SequenceState]:
    """Rows with room for `max_new_tokens`, ending at `eos`, or where the target's answers end without one.

    Raises `UserError` where the target has no positions for them.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    if isinstance(eos, int):
        raise UserError(f"eos is {eos}; give a list of tokens, such as [{eos}]")
    ends = target.end_tokens if eos is None else frozenset(eos)
    rows = [SequenceState(first + place, prompt, max_new_tokens, ends) for place, prompt in enumerate(prompts)]
    check_room(rows, target.limit)
    return rows


def check_room(rows: Sequence[SequenceState], limit: int) -> None:
    """Raises `UserError` for rows whose prompt and answer need more positions than the target has.

    The last token that is written is never read, and needs none.
    """
    for row in rows:
        if len(row.prompt) + row.limit - 1 > limit:
            raise UserError(
                f"prompt {row.index} has {len(row.prompt)} tokens and may get {row.limit} more, but the target has "
                f"{limit} positions; ask for at most {max(0, limit + 1 - len(row.prompt))} new tokens, or shorten it"
            )


# Decodes any number of prompts with a bounded number in flight: a row that ends makes room for the next prompt.


def generate_many(
    target: Target,
    drafter: Drafter,
    prompts: Iterable[Sequence[int]],
    *,
    in_flight: int = 8,
    max_new_tokens: int,
    config: DecodingConfig | None = None,
    eos: Collection[int] | None = None,
    criteria: StoppingCriteriaList = NO_CRITERIA,
    on_tokens: OnTokens | None = None,
    **options: Unpack[DecodingOptions],
) -> Iterator[tuple[int, list[int]]]:
    """Yields (place of the prompt, its new tokens) as rows end; see `generate` for the settings.

    Prompts are read when there is room for them, so they may come from a generator that never ends; every row's
    output is what `generate` gives it. Raises `UserError` for settings and prompts that cannot be decoded.
    """
    if in_flight < 1:
        raise UserError(f"in_flight is {in_flight}; give at least 1")
    method = settled(Method(target, drafter, DecodingConfig.of(config, options)), in_flight)
    arriving = (new_rows(target, [prompt], max_new_tokens, eos, place)[0] for place, prompt in enumerate(prompts))
    writer = OutputWriter(Stats(), on_tokens, criteria, target.device)
    return flow(Batch(method, Stopwatch(target.device, False)), writer, arriving, in_flight)


def plain_generate_many(
    target: Target,
    prompts: Iterable[Sequence[int]],
    *,
    in_flight: int = 32,
    max_new_tokens: int,
    config: DecodingConfig | None = None,
    sampler: Sampler | None = None,
    eos: Collection[int] | None = None,
    criteria: StoppingCriteriaList = NO_CRITERIA,
    on_tokens: OnTokens | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Plain decoding of any number of prompts, `in_flight` of them at a time: `generate_many` without a drafter.

    Yields (place of the prompt, its new tokens) as rows end; every row's output is what `plain_generate` gives it.
    `WINDOW` prompts are read ahead, so that those of like length are together, and new ones start when an eighth of the
    batch is free. Raises `UserError` for settings and prompts that cannot be decoded.
    """
    if in_flight < 1:
        raise UserError(f"in_flight is {in_flight}; give at least 1")
    sampler = DecodingConfig.of(config, {} if sampler is None else {"sampler": sampler}).sampler
    arriving = (new_rows(target, [prompt], max_new_tokens, eos, place)[0] for place, prompt in enumerate(prompts))
    batch = PlainBatch(target, sampler, Stopwatch(target.device, False))
    writer = OutputWriter(Stats(), on_tokens, criteria, target.device)
    return flow(batch, writer, by_length(arriving), in_flight, -(-in_flight // 8))


WINDOW = 256  # prompts


def by_length(rows: Iterator[SequenceState]) -> Iterator[SequenceState]:
    """The same rows with those of like length together, up and down in turns; not by number of all rows, which may have
    no end."""
    falling = False
    while window := list(islice(rows, WINDOW)):
        yield from sorted(window, key=lambda row: len(row.prompt), reverse=falling)
        falling = not falling


@torch.inference_mode()
def flow(
    batch: Batch | PlainBatch,
    writer: OutputWriter,
    arriving: Iterator[SequenceState],
    in_flight: int,
    least: int = 1,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (number, tokens) of rows as they end; new ones enter when there is room for at least so many."""
    while True:
        free = in_flight - len(batch.rows)
        new = list(islice(arriving, free)) if free >= least or not batch.rows else []
        if not new and not batch.rows:
            return
        if new:
            there = len(batch.rows)
            going = writer.start(new, batch.admit(new))
            yield from leave(batch, [*range(there), *(there + place for place in going)])
        if batch.rows:
            tokens, accepted = batch.step().emitted()
            yield from leave(batch, writer.write(batch.rows, tokens, accepted))


def leave(batch: Batch | PlainBatch, places: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Removes all rows but those at these places."""
    staying = set(places)
    done = [row for place, row in enumerate(batch.rows) if place not in staying]
    batch.keep(places)
    for row in done:
        yield row.index, row.tokens
