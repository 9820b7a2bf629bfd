"""Greedy and sampled token selection, per-sequence samplers, counter-based Gumbel noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, TypeVar

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ctc_drafter.decode.argmax import most_probable
from ctc_drafter.decode.processors import process, refuse_changing, refuse_unsuitable
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.types import TokenTree, UserError

# Greedy and sampled token selection, after all logits processors.


class Sampler(Protocol):
    """Sampler protocol: the target's logits to tokens."""

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        """Raises `UserError` if it cannot serve rows like this one, logits `[1, V]`."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        """The token `int64 [R]` that follows each row's text, whose logits are `[R, V]`."""

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        """The token `int64 [B, 1+N]` that follows each node, logits `[B, 1+N, V]`; -1 where none can be reached."""


class Argmax:
    """Greedy decoding of the logits as they are."""

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        return

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return most_probable(logits)

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return most_probable(logits)


ARGMAX = Argmax()


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding of processed logits."""

    processors: LogitsProcessorList

    def __post_init__(self) -> None:
        refuse_unsuitable(self.processors)

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        refuse_changing(self.processors, row, logits)

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return most_probable(process(self.processors, logits, rows))

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return walk(tree, logits, rows, self.sample)


@dataclass(frozen=True)
class Sampled:
    """Draws from the softmax of processed logits, by the argmax of logits plus Gumbel noise.

    seeds: one for each row of the call, or a single one from which theirs are made. The noise is a function of
    the row's seed, the index of the token in the row's output, and the token id. So the token at an index is the
    same whatever was drafted: a row's output is a function of its seed and prompt, and equals that of plain sampled
    decoding with the same seed. All nodes of one depth share their noise, which changes no distribution: only one of
    them is followed, the noise of its index has met no choice before, and the tree was built without looking at it.

    Sums of logits and noise move little when logits are rounded differently; so two forwards that differ by rounding
    choose the same token almost always, which cannot be said of draws from cumulated probabilities.
    """

    seeds: int | Sequence[int]
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)

    def __post_init__(self) -> None:
        refuse_unsuitable(self.processors)

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        refuse_changing(self.processors, row, logits)

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        scores = process(self.processors, logits, rows)
        best = scores.amax(1)
        if not (best > float("-inf")).all():  # NaN anywhere in a row fails, as in stock sampling
            if logits.isnan().any():
                raise UserError("the target's logits are not numbers (NaN), nothing can be drawn; try another dtype")
            raise UserError("the logits processors left no token to draw; loosen them")
        seeds = torch.tensor(self._seeds([row.index for row in rows]), device=scores.device)
        positions = torch.tensor([len(row.tokens) for row in rows], device=scores.device)
        return gumbel_argmax(scores, best, streams(seeds, positions))

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return walk(tree, logits, rows, self.sample)

    def _seeds(self, indices: Sequence[int]) -> list[int]:
        if isinstance(self.seeds, int):
            return row_seeds(self.seeds, indices)
        if max(indices) >= len(self.seeds):
            raise UserError(f"there are {len(self.seeds)} seeds for at least {max(indices) + 1} rows; give each one")
        return [signed(self.seeds[index]) for index in indices]


def gumbel_argmax(scores: torch.Tensor, best: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The argmax of scores `[R, V]` plus Gumbel noise of the streams `own int64 [R]`; best `[R]`: the largest scores.

    On a CPU noise is computed only where it may decide; the choice is the same.
    """
    if scores.device.type == "cpu" and bool((best < float("inf")).all()):
        from ctc_drafter.decode import tree_cpu

        rows, tokens = tree_cpu.contenders(scores, best, own)
        totals = scores[rows, tokens] + noise(own[rows], tokens)
        return tree_cpu.first_best(rows, tokens, totals, len(scores))
    possible = (scores > float("-inf")).any(0).nonzero().squeeze(1)  # after top-k, few need noise
    if len(possible) < scores.shape[1]:
        scores = scores[:, possible]
    return possible[(scores + noise(own.unsqueeze(1), possible)).argmax(-1)]


def walk(
    tree: TokenTree,
    logits: torch.Tensor,
    rows: Sequence[SequenceState],
    choose: Callable[[torch.Tensor, Sequence[SequenceState]], torch.Tensor],
) -> torch.Tensor:
    """`Sampler.sample_tree` for a costly `choose`: it is asked about the nodes on the way only, `[R, V]` a level.

    No row is walked beyond its end, where processors may have no answer.
    """
    ahead = [row.ahead() for row in rows]
    live = torch.arange(len(rows), device=logits.device)
    node = torch.zeros_like(live)
    target_tokens = torch.full_like(tree.tokens, -1)
    while len(live):
        walkers = [ahead[place] for place in live.tolist()]
        tokens = choose(logits[live, node], walkers)
        target_tokens[live, node] = tokens
        for row, token in zip(walkers, tokens.tolist(), strict=True):
            row.tokens.append(token)
        below = (tree.parents[live] == node.unsqueeze(1)) & (tree.tokens[live] == tokens.unsqueeze(1))
        below = below & tree.valid[live]
        below[:, 0] = False  # the root is its own parent
        on = below.any(1) & torch.tensor([not row.ended for row in walkers], device=live.device)
        live, node = live[on], below[on].int().argmax(1)
    return target_tokens


def warpers(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> LogitsProcessorList:
    """Logits warpers of `generate` for these settings. Raises `UserError` for those that leave no distribution."""
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}; give more than 0, or decode greedily")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; give a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; give a probability above 0, at most 1")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p is {min_p}; give a probability, or 0 for none")
    chosen = LogitsProcessorList()
    if temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    if min_p:
        chosen.append(MinPLogitsWarper(min_p))
    return chosen


@dataclass(frozen=True)
class ModelSampling:
    """What a model's generation config says of sampling. temperature: 0 where it does not ask for sampling, and the
    other settings of sampling are neutral then. repetition_penalty: 1 for none; it goes for greedy decoding, too."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, model: object) -> ModelSampling:
        config = getattr(model, "generation_config", None)

        def stated(name: str, neutral: float) -> float:
            value = getattr(config, name, None)
            return neutral if value is None else float(value)

        penalty = stated("repetition_penalty", 1.0)
        if not getattr(config, "do_sample", None):
            return cls(repetition_penalty=penalty)
        sampling = {"top_p": stated("top_p", 1.0), "min_p": stated("min_p", 0.0), "repetition_penalty": penalty}
        return cls(stated("temperature", 1.0), int(stated("top_k", 0)), **sampling)


# Samplers per sequence of one batch.

Ask = Callable[[Sampler, torch.Tensor, Sequence[SequenceState]], torch.Tensor]


@dataclass(frozen=True)
class PerSequenceSampler:
    """A `Sampler`: `of(row)` chooses for that row. Rows of the same sampler go through it together."""

    of: Callable[[SequenceState], Sampler]

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        self.of(row).validate(row, logits)

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return self._each(rows, logits.device, lambda own, places, some: own.sample(logits[places], some))

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return self._each(
            rows, logits.device, lambda own, places, some: own.sample_tree(taken(tree, places), logits[places], some)
        )

    def _each(self, rows: Sequence[SequenceState], device: torch.device, ask: Ask) -> torch.Tensor:
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(id(self.of(row)), []).append(place)
        answers = []
        for places in groups.values():
            some = [rows[place] for place in places]
            answers.append(ask(self.of(some[0]), torch.tensor(places, device=device), some))
        order = torch.tensor([place for places in groups.values() for place in places], device=device)
        return torch.cat(answers)[order.argsort()]


def taken(tree: TokenTree, places: torch.Tensor) -> TokenTree:
    """The trees of these rows of the batch."""
    return TokenTree(*(getattr(tree, field.name)[places] for field in fields(tree)))


# Counter-based random numbers: a pure function of a row's seed, the emitted position and the token.
#
# A counter instead of a generator, so that a token's draw does not depend on how many were made before it, in which
# batch, or for which nodes of a tree (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). The mixing
# function is splitmix64's (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).


def signed(word: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


STEP = signed(0x9E3779B97F4A7C15)
FIRST, SECOND = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)
BITS = 52  # half a step above every multiple of 2**-52 is a float64, and neither 0 nor 1


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 `[R, C]`: see `uniform`."""
    return noise(streams(seeds, positions).unsqueeze(1), tokens)


def noise(streams: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, of tokens in streams, `int64` each, of shapes that fit."""
    return -torch.log(-torch.log(fractions(streams, tokens)))


def uniform(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Uniform on (0, 1), float64 `[R, C]`, for seeds and positions `int64 [R]` and token ids `int64 [C]`.

    All integer arithmetic, modulo 2**64: the same on every device.
    """
    return fractions(streams(seeds, positions).unsqueeze(1), tokens)


def streams(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The stream of each row's next token, `int64 [R]`."""
    return mix(mix(seeds) + (positions + 1) * STEP)


def fractions(streams: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    words = mix(streams + (tokens + 1) * STEP)
    return (shifted(words, 64 - BITS).double() + 0.5) * 2.0**-BITS


def mix(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ shifted(words, 30)) * FIRST
    words = (words ^ shifted(words, 27)) * SECOND
    return words ^ shifted(words, 31)


def shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts right and fills with zeros; `>>` would repeat the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def row_seeds(seed: int, rows: Sequence[int]) -> list[int]:
    """Seeds of the rows, derived from one seed."""
    return mix(mix(torch.tensor(signed(seed))) + (torch.tensor(rows, dtype=torch.long) + 1) * STEP).tolist()


# Attributes errors of a sampler to rows: tokens are chosen again for each row alone.

T = TypeVar("T")


class RowErrors(Exception):
    """Errors of single rows; the others can continue. errors: what each of them raises, by its place in the batch."""

    def __init__(self, errors: Mapping[int, Exception], rows: Sequence[SequenceState]):
        self.errors = dict(errors)
        place = min(errors)
        self.first = named(errors[place], rows[place])
        super().__init__(str(self.first))


def next_tokens(sampler: Sampler, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
    """`Sampler.sample`. Raises `RowErrors` where single rows fail."""

    def alone(place: int) -> torch.Tensor:
        return sampler.sample(logits[place : place + 1], rows[place : place + 1])

    return asked(lambda: sampler.sample(logits, rows), alone, rows)


def chosen(sampler: Sampler, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
    """`Sampler.sample`, for a call that ends with the first error: which names its row."""
    try:
        return next_tokens(sampler, logits, rows)
    except RowErrors as failed:
        raise failed.first from failed


def tokens_along(
    sampler: Sampler, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]
) -> torch.Tensor:
    """`Sampler.sample_tree`. Raises `RowErrors` where single rows fail."""

    def alone(place: int) -> torch.Tensor:
        own = taken(tree, torch.tensor([place], device=logits.device))
        return sampler.sample_tree(own, logits[place : place + 1], rows[place : place + 1])

    return asked(lambda: sampler.sample_tree(tree, logits, rows), alone, rows)


def asked(together: Callable[[], T], alone: Callable[[int], T], rows: Sequence[SequenceState]) -> T:
    """The result for all rows together; where that fails, `RowErrors` of the rows that fail alone."""
    try:
        return together()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        errors: dict[int, Exception] = {}
        for place in range(len(rows)):
            try:
                alone(place)
            except Exception as own:
                errors[place] = own
        if not errors:
            raise
        raise RowErrors(errors, rows) from error


def named(error: Exception, row: SequenceState) -> Exception:
    """The same error with the row's number in its message."""
    if isinstance(error, UserError):
        return UserError(f"row {row.index}: {error}")
    error.add_note(f"raised when a token of row {row.index} was chosen")
    return error
