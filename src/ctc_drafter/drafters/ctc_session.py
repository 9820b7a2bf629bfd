"""The session of the CTC drafter: prompt lookup first, network and prefix search otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from ctc_drafter.ctc.copies import Text
from ctc_drafter.ctc.search import Bias, prefix_search
from ctc_drafter.drafters.base import Committed
from ctc_drafter.drafters.block import BlockModel, BlockSession
from ctc_drafter.drafters.joint import JointNetwork, joint_of_prefixes, joint_tables
from ctc_drafter.drafters.lm_head import DraftHead, columns_of, draft_head
from ctc_drafter.drafters.predictor import Predictor, low_rank_bias
from ctc_drafter.drafters.prompt_lookup import LookupSession, PromptLookup
from ctc_drafter.types import Candidates


class CTCSession(BlockSession):
    """The session of a CTC drafter: prompt lookup first, the network and its search otherwise.

    Where the newest tokens have stood before, and what followed them is likely to follow again, the draft is copied: it
    costs nothing, and may be longer than what a network was trained to draft. The same decision, by the length of the
    match: Hu et al., "SAM Decoding" (2024); Oliaro et al., "SuffixDecoding" (2024).

    copies: whether the search may copy, too (`ctc/copies.py`). tokens `int64 [B, S]` is then each row's text, whose
    length the context knows. lookup_length: most tokens to copy without the network, 0 for none.
    """

    def __init__(self, drafter: BlockModel, head: DraftHead, batch_size: int, copies: bool, lookup_length: int):
        super().__init__(drafter, head, batch_size)
        self.tokens = self.context.lengths.new_zeros(batch_size, 0) if copies else None
        self.lookup: LookupSession | None = None
        if lookup_length:
            self.lookup = PromptLookup(draft_length=lookup_length).begin(head.embed, head.head, batch_size)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.extend`."""
        super().extend(tokens, features, counts)  # first, as in `join`: where it raises, nothing has changed
        if self.lookup is not None:
            self.lookup.extend(tokens, features, counts)

    def free(self, root: torch.Tensor, nodes: int, min_probability: float = 0.0) -> Candidates | None:
        """The copies alone; None where they promise too little in some row."""
        return None if self.lookup is None else self.lookup.sure(root, nodes, min_probability)

    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """One parallel pass over the block, then the search, which may copy."""
        states = self.draft_states(root)  # which makes room behind the context
        text = None if self.tokens is None else self.text_up_to(root)
        return self.drafter.candidates(states, root, self.head, nodes, min_probability, text)

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        """See `DraftSession.join`."""
        super().join(tokens, features, counts)
        if self.lookup is not None:
            self.lookup.join(tokens, features, counts)

    def select(self, rows: torch.Tensor) -> None:
        """See `DraftSession.select`."""
        super().select(rows)
        if self.lookup is not None:
            self.lookup.select(rows)

    def take_in(self, committed: Committed) -> None:
        """See `TrainedSession.take_in`."""
        places = self.context.lengths
        super().take_in(committed)
        if self.tokens is not None:
            self.tokens = self._written(self.tokens, places, committed.tokens)

    def add_rows(self, committed: Committed) -> None:
        """See `TrainedSession.add_rows`."""
        joined = None
        if self.tokens is not None:
            width = max(self.tokens.shape[1], committed.tokens.shape[1])
            joined = torch.cat([pad(each, (0, width - each.shape[1])) for each in (self.tokens, committed.tokens)])
        super().add_rows(committed)
        self.tokens = joined

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `TrainedSession.keep_rows`."""
        super().keep_rows(rows)
        self.tokens = None if self.tokens is None else self.tokens[rows]

    def text_up_to(self, root: torch.Tensor) -> Text:
        """The texts of a session that copies, each with its root `int64 [B]` behind it."""
        assert self.tokens is not None
        self.tokens = self._written(self.tokens, self.context.lengths, root.unsqueeze(1))
        return Text(self.tokens, self.context.lengths)

    def _written(self, text: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The text with tokens `int64 [B, T]` from `places int64 [B]` on.

        It has as many places as the context has slots: room for what is committed, without asking a GPU.
        """
        missing = self.context.states.shape[4] - text.shape[1]
        text = pad(text, (0, missing)) if missing else text
        return text.scatter_(1, places.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device), tokens)


# The search of a CTC lattice that fits the device.

# (frame logits [N, F, V], blank logits [N, F], root int64 [N], block outputs [N, 1+F, H], the texts up to the roots for
# those who copy, nodes, floor)
Search = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Text | None, int, float], Candidates]


@dataclass(frozen=True)
class SearchHead(DraftHead):
    """With the search of a CTC lattice."""

    search: Search


@torch.no_grad()
def search_head(
    predictor: Predictor | None,
    joint: JointNetwork | None,
    depth: int,
    embed: nn.Module,
    head: nn.Module,
    vocabulary: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> SearchHead:
    """From the target's embedding and LM head; `depth` is the longest prefix to search. vocabulary `int64 [V]`: the
    tokens of the head's columns. temperature: what logits, of blanks too, and bias are divided by."""
    device = next(embed.parameters()).device
    make = best_first if device.type == "cpu" else level_by_level
    return SearchHead(embed, draft_head(head), make(predictor, joint, depth, embed, vocabulary, temperature))


def best_first(
    predictor: Predictor | None,
    joint: JointNetwork | None,
    depth: int,
    embed: nn.Module,
    vocabulary: torch.Tensor | None,
    temperature: float = 1.0,
) -> Search:
    """The search for a CPU; what the predictor makes of every token is worked out here."""
    from ctc_drafter.ctc.search_cpu import best_prefixes

    bias = low_rank_bias(predictor, embed, vocabulary)
    if temperature != 1:
        linear = {name: getattr(bias, name) / temperature for name in ("scale", "copying", "trust")}
        bias = bias._replace(**linear)
    tables = None
    if joint is not None and predictor is not None:
        tables = joint_tables(joint, embed, predictor.drafted(vocabulary), temperature)

    def search(
        tokens: torch.Tensor,
        blanks: torch.Tensor,
        root: torch.Tensor,
        states: torch.Tensor,
        text: Text | None,
        nodes: int,
        min_probability: float,
    ) -> Candidates:
        start = states[:, 0]
        state = start.new_zeros(len(start), 0) if predictor is None else predictor.root_state(start)
        return best_prefixes(
            tokens if temperature == 1 else tokens / temperature,
            blanks if temperature == 1 else blanks / temperature,
            root,
            bias,
            state.float(),
            count=nodes,
            depth=depth,
            min_probability=min_probability,
            vocabulary=vocabulary,
            text=text,
            joint=None if tables is None else tables(tokens, states[:, 1:]),
        )

    return search


def level_by_level(
    predictor: Predictor | None,
    joint: JointNetwork | None,
    depth: int,
    embed: nn.Module,
    vocabulary: torch.Tensor | None,
    temperature: float = 1.0,
) -> Search:
    """The search of static shapes, which never asks the host."""

    rows, drafted = None, vocabulary
    if predictor is not None:
        rows, drafted = predictor.output_rows(embed, vocabulary), predictor.drafted(vocabulary)

    def columns(tokens: torch.Tensor) -> torch.Tensor:
        return tokens if vocabulary is None else columns_of(tokens, vocabulary)

    def search(
        tokens: torch.Tensor,
        blanks: torch.Tensor,
        root: torch.Tensor,
        states: torch.Tensor,
        text: Text | None,
        nodes: int,
        _floor: float,
    ) -> Candidates:
        bias = (
            None
            if predictor is None
            else divided(predictor.search_bias(states[:, 0], embed, columns, text, rows), temperature)
        )
        logits = tokens / temperature, blanks / temperature
        terms = None
        if joint is not None and predictor is not None and drafted is not None:
            terms = joint_of_prefixes(joint, predictor, states, tokens, drafted, embed, temperature)
        return prefix_search(*logits, root, bias, width=nodes, depth=depth, vocabulary=vocabulary, joint=terms)

    return search


def divided(bias: Bias, temperature: float) -> Bias:
    """The bias divided by a temperature."""
    return bias if temperature == 1 else lambda recent: bias(recent) / temperature
