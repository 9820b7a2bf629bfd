"""Which rows of a batch an error belongs to: the choice of a token is asked again for each row alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ctc_drafter.decode.choose import Chooser
from ctc_drafter.decode.mixed import taken
from ctc_drafter.decode.rows import Row
from ctc_drafter.types import TokenTree, UserError

T = TypeVar("T")


class RowErrors(Exception):
    """Some rows cannot go on, the others can. errors: what each of them raises, by its place in the batch."""

    def __init__(self, errors: Mapping[int, Exception], rows: Sequence[Row]):
        self.errors = dict(errors)
        place = min(errors)
        self.first = named(errors[place], rows[place])
        super().__init__(str(self.first))


def next_tokens(chooser: Chooser, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """`Chooser.next`. Raises `RowErrors` where single rows fail."""

    def alone(place: int) -> torch.Tensor:
        return chooser.next(logits[place : place + 1], rows[place : place + 1])

    return asked(lambda: chooser.next(logits, rows), alone, rows)


def chosen(chooser: Chooser, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """`Chooser.next`, for a call that ends with the first error: which names its row."""
    try:
        return next_tokens(chooser, logits, rows)
    except RowErrors as failed:
        raise failed.first from failed


def tokens_along(chooser: Chooser, tree: TokenTree, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """`Chooser.along`. Raises `RowErrors` where single rows fail."""

    def alone(place: int) -> torch.Tensor:
        own = taken(tree, torch.tensor([place], device=logits.device))
        return chooser.along(own, logits[place : place + 1], rows[place : place + 1])

    return asked(lambda: chooser.along(tree, logits, rows), alone, rows)


def asked(together: Callable[[], T], alone: Callable[[int], T], rows: Sequence[Row]) -> T:
    """What all rows give together; where that fails, the errors of those that fail alone, or else that one."""
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


def named(error: Exception, row: Row) -> Exception:
    """The same error, which says whose it is."""
    if isinstance(error, UserError):
        return UserError(f"row {row.index}: {error}")
    error.add_note(f"raised when a token of row {row.index} was chosen")
    return error
