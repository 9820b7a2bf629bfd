"""What a drafter takes from its target, made ready once: embedding, LM head, and the search that fits the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ctc_drafter.ctc.copies import Text
from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.drafters.vocabulary import columns_of, token_columns
from ctc_drafter.types import Candidates

if TYPE_CHECKING:
    from ctc_drafter.ctc.search_cpu import LowRankBias

# (frame logits [N, F, V], blank logits [N, F], root int64 [N], block output at the root [N, H], the texts up to the
# roots for those who copy, nodes, floor)
Search = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Text | None, int, float], Candidates]


@dataclass(frozen=True)
class Borrowed:
    """embed and head are for drafting only: the head may be of lower precision than the target's."""

    embed: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class BorrowedSearch(Borrowed):
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
        floor: float,
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
            floor=floor,
            vocabulary=vocabulary,
            text=text,
        )

    return search


@torch.no_grad()
def low_rank_bias(predictor: Predictor | None, embed: nn.Module, vocabulary: torch.Tensor | None = None) -> LowRankBias:
    """What the searches on a CPU read of a predictor; of rank 0 without one. vocabulary as in `borrow_search`."""
    from ctc_drafter.ctc.search_cpu import LowRankBias

    nothing = torch.zeros(0, 0)
    if predictor is None:
        tables: tuple[torch.Tensor, ...] = (*(nothing,) * 4, torch.zeros(0), nothing)
    else:
        tables = (*predictor.tables(embed), token_columns(len(predictor.table.weight), vocabulary))
    return LowRankBias(*(table.contiguous().numpy() for table in tables))


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


def head_logits(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Float32 logits `[N, V]` of states `[N, H]`. Two dimensions: a sliced third one makes PyTorch copy the weights."""
    dtype = next((w.dtype for w in head.parameters() if w.is_floating_point()), states.dtype)
    return head(states.to(dtype)).float()


def draft_head(head: nn.Module) -> nn.Module:
    """The target's LM head, in bfloat16 on processors that multiply it natively.

    It is most of what a draft reads from memory, and drafts need no precision. A quantised head stays as it is.
    """
    weight = getattr(head, "weight", None)
    if type(weight) is not nn.Parameter:
        return head
    # PyTorch has no public question for this; a version without the private answer keeps the head as it is.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not native():
        return head
    return copy.deepcopy(head).to(torch.bfloat16)
