"""Drafters that know the probability of a token given its prefix: cross-entropy, best tree under the product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as fn

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

    @abstractmethod
    def known_logits(
        self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        """Float32 logits `[N, V]` of y1, of y2 after y1, and so on; blocks `[N, ...]`, prefixes `int64 [N, 1+U]`."""

    def objective(self, loss: str, decay: float) -> Objective:
        """The weighted cross-entropy of each token given its prefix, or what the teacher loss puts in its place."""
        if loss not in ("prefix", "teacher"):
            raise UserError(f"the {loss} loss is for drafters with blanks; leave it out for this method")
        return lambda scores, _labels, valid: cross_entropy(scores, valid, decay)

    def likelihood(
        self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> torch.Tensor:
        """log P(y_u | root, y1..y(u-1)), float32 `[N, U]`."""
        known = zip(self.known_logits(blocks, prefixes, embed, head), prefixes[:, 1:].unbind(1), strict=True)
        return torch.stack([-fn.cross_entropy(logits, label, reduction="none") for logits, label in known], 1)

    def taught(
        self, blocks: torch.Tensor, prefixes: torch.Tensor, teacher: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> torch.Tensor:
        """See `TrainableDrafter.taught`; `lesson` of each token, float32 `[N, U]`."""
        logits = self.known_logits(blocks, prefixes, embed, head)
        known = zip(logits, prefixes[:, 1:].unbind(1), teacher.unbind(1), strict=True)
        return torch.stack([self.lesson(*each) for each in known], 1)

    def lesson(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """What to make large, `[N]`: the log-probability that the teacher `[N, V]` expects of its own tokens."""
        return -fn.cross_entropy(logits, teacher, reduction="none")


class StepwiseDrafter(ChainDrafter):
    """With blocks that hold all that is known before a token is drafted."""

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

    def known_logits(
        self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        step = self.steps(blocks, embed, self.outputs(head))
        for size in range(1, prefixes.shape[1]):
            yield step(prefixes[:, None, :size], None if size == 1 else prefixes.new_zeros(len(prefixes), 1))[:, 0]

    def candidates(
        self, blocks: torch.Tensor, root: torch.Tensor, borrowed: BorrowedOutputs, nodes: int, floor: float = 0.0
    ) -> Candidates:
        """See `TrainableDrafter.candidates`."""
        step = self.steps(blocks, borrowed.embed, borrowed.outputs)
        return expand(step, root, nodes=nodes, depth=self.config.draft_length, floor=floor)


def cross_entropy(log_probs: torch.Tensor, valid: torch.Tensor, decay: float) -> torch.Tensor:
    """Mean of -log_probs `[N, U]` weighted decay^(u-1), over the u that are valid `bool [N, U]`; 0 where none is."""
    weights = decay ** torch.arange(log_probs.shape[1], device=valid.device, dtype=log_probs.dtype) * valid
    total = weights.sum(1)
    return -(weights * log_probs).sum(1) / total.where(total > 0, 1.0)
