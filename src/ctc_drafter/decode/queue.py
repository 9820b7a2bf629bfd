"""Decodes any number of prompts with a bounded number in flight: a row that ends makes room for the next prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

import torch
from transformers import StoppingCriteriaList

from ctc_drafter.decode.batch import Batch, Method
from ctc_drafter.decode.choose import ARGMAX, Chooser
from ctc_drafter.decode.generate import DEFAULT_FLOOR, DEFAULT_NODES, NO_CRITERIA, new_rows
from ctc_drafter.decode.rows import Row
from ctc_drafter.decode.stats import Stats, Stopwatch
from ctc_drafter.decode.writer import OnTokens, Writer
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError


def generate_many(
    target: Target,
    drafter: Drafter,
    prompts: Iterable[Sequence[int]],
    *,
    in_flight: int = 8,
    max_new_tokens: int,
    nodes: int = DEFAULT_NODES,
    floor: float = DEFAULT_FLOOR,
    eos: Collection[int] = (),
    chooser: Chooser = ARGMAX,
    criteria: StoppingCriteriaList = NO_CRITERIA,
    on_tokens: OnTokens | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (place of the prompt, its new tokens) as rows end; see `generate` for the settings.

    Prompts are read when there is room for them, so they may come from a generator that never ends; every row's
    output is what `generate` gives it. Raises `UserError` for settings and prompts that cannot be decoded.
    """
    if in_flight < 1:
        raise UserError(f"in_flight is {in_flight}; give at least 1")
    method = Method(target, drafter, nodes, floor, chooser)
    arriving = (new_rows(target, [prompt], max_new_tokens, eos, place)[0] for place, prompt in enumerate(prompts))
    writer = Writer(Stats(), on_tokens, criteria, target.device)
    return flow(Batch(method, Stopwatch(target.device, False)), writer, arriving, in_flight)


@torch.inference_mode()
def flow(batch: Batch, writer: Writer, arriving: Iterator[Row], in_flight: int) -> Iterator[tuple[int, list[int]]]:
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
    """Keeps these places; the other rows are done."""
    staying = set(places)
    done = [row for place, row in enumerate(batch.rows) if place not in staying]
    batch.keep(places)
    for row in done:
        yield row.index, row.tokens
