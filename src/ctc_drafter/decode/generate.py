"""The decoding loop: `generate`, `generate_many`, and `plain_generate`, their oracle."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Unpack

import torch
from transformers import Cache, StoppingCriteriaList

from ctc_drafter.decode.batch import Batch, DecodingConfig, DecodingOptions, Method
from ctc_drafter.decode.prefill import prefill, reread
from ctc_drafter.decode.sampling import Sampler, chosen
from ctc_drafter.decode.sequence import OnTokens, OutputWriter, SequenceState
from ctc_drafter.decode.stats import Stats, Stopwatch
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target.cache import compact
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

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

    `config` is a `DecodingConfig`; its fields may be given by name instead: `nodes=32`, `budget=...`. A row ends at an
    `eos`, by default those of the target's generation config, at `max_new_tokens`, or where `criteria` say so; like
    transformers' own `generate` it may go on beyond the context that the target is made for.

    `on_tokens(row, tokens)` is called with what each verification emits. Rows may differ in length and finish
    at different times; a finished row leaves the batch.
    Raises `UserError` for prompts or settings that cannot be decoded.
    """
    method = Method(target, drafter, DecodingConfig.of(config, options))
    return run(method, new_rows(target, prompts, max_new_tokens, eos), criteria, on_tokens, timed)


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
    with clock("prefill"):
        state = prefill(target, prompts)
        sampler.validate(rows[0], state.logits[:1])
    cache, lengths, root, active = state.cache, state.lengths, chosen(sampler, state.logits, rows), rows
    writer = OutputWriter(stats, on_tokens, criteria, target.device)
    places = writer.start(active, root.tolist())
    stats.prefill_seconds = time.perf_counter() - begin
    path = torch.zeros(len(root), 1, dtype=torch.long, device=target.device)

    while places:
        if len(places) < len(active):
            kept = torch.tensor(places, device=target.device)
            cache.batch_select_indices(kept)
            lengths, root, path = lengths[kept], root[kept], path[kept]
            active = [active[place] for place in places]
        with clock("prefill"):
            reread(target, cache, lengths, active)
        with clock("verify"):
            slots = cache.get_seq_length()
            logits = step(target, cache, lengths, root)
        with clock("compact"):
            compact(cache, lengths, slots, path, torch.zeros_like(lengths))
        with clock("accept"):
            lengths, root = lengths + 1, chosen(sampler, logits[:, -1], active)
        places = writer.write(active, root.unsqueeze(1).tolist(), [0] * len(active))

    stats.seconds, stats.stages_ms = time.perf_counter() - begin, dict(clock.total_ms)
    return Generation([row.tokens for row in rows], stats, [row.accepted for row in rows])


def step(target: Target, cache: Cache, lengths: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Logits `[B, 1, V]` after one more token per row. Rows that fill the cache need no mask."""
    tokens, positions, slots = root.unsqueeze(1), lengths.unsqueeze(1), cache.get_seq_length()
    if bool((lengths == slots).all()):
        return target.forward(tokens, positions, cache).logits
    cached = torch.arange(slots, device=lengths.device).expand(len(root), -1)
    seen = torch.cat([cached < positions, torch.ones_like(positions, dtype=torch.bool)], 1)
    return target.forward(tokens, positions, cache, seen.unsqueeze(1), torch.cat([cached, positions], 1)).logits


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
    method = Method(target, drafter, DecodingConfig.of(config, options))
    arriving = (new_rows(target, [prompt], max_new_tokens, eos, place)[0] for place, prompt in enumerate(prompts))
    writer = OutputWriter(Stats(), on_tokens, criteria, target.device)
    return flow(Batch(method, Stopwatch(target.device, False)), writer, arriving, in_flight)


@torch.inference_mode()
def flow(
    batch: Batch, writer: OutputWriter, arriving: Iterator[SequenceState], in_flight: int
) -> Iterator[tuple[int, list[int]]]:
    while True:
        new = list(islice(arriving, in_flight - len(batch.rows)))
        if not new and not batch.rows:
            return
        if new:
            there = len(batch.rows)
            going = writer.start(new, batch.admit(new))
            yield from leave(batch, [*range(there), *(there + place for place in going)])
        if batch.rows:
            tokens, accepted = batch.step().emitted()
            yield from leave(batch, writer.write(batch.rows, tokens, accepted))


def leave(batch: Batch, places: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Removes all rows but those at these places."""
    staying = set(places)
    done = [row for place, row in enumerate(batch.rows) if place not in staying]
    batch.keep(places)
    for row in done:
        yield row.index, row.tokens
