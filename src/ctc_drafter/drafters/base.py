"""What decoding asks of a drafter. Every method of this project sits behind these two protocols."""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch
from torch import nn

from ctc_drafter.types import Candidates, UserError


def refuse_call(drafter: object, *_given: object, **_options: object) -> NoReturn:
    """`__call__` of drafters: `generate` calls what stands in `custom_generate`, and ignores what cannot be called.

    Raises `UserError`.
    """
    name = type(drafter).__name__
    raise UserError(
        f"a {name} cannot be called; write custom_generate=speculate(drafter), from ctc_drafter import speculate"
    )


class DraftSession(Protocol):
    """A drafter at work on one batch. It owns whatever cache it keeps; rows keep their order."""

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Takes in tokens that have entered the target's cache.

        tokens `int64 [B, T]` and features `[B, T, K]` are left-aligned; row b has `counts[b]` of them.
        """

    def propose(self, root: torch.Tensor, nodes: int, floor: float) -> Candidates:
        """Prefixes after root `int64 [B]`, enough for a tree of `nodes` nodes of probability `floor` and more."""

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Adds rows behind those that are there, with these tokens to start with, as in `extend`. Where it raises, as
        when memory does not suffice, nothing has changed."""

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch, `int64 [R]`, in this order. Not asked before the first `extend`."""


class Drafter(Protocol):
    """A drafter that is loaded but not yet at work."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Target blocks whose outputs it reads, counted from 0; empty when it needs none."""

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """A new session that uses the target's frozen embedding and LM head modules."""
