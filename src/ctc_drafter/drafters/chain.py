"""Drafters that know the probability of a token given its prefix: cross-entropy, best tree under the product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ctc_drafter.drafters.borrowed import Borrowed, draft_head
from ctc_drafter.drafters.expand import Step, expand
from ctc_drafter.drafters.sizes import DrafterConfig
from ctc_drafter.drafters.trainable import Objective, TrainableDrafter
from ctc_drafter.types import Candidates, UserError


@dataclass(frozen=True)
class BorrowedOutputs(Borrowed):
    """outputs: for each drafted token, the matrix that turns a hidden state into its logits."""

    outputs: Sequence[nn.Module]


class ChainDrafter(TrainableDrafter):
    """P(y1..yu) is the product of the tokens' probabilities, each given the tokens before it."""

    config: DrafterConfig

    @abstractmethod
    def steps(self, blocks: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        """What is asked for next tokens, of blocks `[N, ...]`. outputs: as in `BorrowedOutputs`."""

    def outputs(self, head: nn.Module) -> Sequence[nn.Module]:
        """The matrices that make logits: the target's head, unless the drafter has its own."""
        return [head] * self.config.draft_length

    def prepare(self, embed: nn.Module, head: nn.Module) -> BorrowedOutputs:
        ready = {id(each): draft_head(each) for each in self.outputs(head)}
        return BorrowedOutputs(embed, head, [ready[id(each)] for each in self.outputs(head)])

    def objective(self, loss: str, decay: float) -> Objective:
        """The cross-entropy of each token given its prefix; there is no other."""
        return chain_objective(loss, decay)

    def likelihood(
        self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> torch.Tensor:
        """log P(y_u | root, y1..y(u-1)), float32 `[N, U]`."""
        step = self.steps(blocks, embed, self.outputs(head))
        found = []
        for size in range(1, prefixes.shape[1]):
            logits = step(prefixes[:, None, :size], None if size == 1 else prefixes.new_zeros(len(prefixes), 1))[:, 0]
            score = logits.gather(1, prefixes[:, size : size + 1]).squeeze(1)
            found.append(score - logits.logsumexp(-1))
        return torch.stack(found, 1)

    def candidates(
        self, blocks: torch.Tensor, root: torch.Tensor, borrowed: BorrowedOutputs, nodes: int, floor: float = 0.0
    ) -> Candidates:
        """See `TrainableDrafter.candidates`."""
        step = self.steps(blocks, borrowed.embed, borrowed.outputs)
        return expand(step, root, nodes=nodes, depth=self.config.draft_length, floor=floor)


def chain_objective(loss: str, decay: float) -> Objective:
    """The weighted cross-entropy, of (log-probabilities of the labels, labels, valid)."""
    if loss != "prefix":
        raise UserError(f"the {loss} loss is for drafters with blanks; leave it out for this method")
    return lambda log_probs, _labels, valid: cross_entropy(log_probs, valid, decay)


def cross_entropy(log_probs: torch.Tensor, valid: torch.Tensor, decay: float) -> torch.Tensor:
    """Mean of -log_probs `[N, U]` weighted decay^(u-1), over the u that are valid `bool [N, U]`; 0 where none is."""
    weights = decay ** torch.arange(log_probs.shape[1], device=valid.device, dtype=log_probs.dtype) * valid
    total = weights.sum(1)
    return -(weights * log_probs).sum(1) / total.where(total > 0, 1.0)
