"""A draft vocabulary: the tokens that a drafter may draft, where it leaves the rare ones to the target.

The LM head is what a draft reads most of, and the search works over all its columns; rare tokens cost as much as
frequent ones and are hardly ever accepted. Tokens outside are still verified, emitted and read as context: only drafts
end before them. Source of the idea: FR-Spec (Zhao et al., 2025); of the tensor's name and form `d2t`: EAGLE-3's
checkpoints, as engines read them.
"""

from __future__ import annotations

import torch
from torch import nn

from ctc_drafter.types import UserError


def most_frequent(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` tokens of the largest counts `int64 [T]`, as sorted ids `int64 [size]`; lower ids win ties."""
    if not 1 <= size <= len(counts):
        raise UserError(f"a draft vocabulary of {size} tokens cannot be; give 1 to {len(counts)}")
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def columns_of(tokens: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
    """Places of tokens `int64 [...]` in the sorted vocabulary `int64 [V]`, -1 where they are not in it."""
    places = torch.searchsorted(vocabulary, tokens.contiguous()).clamp(max=len(vocabulary) - 1)
    return places.where(vocabulary[places] == tokens, -1)


def token_columns(size: int, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """`columns_of` every token of a target with `size` of them, `int64 [size]`; no vocabulary drafts all."""
    every = torch.arange(size, device=None if vocabulary is None else vocabulary.device)
    return every if vocabulary is None else columns_of(every, vocabulary)


def drafted_part(columns: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`bool [N, U]`: valid labels before the first that is not in the vocabulary; columns as in `columns_of`."""
    return valid & (columns >= 0).cumprod(1).bool()


def narrow_head(head: nn.Module, vocabulary: torch.Tensor) -> nn.Module:
    """The LM head with the columns of the vocabulary alone."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if type(weight) is not nn.Parameter:  # quantised: its rows cannot be taken
        return Columns(head, vocabulary)
    with torch.device(weight.device):
        narrow = nn.utils.skip_init(nn.Linear, weight.shape[1], len(vocabulary), bias is not None, dtype=weight.dtype)
    narrow.weight = nn.Parameter(weight.detach()[vocabulary], requires_grad=False)
    if bias is not None:
        narrow.bias = nn.Parameter(bias.detach()[vocabulary], requires_grad=False)
    return narrow


class Columns(nn.Module):
    """Some columns of what another module gives."""

    def __init__(self, inner: nn.Module, columns: torch.Tensor):
        super().__init__()
        self.inner, self.columns = inner, columns

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states)[..., self.columns]
