"""Which token the target writes next: the argmax or a draw, after all logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ctc_drafter.decode.noise import gumbel, row_seeds, signed
from ctc_drafter.decode.processors import process, refuse_changing, refuse_unsuitable
from ctc_drafter.decode.rows import Row
from ctc_drafter.types import TokenTree, UserError


class Chooser(Protocol):
    """How the target turns logits into tokens."""

    def check(self, row: Row, logits: torch.Tensor) -> None:
        """Raises `UserError` if it cannot serve rows like this one, logits `[1, V]`."""

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """The token `int64 [R]` that follows each row's text, whose logits are `[R, V]`."""

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """The token `int64 [B, 1+N]` that follows each node, logits `[B, 1+N, V]`; -1 where none can be reached."""


class Argmax:
    """Greedy decoding of the logits as they are."""

    def check(self, row: Row, logits: torch.Tensor) -> None:
        return

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return logits.argmax(-1)

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return logits.argmax(-1)


ARGMAX = Argmax()


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding of processed logits."""

    processors: LogitsProcessorList

    def __post_init__(self) -> None:
        refuse_unsuitable(self.processors)

    def check(self, row: Row, logits: torch.Tensor) -> None:
        refuse_changing(self.processors, row, logits)

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return process(self.processors, logits, rows).argmax(-1)

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return walk(tree, logits, rows, self.next)


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

    def check(self, row: Row, logits: torch.Tensor) -> None:
        refuse_changing(self.processors, row, logits)

    def next(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        scores = process(self.processors, logits, rows)
        allowed = scores > float("-inf")
        if not (scores.amax(1) > float("-inf")).all():  # NaN anywhere in a row fails, as in stock sampling
            if logits.isnan().any():
                raise UserError("the target's logits are not numbers (NaN), nothing can be drawn; try another dtype")
            raise UserError("the logits processors left no token to draw; loosen them")
        possible = allowed.any(0).nonzero().squeeze(1)  # after top-k, few need noise
        if len(possible) < scores.shape[1]:
            scores = scores[:, possible]
        seeds = torch.tensor(self._seeds([row.index for row in rows]), device=scores.device)
        positions = torch.tensor([len(row.tokens) for row in rows], device=scores.device)
        return possible[(scores + gumbel(seeds, positions, possible)).argmax(-1)]

    def along(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        return walk(tree, logits, rows, self.next)

    def _seeds(self, indices: Sequence[int]) -> list[int]:
        if isinstance(self.seeds, int):
            return row_seeds(self.seeds, indices)
        if max(indices) >= len(self.seeds):
            raise UserError(f"there are {len(self.seeds)} seeds for at least {max(indices) + 1} rows; give each one")
        return [signed(self.seeds[index]) for index in indices]


def walk(
    tree: TokenTree,
    logits: torch.Tensor,
    rows: Sequence[Row],
    choose: Callable[[torch.Tensor, Sequence[Row]], torch.Tensor],
) -> torch.Tensor:
    """`Chooser.along` for a costly `choose`: it is asked about the nodes on the way only, `[R, V]` a level.

    No row is walked beyond its end, where processors may have no answer.
    """
    ahead = [row.ahead() for row in rows]
    live = torch.arange(len(rows), device=logits.device)
    node = torch.zeros_like(live)
    wanted = torch.full_like(tree.tokens, -1)
    while len(live):
        walkers = [ahead[place] for place in live.tolist()]
        tokens = choose(logits[live, node], walkers)
        wanted[live, node] = tokens
        for row, token in zip(walkers, tokens.tolist(), strict=True):
            row.tokens.append(token)
        below = (tree.parents[live] == node.unsqueeze(1)) & (tree.tokens[live] == tokens.unsqueeze(1))
        below = below & tree.valid[live]
        below[:, 0] = False  # the root is its own parent
        on = below.any(1) & torch.tensor([not row.ended for row in walkers], device=live.device)
        live, node = live[on], below[on].int().argmax(1)
    return wanted


def warpers(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> LogitsProcessorList:
    """What `generate` makes of these settings. Raises `UserError` for those that leave no distribution."""
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}; give more than 0, or decode greedily")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; give a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; give a probability above 0, at most 1")
    chosen = LogitsProcessorList()
    if temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen
