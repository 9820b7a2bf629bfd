"""Joint terms of a lattice: what a frame and a prefix say together of the frame's likeliest tokens.

Frame logits a and bias m add up, so that a frame cannot say another token after another prefix than the two say apart.
For the K tokens C(t) that frame t finds likeliest there is a term of both, g (0 for all others):

    P(v | t, p) = exp(a[t, v] + m[p, v] + g[t, p, v]) / Z(t, p)
    Z(t, p)     = Z of `lattice.py` over the other tokens + sum over v in C(t) of exp(a[t, v] + m[p, v] + g[t, p, v])

That is the joint network of transducers (Graves, 2012; Graves et al., 2013) where it matters and the product of two
experts elsewhere; probabilities still add up to 1, and the sum over all other tokens is still one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class JointTerms:
    """columns `int64 [N, F, K]`: places of the tokens in the frames' logits, no place twice in a frame. values
    `[N, P, F, K]`: what is added to their logits after each prefix."""

    columns: torch.Tensor
    values: torch.Tensor

    def divided(self, temperature: float) -> JointTerms:
        return self if temperature == 1 else JointTerms(self.columns, self.values / temperature)


@dataclass(frozen=True)
class JointOfPrefixes:
    """columns as in `JointTerms`. values: of W prefixes `int64 [B, W, R]`, as in `search.Bias`: `[B, W, F, K]`."""

    columns: torch.Tensor
    values: Callable[[torch.Tensor], torch.Tensor]


def value_at(values: torch.Tensor, columns: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values `[N, P, F, K]` of columns `int64 [N, F, K]`: those at a column `int64 [N, P]` asked of each prefix, and
    whether the frame has it, both `[N, P, F]`; 0 where it has not."""
    found = columns.unsqueeze(1) == asked[..., None, None]
    return values.where(found, 0.0).sum(-1), found.any(-1)


def joint_logits(frame_logits: torch.Tensor, bias: torch.Tensor, terms: JointTerms) -> torch.Tensor:
    """a + m + g of the tokens that have terms, `[N, P, F, K]`; frame logits `[N, F, V]`, bias `[N, P, V]`."""
    where = terms.columns.flatten(1).unsqueeze(1).expand(-1, bias.shape[1], -1)
    biases = bias.gather(2, where).unflatten(2, terms.columns.shape[1:])
    return frame_logits.gather(2, terms.columns).unsqueeze(1) + biases + terms.values
