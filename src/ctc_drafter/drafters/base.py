"""The drafter and session protocols, the base of trained sessions, and a drafter that proposes nothing."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import nn

from ctc_drafter.types import Candidates, UserError

# What comes next: (prefixes int64 [B, W, u], the root first; their places in the level above, int64 [B, W], None for
# the root) -> float32 logits of the next token [B, W, V], or [B, 1, V] when they are the same for all
Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
LONGEST_PENDING = 256  # tokens of a row that wait for the next draft; features of more would fill memory


def refuse_call(drafter: object, *_given: object, **_options: object) -> NoReturn:
    """`__call__` of drafters: `generate` calls what stands in `custom_generate`, and ignores what cannot be called.

    Raises `UserError`.
    """
    name = type(drafter).__name__
    raise UserError(
        f"a {name} cannot be called; write custom_generate=speculate(drafter), from ctc_drafter import speculate"
    )


class DraftSession(Protocol):
    """A drafter's state for one batch. It owns whatever cache it keeps; rows keep their order."""

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Takes in tokens that have entered the target's cache.

        tokens `int64 [B, T]` and features `[B, T, K]` are left-aligned; row b has `counts[b]` of them.
        """

    def free(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates | None:
        """What `propose` would give where that takes next to no time, such as copies; else None."""

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """Prefixes after root `int64 [B]`, enough for a tree of `nodes` nodes of probability `min_probability` and
        more."""

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Adds rows behind those that are there, with these tokens to start with, as in `extend`. Where it raises, as
        when memory does not suffice, nothing has changed."""

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch, `int64 [R]`, in this order. Not asked before the first `extend`."""


class Drafter(Protocol):
    """A loaded drafter; `begin` opens a session for a batch."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Target blocks whose outputs it reads, counted from 0; empty when it needs none."""

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """A new session that uses the target's frozen embedding and LM head modules."""


class NoDrafter:
    """A drafter that proposes nothing: plain decoding in a batch whose rows join and leave.

    It is its own session, since there is nothing to remember.
    """

    feature_layers: tuple[int, ...] = ()

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> NoDrafter:
        return self

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        return

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        return

    def select(self, rows: torch.Tensor) -> None:
        return

    def free(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates | None:
        return None

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        return Candidates.nothing(root)


@dataclass(frozen=True)
class Committed:
    """Tokens that have entered the target's cache: the arguments of `DraftSession.extend`."""

    tokens: torch.Tensor
    features: torch.Tensor | None
    counts: torch.Tensor

    def select(self, rows: torch.Tensor) -> Committed:
        features = None if self.features is None else self.features[rows]
        return Committed(self.tokens[rows], features, self.counts[rows])


def placed(drafter: Drafter, device: torch.device, dtype: torch.dtype) -> Drafter:
    """The drafter on this device and in this dtype: itself where it is there, else a copy; it stays as it is."""
    if not isinstance(drafter, nn.Module):
        return drafter
    here = None if device.type == "meta" else device  # offloaded models say meta
    floats = [weight for weight in drafter.parameters() if weight.is_floating_point()]
    if all(weight.device == (here or weight.device) and weight.dtype == dtype for weight in floats):
        return drafter
    of_another_target = getattr(drafter, "_prepared", None)  # not to be copied: embedding and LM head
    return copy.deepcopy(drafter, {id(of_another_target): None}).to(device=here, dtype=dtype)


def state_of(drafter: Drafter) -> tuple[tuple[int, int], ...]:
    """Changes when weights of the drafter do."""
    weights = drafter.parameters() if isinstance(drafter, nn.Module) else ()
    return tuple((id(weight), 0 if weight.is_inference() else weight._version) for weight in weights)


class TrainedSession(ABC):
    """Base of the sessions of trained drafters: committed tokens are pending until the next draft.

    So steps without a draft cost no drafting. Where a subclass raises, what is pending goes on waiting, and nothing is
    lost.
    """

    def __init__(self) -> None:
        self.pending: list[Committed] = []
        self.begun = False  # whether any text was taken in

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.extend`."""
        self.pending.append(Committed(tokens, features, counts))
        if sum(each.tokens.shape[1] for each in self.pending) > LONGEST_PENDING:
            try:
                self.catch_up()
            except Exception:
                self.pending.pop()
                raise

    def catch_up(self) -> None:
        """Takes in what is pending."""
        if self.pending:
            self.take_in(end_to_end(self.pending))
            self.pending, self.begun = [], True

    def free(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        """See `DraftSession.free`."""
        return None

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates:
        """See `DraftSession.propose`."""
        found = self.free(root, nodes, min_probability)
        if found is not None:
            return found
        self.catch_up()
        return self.draft(root, nodes, min_probability)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        self.catch_up()
        self.add_rows(Committed(tokens, features, counts))

    def select(self, rows: torch.Tensor) -> None:
        """See `DraftSession.select`."""
        if not self.begun:  # its rows are not there yet: a row that ends with its first token leaves before any draft
            self.catch_up()
        self.keep_rows(rows)
        self.pending = [each.select(rows) for each in self.pending]

    @abstractmethod
    def take_in(self, committed: Committed) -> None:
        """Reads newly committed tokens of every row."""

    @abstractmethod
    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """`propose` by the network, once all text is taken in."""

    @abstractmethod
    def add_rows(self, committed: Committed) -> None:
        """Puts rows with this text behind the others; where it raises, nothing has changed."""

    @abstractmethod
    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keeps only these rows, `int64 [R]`, in this order."""


def end_to_end(parts: Sequence[Committed]) -> Committed:
    """The parts, each row's after one another and left-aligned; widths add up, and the host is never asked."""
    if len(parts) == 1:
        return parts[0]
    tokens, counts = torch.cat([part.tokens for part in parts], 1), torch.stack([part.counts for part in parts]).sum(0)
    features = [part.features for part in parts if part.features is not None]
    whole = torch.cat(features, 1) if features else None
    there = [torch.arange(p.tokens.shape[1], device=counts.device) < p.counts.unsqueeze(1) for p in parts]
    order = (~torch.cat(there, 1)).byte().argsort(dim=1, stable=True)
    whole = None if whole is None else whole.gather(1, order.unsqueeze(-1).expand_as(whole))
    return Committed(tokens.gather(1, order), whole, counts)
