"""The stopping criteria of transformers, asked about each row by itself, and those that cannot be asked so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation import stopping_criteria as stock_criteria

from ctc_drafter.decode.state import snapshot
from ctc_drafter.types import UserError


def end_tokens(criteria: StoppingCriteriaList) -> list[int]:
    """In the order in which they were given."""
    found = (each.eos_token_id.flatten().tolist() for each in criteria if type(each) is EosTokenCriteria)
    return [token for tokens in found for token in tokens]


def fills_up(criteria: StoppingCriteriaList) -> bool:
    """Whether rows that ended are filled up with pad tokens. Otherwise `generate` writes on until all have ended."""
    return any(hasattr(each, "eos_token_id") for each in criteria)


def remaining(criteria: StoppingCriteriaList, scored: bool) -> StoppingCriteriaList:
    """Without those that rows know themselves. scored: whether `generate` would show the scores to them."""
    kept = [each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
    return StoppingCriteriaList([Unscored(each) for each in kept] if scored else kept)


class NoScores:
    """Stands for the scores, which rows of a token tree cannot show to criteria while they are decoded."""

    def refuse(self, *_: Any) -> NoReturn:
        raise UserError("speculate shows no scores to stopping criteria; leave out output_scores, or that criterion")

    __getitem__ = __iter__ = __len__ = __bool__ = __getattr__ = refuse


@dataclass(frozen=True)
class Unscored(StoppingCriteria):
    """A criterion that would see scores in stock `generate`: raises `UserError` when it looks at them."""

    criterion: StoppingCriteria

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return self.criterion(input_ids, NoScores(), **options)


def refuse_criteria(criteria: Iterable[StoppingCriteria], input_ids: torch.Tensor) -> None:
    """Raises `UserError` for criteria of a batch `int64 [B, T]` that are no function of each row's text.

    Rows of a batch advance by different numbers of tokens, so each is asked about alone. A single row is asked about
    token by token, as `generate` does it: there criteria may count, or answer as they like.
    """
    if len(input_ids) < 2:
        return
    texts = torch.cat([input_ids, input_ids[:, -1:]], 1)  # no criterion is ever asked about a prompt alone
    for criterion in criteria:
        if type(criterion).__module__ == stock_criteria.__name__:
            continue
        alone = [criterion(text.unsqueeze(0), None) for text in texts]
        before = snapshot(criterion)
        again = criterion(texts[-1:].clone(), None)
        if snapshot(criterion) != before or bool(again) != bool(alone[-1]):
            raise UserError(
                f"{type(criterion).__name__} keeps a state; make it a function of a row's text, or give one row"
            )
        together = criterion(texts.clone(), None)
        rows = together.flatten().tolist() if isinstance(together, torch.Tensor) and together.dim() else [together]
        if [bool(row) for row in rows] != [bool(row) for row in alone]:
            raise UserError(
                f"{type(criterion).__name__} does not answer for each row by itself; "
                "return a bool tensor with a value for each row, or give one row"
            )
