"""Copies for any drafter: prompt lookup first, and copied tokens among the network's candidates.

So that a comparison of drafters is one of networks, either nobody copies or everybody does. Our own drafter has learnt
to copy (`ctc/copies.py`, `predictor.py`) and keeps its way; any other one, trained or not, gets this:

1. Prompt lookup is asked first, and where it is promising in every row the network is not asked, as in
   `ctc_session.py`, with the same threshold.
2. Else every prefix of the draft is asked what it would copy: what followed the longest earlier agreement with it, of
   `length` tokens. That token's odds after the prefix are multiplied by `BOOST * length`; the other tokens share what
   is left in the proportions that the network gave them. This is what the predictor of our drafter does, a bias on one
   logit, with a constant in place of what it learns. A copy that the network did not propose is taken to have had the
   probability `UNSEEN`, or what the proposed tokens left if that is less. Prefixes are not longer than the drafter's.

`UNSEEN` is about how likely a network finds a copy that is wrong. `BOOST` is 1 / (`UNSEEN` * prompt lookup's `PRIOR`):
where the network says nothing, a copy has the odds length / `PRIOR` that prompt lookup gives it, and these are true of
real text. The n best prefixes of the distribution so defined are found best first (`copying_cpu.py`), on the host.

Worked example: text `a b c a`, root `b`, a network that proposes c .2 and d .6. `a b` agrees, length 2, so c's odds .25
become 5: c .83, and d has .6 / .8 of the rest, .125.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ctc_drafter.drafters.base import Drafter, DraftSession, refuse_call
from ctc_drafter.drafters.prompt_lookup import PRIOR, LookupSession, PromptLookup
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.types import Candidates, UserError

UNSEEN = 0.05
BOOST = 1 / (UNSEEN * PRIOR)  # factor of the odds, for each token of the agreement; docs/log.md has what others gave
LONGEST = 16  # agreement that counts
LOOKUP_LENGTH = 15  # most tokens that are copied without the network: both as our own drafter has them

OWN, NONE, ALL = "own", "none", "all"


@dataclass(frozen=True)
class Copying:
    """A drafter that copies as described above, whatever the one inside does.

    draft_length: tokens of the longest prefix that the network and the copies share; lookup_length: most tokens to copy
    without the network, 0 for none.
    """

    inner: Drafter
    draft_length: int
    lookup_length: int = LOOKUP_LENGTH

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise UserError(f"draft_length is {self.draft_length}; give at least 1")
        if self.lookup_length < 0:
            raise UserError(f"lookup_length is {self.lookup_length}; give the most tokens to copy, or 0 for none")

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.inner.feature_layers

    __call__ = refuse_call

    def without_lookup(self) -> Copying:
        """The same where each draft asks the network."""
        return replace(self, lookup_length=0)

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> CopyingSession:
        """See `Drafter.begin`."""
        inner = self.inner.begin(embed, head, batch_size)
        lookup = PromptLookup(draft_length=max(1, self.lookup_length)).begin(embed, head, batch_size)
        return CopyingSession(self, inner, lookup)


class CopyingSession:
    """See `DraftSession`."""

    def __init__(self, drafter: Copying, inner: DraftSession, lookup: LookupSession):
        self.drafter, self.inner, self.lookup = drafter, inner, lookup

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.inner.extend(tokens, features, counts)  # first, as in `join`: where it raises, nothing has changed
        self.lookup.extend(tokens, features, counts)

    def free(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        """The copies alone; None where they promise too little in some row."""
        return self.lookup.sure(root, nodes, min_probability) if self.drafter.lookup_length else None

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates:
        """The copies alone where they are promising, else the network's candidates with copies among them."""
        found = self.free(root, nodes, min_probability)
        if found is not None:
            return found
        from ctc_drafter.drafters.copying_cpu import with_copied

        found = self.inner.propose(root, nodes, min_probability)
        texts = [row.up_to(token) for row, token in zip(self.lookup.rows, root.tolist(), strict=True)]
        return with_copied(found, texts, nodes, self.drafter.draft_length, min_probability)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.inner.join(tokens, features, counts)
        self.lookup.join(tokens, features, counts)

    def select(self, rows: torch.Tensor) -> None:
        self.inner.select(rows)
        self.lookup.select(rows)


# Nobody copies, or everybody does.


def drafting_alone(drafter: Drafter) -> Drafter | None:
    """The drafter where nothing is copied; None for one that does nothing else."""
    if isinstance(drafter, Copying):
        return drafting_alone(drafter.inner)
    if isinstance(drafter, PromptLookup):
        return None
    return drafter.without_copies() if isinstance(drafter, TrainableDrafter) else drafter


def with_copies(drafter: Drafter) -> Drafter:
    """The drafter with copies: its own where it has learnt to copy, and prompt lookup first; else `Copying`.

    Raises `UserError` for a drafter whose longest draft is not known.
    """
    if isinstance(drafter, PromptLookup | Copying):
        return drafter
    config = drafter.config if isinstance(drafter, TrainableDrafter) else drafter
    if getattr(config, "copies", 0):
        assert isinstance(drafter, TrainableDrafter)
        return drafter.with_lookup(getattr(config, "lookup_length", 0) or LOOKUP_LENGTH)
    if not hasattr(config, "draft_length"):
        raise UserError(f"{type(drafter).__name__} has no longest draft, which copies need; use --copies none")
    alone = drafting_alone(drafter)
    assert alone is not None
    return Copying(alone, int(config.draft_length))


def innermost(drafter: Drafter) -> Drafter:
    """The drafter that `Copying` was given to."""
    return innermost(drafter.inner) if isinstance(drafter, Copying) else drafter
