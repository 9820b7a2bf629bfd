"""Typical acceptance: tokens that are likely enough for the target pass. It CHANGES THE OUTPUT: for comparison only.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (ICML 2024).
A drafted token x passes where P(x) > min(epsilon, delta exp(-H)), P being the target's distribution at temperature
and H its entropy; of the paths all of whose tokens pass the longest is taken, the likeliest among equals. What
follows it, and every row's first token, is the argmax; the argmax itself always passes, since its probability is at
least exp(-H).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctc_drafter.decode.argmax import most_probable
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.types import TokenTree, UserError


@dataclass(frozen=True)
class Typical:
    """A sampler, see `decode/sampling.py`. The defaults are Medusa's."""

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 0.7

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give more than 0")

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        return

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return most_probable(logits)

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        log_probs = (logits.float() / self.temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).nansum(-1)
        least = (self.delta * (-entropy).exp()).clamp(max=self.epsilon).log()
        own = log_probs.gather(1, tree.parents.unsqueeze(-1).expand_as(log_probs)).gather(2, tree.tokens.unsqueeze(-1))
        own = own.squeeze(-1)
        passes = (own > least.gather(1, tree.parents)) & tree.valid
        passes[:, 0], own[:, 0] = True, 0.0
        whole = ~(tree.ancestors & ~passes.unsqueeze(1)).any(-1)
        likelihood = (tree.ancestors * own.nan_to_num(neginf=-1e4).unsqueeze(1)).sum(-1)
        depths = torch.where(whole, tree.depths, -1)
        longest = depths == depths.amax(1, keepdim=True)
        last = torch.where(longest, likelihood, float("-inf")).argmax(1)
        return wanted_on_path(tree, most_probable(logits), last)


def wanted_on_path(tree: TokenTree, target_tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`target_tokens int64 [B, 1+N]` with the tokens of the path from the root to node `last int64 [B]` put in."""
    rows = torch.arange(len(last), device=last.device)
    found, node = target_tokens.clone(), last
    for _ in range(int(tree.depths.max())):
        on = node > 0
        parent = tree.parents[rows, node]
        found[rows[on], parent[on]] = tree.tokens[rows, node][on]
        node = parent
    return found
