"""Batch of one decoding method whose rows join and leave between steps, with events for clients."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import torch

from ctc_drafter.decode.batch import Batch, Method, Step
from ctc_drafter.decode.sampling import PerSequenceSampler, RowErrors, Sampler
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stats, Stopwatch
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.serve.requests import Completion, Logprobs, Node, StepOutput, failure
from ctc_drafter.types import UserError

LOG = logging.getLogger(__name__)
T = TypeVar("T")


def own_sampler(row: SequenceState) -> Sampler:
    assert isinstance(row, Completion)
    return row.sampler


class MethodBatch:
    """Rows decoded by one method; each chooses its tokens by its own `Completion.sampler`. `stats` and `clock` hold
    totals.

    A row that fails is told so and leaves; its neighbours go on as if it had never been there. A drafter that fails is
    left out until the batch is empty, since no answer needs it. Only what fails without it, too, fails for all rows.
    """

    def __init__(self, method: Method):
        self.method = replace(method, config=replace(method.config, sampler=PerSequenceSampler(own_sampler)))
        device = method.target.device
        self.clock = Stopwatch(device, timed=device.type == "cpu")  # a GPU would have to wait for every stage
        self.stats = Stats()
        self.completions: list[Completion] = []
        self.batch = Batch(self.method, self.clock)

    def admit(self, completion: Completion) -> None:
        """Prefills a row and emits its first token. Where the prefill raises, the other rows are as they were."""
        completion.begin = time.perf_counter()
        meant = (UserError, torch.OutOfMemoryError)  # for want of memory it is this row that stays out
        roots, logits = self._with_or_without_drafts(lambda: self.batch.enter([completion]), meant)
        self.completions.append(completion)
        try:
            completion.stats.prefill_seconds = time.perf_counter() - completion.begin
            logprobs = logprobs_of(logits, roots, completion.top)
            completion.stats.tokens += 1
            self.stats.tokens += 1
            text = completion.write(int(roots[0]), logprobs[0] if logprobs else None)
            completion.deliver(
                StepOutput(text, completion.released(), bonus=True, seconds=time.perf_counter() - completion.begin)
            )
        except Exception as error:
            self._fail(completion, error)
        self._leave()

    def step(self) -> int:
        """One verification of every row; returns the tokens that they took. Raises what fails for all of them."""
        step = self._advance()
        if step is None:
            return 0
        tokens, counts = step.acceptance.tokens.tolist(), step.acceptance.counts.tolist()
        before = self.stats.tokens
        for place, completion in enumerate(self.completions):
            try:
                self._write(completion, tokens[place][: counts[place] + 1], step, place)
            except Exception as error:
                self._fail(completion, error)
        self._leave()
        return self.stats.tokens - before

    def _advance(self) -> Step | None:
        """A step of the rows that can take one; None if there is none left."""
        while self.completions:
            try:
                return self._with_or_without_drafts(self.batch.advance)
            except RowErrors as failed:
                for place, error in failed.errors.items():
                    self._fail(self.completions[place], error)
                self.drop()
        return None

    def _with_or_without_drafts(self, work: Callable[[], T], meant: tuple[type[Exception], ...] = ()) -> T:
        """`work` on the batch, which leaves it as it was where it raises; without a drafter if that alone helps.

        meant: errors that have nothing to do with the drafter.
        """
        try:
            return work()
        except Exception as error:
            batch, session = self.batch, self.batch.session if self.batch.rows else None
            drafts = not isinstance(batch.method.drafter if session is None else session, NoDrafter)
            if isinstance(error, (RowErrors, *meant)) or not drafts:
                raise
            if session is None:
                self.batch = Batch(replace(self.method, drafter=NoDrafter()), self.clock)
            else:
                batch.session = NoDrafter()
            try:
                result = work()
            except Exception:
                self.batch = batch
                if session is not None:
                    batch.session = session
                raise
            LOG.error("%d rows go on without drafts", len(self.batch.rows), exc_info=error)
            return result

    def _fail(self, completion: Completion, error: Exception) -> None:
        """The end of one row; `drop` and `_leave` take it out."""
        LOG.error("a row failed behind %d tokens", len(completion.tokens), exc_info=error)
        completion.cancelled = True
        with suppress(Exception):  # what failed may be the telling
            completion.deliver(failure(error))

    def drop(self) -> None:
        """Removes rows whose clients have gone away."""
        self._keep([place for place, completion in enumerate(self.completions) if not completion.cancelled])

    def clear(self) -> list[Completion]:
        """Removes all rows, and returns them."""
        gone, self.completions = self.completions, []
        self.batch = Batch(self.method, self.clock)
        return gone

    def _write(self, completion: Completion, tokens: Sequence[int], step: Step, place: int) -> None:
        path = step.acceptance.path[place, : len(tokens)]
        logprobs: list[Logprobs] = []
        if completion.top is not None:
            # -1 stands for a token that no row is asked for, behind the end of this one; it is not taken.
            written = torch.tensor(tokens, device=path.device).clamp_min(0)
            logprobs = logprobs_of(step.logits[place, path], written, completion.top)
        text, taken = "", 0
        for token in tokens:
            text += completion.write(token, logprobs[taken] if logprobs else None)
            taken += 1
            if completion.over:
                break
        accepted = len(tokens) - 1
        completion.stats.count(accepted, taken)
        self.stats.count(accepted, taken)
        nodes = tree_nodes(step, place) if completion.trace else ()
        seconds = time.perf_counter() - completion.begin
        completion.deliver(
            StepOutput(text, completion.released(), min(accepted, taken), taken == len(tokens), seconds, nodes)
        )

    def _leave(self) -> None:
        for completion in self.completions:
            try:
                if not completion.cancelled and completion.over:
                    completion.deliver(completion.finish())
            except Exception as error:
                self._fail(completion, error)
        self._keep(
            [
                place
                for place, completion in enumerate(self.completions)
                if not (completion.cancelled or completion.over)
            ]
        )

    def _keep(self, places: list[int]) -> None:
        if places:
            self._with_or_without_drafts(lambda: self.batch.keep(places))
        elif self.batch.rows:
            self.batch = Batch(self.method, self.clock)  # an idle server holds no cache
        self.completions = [self.completions[place] for place in places]


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, top: int | None) -> list[Logprobs]:
    """Log-probabilities of tokens `int64 [M]` under logits `[M, V]`, with the `top` most probable; empty without."""
    if top is None:
        return []
    logs = logits.float().log_softmax(-1)
    written = logs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    best = logs.topk(min(top, logs.shape[1]), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Logprobs(own, tuple(zip(*row, strict=True))) for own, row in zip(written, rows, strict=True)]


def tree_nodes(step: Step, place: int) -> tuple[Node, ...]:
    """The tree of one row, without its padding."""
    tree = step.tree
    on_path = set(step.acceptance.path[place].tolist())
    values = (tree.tokens, tree.parents, tree.depths, tree.valid, tree.scores)
    nodes = list(zip(*(value[place].tolist() for value in values), strict=True))
    number: dict[int, int] = {}
    found: list[Node] = []
    for index, (token, parent, depth, valid, score) in enumerate(nodes):
        if valid:
            number[index] = len(found)
            found.append(Node(token, number[parent], depth, math.exp(score), index in on_path))
    return tuple(found)
