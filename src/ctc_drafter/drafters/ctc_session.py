"""Session of the CTC drafter: prompt lookup first, network and prefix search otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import pad

from ctc_drafter.ctc.copies import Text
from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.drafters.base import LazySession
from ctc_drafter.drafters.block import BlockNetwork, BlockSession
from ctc_drafter.drafters.lm_head import DraftHead, columns_of, draft_head
from ctc_drafter.drafters.predictor import Predictor, low_rank_bias
from ctc_drafter.drafters.prompt_lookup import LookupSession
from ctc_drafter.types import Candidates, Prefix, padded

# A block drafter at work that also copies from the text: it keeps each row's tokens.


class CopyingNetwork(BlockNetwork, Protocol):
    """A `BlockNetwork` whose search may copy."""

    def candidates(
        self,
        blocks: torch.Tensor,
        root: torch.Tensor,
        borrowed: DraftHead,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates: ...


class CopySession(BlockSession):
    """See `BlockSession`. tokens `int64 [B, S]`: each row's text; the context knows how long it is."""

    drafter: CopyingNetwork

    def __init__(self, drafter: CopyingNetwork, borrowed: DraftHead, batch_size: int):
        super().__init__(drafter, borrowed, batch_size)
        self.tokens = self.context.lengths.new_zeros(batch_size, 0)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.extend`."""
        places = self.context.lengths
        super().extend(tokens, features, counts)
        self.tokens = self._written(self.tokens, places, tokens)

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates:
        """See `DraftSession.propose`."""
        blocks = self.blocks(root)  # which makes room behind the context
        return self.drafter.candidates(blocks, root, self.borrowed, nodes, min_probability, self.text_up_to(root))

    def text_up_to(self, root: torch.Tensor) -> Text:
        """The texts, each with its root `int64 [B]` behind it."""
        self.tokens = self._written(self.tokens, self.context.lengths, root.unsqueeze(1))
        return Text(self.tokens, self.context.lengths)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        width = max(self.tokens.shape[1], tokens.shape[1])
        joined = torch.cat([pad(each, (0, width - each.shape[1])) for each in (self.tokens, tokens)])
        super().join(tokens, features, counts)
        self.tokens = joined

    def select(self, rows: torch.Tensor) -> None:
        """See `DraftSession.select`."""
        super().select(rows)
        self.tokens = self.tokens[rows]

    def _written(self, text: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The text with tokens `int64 [B, T]` from `places int64 [B]` on."""
        text = self._roomy(text)
        return text.scatter_(1, places.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device), tokens)

    def _roomy(self, text: torch.Tensor) -> torch.Tensor:
        """With as many places as the context has slots: it has room for what is committed, and grows without asking."""
        missing = self.context.states.shape[4] - text.shape[1]
        return pad(text, (0, missing)) if missing else text


# A trained drafter that is asked only where the text does not say itself how it goes on.
#
# Where the newest tokens have stood before, and what followed them is likely to follow again, the draft is copied: it
# costs nothing, and may be longer than what a network was trained to draft. Elsewhere the network drafts. The same
# decision, by the length of the match: Hu et al., "SAM Decoding" (2024); Oliaro et al., "SuffixDecoding" (2024).

# Tokens that a copied tree must be expected to get accepted, in every row. docs/log.md has what others gave.
ENOUGH = 1.5


class HybridSession:
    """See `DraftSession`. What is committed waits in `trained` until its network is asked."""

    def __init__(self, trained: LazySession, lookup: LookupSession):
        self.trained, self.lookup = trained, lookup

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.trained.extend(tokens, features, counts)  # first, as in `join`: where it raises, nothing has changed
        self.lookup.extend(tokens, features, counts)

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates:
        copied = self.copied(root, nodes, min_probability)
        return self.trained.propose(root, nodes, min_probability) if copied is None else copied

    def copied(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        """The copies alone; None where they promise too little in some row."""
        found = list(takewhile(sure, self.lookup.prefixes(root, nodes, min_probability)))
        return replace(padded(found, root.device), free=True) if len(found) == len(root) else None

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.trained.join(tokens, features, counts)  # first: for this one memory may not suffice
        self.lookup.join(tokens, features, counts)

    def select(self, rows: torch.Tensor) -> None:
        self.lookup.select(rows)
        self.trained.select(rows)


def sure(prefixes: Sequence[Prefix]) -> bool:
    """Whether enough of these tokens will be accepted, by their own probabilities."""
    return sum(math.exp(score) for _, score, _, _ in prefixes) >= ENOUGH


# (frame logits [N, F, V], blank logits [N, F], root int64 [N], block output at the root [N, H], the texts up to the
# roots for those who copy, nodes, floor)
Search = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Text | None, int, float], Candidates]


@dataclass(frozen=True)
class BorrowedSearch(DraftHead):
    """With the search of a CTC lattice."""

    search: Search


@torch.no_grad()
def borrow_search(
    predictor: Predictor | None, depth: int, embed: nn.Module, head: nn.Module, vocabulary: torch.Tensor | None = None
) -> BorrowedSearch:
    """From the target's embedding and LM head; `depth` is the longest prefix to search. vocabulary `int64 [V]`: the
    tokens of the head's columns."""
    device = next(embed.parameters()).device
    make = best_first if device.type == "cpu" else level_by_level
    return BorrowedSearch(embed, draft_head(head), make(predictor, depth, embed, vocabulary))


def best_first(predictor: Predictor | None, depth: int, embed: nn.Module, vocabulary: torch.Tensor | None) -> Search:
    """The search for a CPU; what the predictor makes of every token is worked out here."""
    from ctc_drafter.ctc.search_cpu import best_prefixes

    bias = low_rank_bias(predictor, embed, vocabulary)

    def search(
        tokens: torch.Tensor,
        blanks: torch.Tensor,
        root: torch.Tensor,
        start: torch.Tensor,
        text: Text | None,
        nodes: int,
        min_probability: float,
    ) -> Candidates:
        state = start.new_zeros(len(start), 0) if predictor is None else predictor.root_state(start)
        return best_prefixes(
            tokens,
            blanks,
            root,
            bias,
            state.float(),
            count=nodes,
            depth=depth,
            min_probability=min_probability,
            vocabulary=vocabulary,
            text=text,
        )

    return search


def level_by_level(
    predictor: Predictor | None, depth: int, embed: nn.Module, vocabulary: torch.Tensor | None
) -> Search:
    """The search of static shapes, which never asks the host."""

    def columns(tokens: torch.Tensor) -> torch.Tensor:
        return tokens if vocabulary is None else columns_of(tokens, vocabulary)

    def search(
        tokens: torch.Tensor,
        blanks: torch.Tensor,
        root: torch.Tensor,
        start: torch.Tensor,
        text: Text | None,
        nodes: int,
        _floor: float,
    ) -> Candidates:
        bias = None if predictor is None else predictor.search_bias(start, embed, columns, text)
        return prefix_search(tokens, blanks, root, bias, width=nodes, depth=depth, vocabulary=vocabulary)

    return search
