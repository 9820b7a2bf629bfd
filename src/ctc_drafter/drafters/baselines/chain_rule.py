"""Drafters with P(token | prefix): cross-entropy loss and best tree under the chain rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.base import Step
from ctc_drafter.drafters.config import DrafterConfig
from ctc_drafter.drafters.lm_head import DraftHead, draft_head, target_probabilities
from ctc_drafter.drafters.trainable import LossInputs, LossOptions, TrainableDrafter
from ctc_drafter.types import Candidates, UserError


@dataclass(frozen=True)
class OutputHeads(DraftHead):
    """outputs: for each drafted token, the matrix that turns a hidden state into its logits."""

    outputs: Sequence[nn.Module]


class ChainDrafter(TrainableDrafter):
    """P(y1..yu) is the product of the tokens' probabilities, each given the tokens before it."""

    @abstractmethod
    def known_logits(
        self, states: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        """Float32 logits `[N, V]` of y1, of y2 after y1, and so on; states `[N, ...]`, prefixes `int64 [N, 1+U]`."""

    def check_loss(self, loss: str) -> None:
        """`prefix` or `teacher`: drafters without blanks have no full-sequence loss."""
        if loss not in ("prefix", "teacher"):
            raise UserError(f"the {loss} loss is for drafters with blanks; leave it out for this method")

    def loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """The weighted cross-entropy of each token given its prefix, or what the teacher loss puts in its place."""
        if options.loss == "teacher":
            assert inputs.last is not None
            teacher = target_probabilities(head, inputs.last)
            scores = self.teacher_scores(inputs.states, inputs.prefixes, teacher, embed, head)
        else:
            scores = self.log_probs(inputs.states, inputs.prefixes, embed, head)
        with torch.autocast(inputs.states.device.type, enabled=False):
            return cross_entropy(scores, inputs.valid, options.decay)

    def log_probs(
        self, states: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> torch.Tensor:
        """log P(y_u | root, y1..y(u-1)), float32 `[N, U]`."""
        known = zip(self.known_logits(states, prefixes, embed, head), prefixes[:, 1:].unbind(1), strict=True)
        return torch.stack([-fn.cross_entropy(logits, label, reduction="none") for logits, label in known], 1)

    def log_likelihoods(
        self, inputs: LossInputs, embed: nn.Module, head: nn.Module, temperatures: Sequence[float]
    ) -> torch.Tensor:
        """See `TrainableDrafter.log_likelihoods`. Labels that are not drafted (logit -inf) count at no temperature."""
        found = torch.zeros(len(temperatures), dtype=torch.float64, device=inputs.states.device)
        known = self.known_logits(inputs.states, inputs.prefixes, embed, head)
        for logits, label, valid in zip(known, inputs.prefixes[:, 1:].unbind(1), inputs.valid.unbind(1), strict=True):
            kept = valid & (logits.gather(1, label.unsqueeze(1)).squeeze(1) > -torch.inf)
            if kept.any():
                rows, labels = logits[kept], label[kept]
                costs = [fn.cross_entropy(rows / each, labels, reduction="sum") for each in temperatures]
                found -= torch.stack(costs)
        return found

    def teacher_scores(
        self, states: torch.Tensor, prefixes: torch.Tensor, teacher: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> torch.Tensor:
        """`teacher_score` of each token, float32 `[N, U]`.

        teacher: float32 `[N, U, V]`, the target's probabilities of the token after root, y1..y(u-1).
        """
        logits = self.known_logits(states, prefixes, embed, head)
        known = zip(logits, prefixes[:, 1:].unbind(1), teacher.unbind(1), strict=True)
        return torch.stack([self.teacher_score(*each) for each in known], 1)

    def teacher_score(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """What to make large, `[N]`: the log-probability that the teacher `[N, V]` expects of its own tokens."""
        return -fn.cross_entropy(logits, teacher, reduction="none")


class StepwiseDrafter(ChainDrafter):
    """With draft states that hold all that is known before a token is drafted."""

    config: DrafterConfig

    @abstractmethod
    def steps(self, states: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        """What is asked for next tokens, of draft states `[N, ...]`. outputs: as in `OutputHeads`."""

    def outputs(self, head: nn.Module) -> Sequence[nn.Module]:
        """The matrices that make logits: the target's head, unless the drafter has its own."""
        return [head] * self.config.draft_length

    def prepare(self, embed: nn.Module, head: nn.Module) -> OutputHeads:
        outputs = self.outputs(head)
        ready = {id(each): draft_head(each) for each in outputs}
        return OutputHeads(embed, head, [ready[id(each)] for each in outputs])

    def known_logits(
        self, states: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module
    ) -> Iterator[torch.Tensor]:
        step = self.steps(states, embed, self.outputs(head))
        for size in range(1, prefixes.shape[1]):
            yield step(prefixes[:, None, :size], None if size == 1 else prefixes.new_zeros(len(prefixes), 1))[:, 0]

    def candidates(
        self,
        states: torch.Tensor,
        root: torch.Tensor,
        heads: OutputHeads,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """See `TrainableDrafter.candidates`."""
        step = tempered(self.steps(states, heads.embed, heads.outputs), self.config.score_temperature)
        return expand(step, root, nodes=nodes, depth=self.config.draft_length, min_probability=min_probability)


def cross_entropy(log_probs: torch.Tensor, valid: torch.Tensor, decay: float) -> torch.Tensor:
    """Mean of -log_probs `[N, U]` weighted decay^(u-1), over the u that are valid `bool [N, U]`; 0 where none is."""
    weights = decay ** torch.arange(log_probs.shape[1], device=valid.device, dtype=log_probs.dtype) * valid
    total = weights.sum(1)
    return -(weights * log_probs).sum(1) / total.where(total > 0, 1.0)


# The best prefixes under the chain rule: P(y1..yu) = P(y1 | root) ... P(yu | root, y1..y(u-1)).
#
# Level by level: all prefixes of a level that may still be among the n best are asked for their next token at once,
# as a head or a draft layer is cheapest to run. A prefix is never more probable than the one it extends, so the n
# best of all are found exactly: each of them, like its ancestors, is among the n best of its level. It is the best
# tree for any drafter that knows the probability of a token given its prefix; with heads that ignore the prefix, as
# Medusa's, it is the best tree under the product of their probabilities.


def tempered(step: Step, temperature: float) -> Step:
    """The step with logits divided by a temperature."""
    return step if temperature == 1 else lambda prefixes, places: step(prefixes, places) / temperature


def expand(step: Step, root: torch.Tensor, *, nodes: int, depth: int, min_probability: float = 0.0) -> Candidates:
    """The `nodes` best prefixes of up to `depth` tokens after root `int64 [B]`, and others.

    On a CPU, prefixes that cannot be among them, or are less likely than `min_probability`, are neither asked nor
    returned.
    """
    if root.device.type == "cpu":
        from ctc_drafter.drafters.baselines.chain_rule_cpu import grow

        return grow(step, root, nodes, depth, min_probability)
    return expand_statically(step, root, nodes, depth)


def expand_statically(step: Step, root: torch.Tensor, nodes: int, depth: int) -> Candidates:
    """`expand` in tensor operations of static shapes, which never ask the host: the `nodes` best of each level."""
    prefixes, above = root[:, None, None], torch.zeros_like(root, dtype=torch.float32).unsqueeze(1)
    places: torch.Tensor | None = None
    levels: list[Candidates] = []
    start = 0  # where the level above begins among all candidates
    for level in range(1, depth + 1):
        scores, owners, tokens = best_children(step(prefixes, places), above, nodes)
        parents = torch.full_like(owners, -1) if level == 1 else owners + start
        start += levels[-1].tokens.shape[1] if levels else 0
        levels.append(Candidates(tokens, parents, torch.full_like(tokens, level), scores))
        above, places = scores, owners
        kept = prefixes.gather(1, places.unsqueeze(-1).expand(-1, -1, level))
        prefixes = torch.cat([kept, tokens.unsqueeze(-1)], 2)
    return Candidates(
        tokens=torch.cat([each.tokens for each in levels], 1),
        parents=torch.cat([each.parents for each in levels], 1),
        depths=torch.cat([each.depths for each in levels], 1),
        scores=torch.cat([each.scores for each in levels], 1),
    )


def best_children(
    logits: torch.Tensor, above: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, parents and tokens `[B, C]` of the best `count` children, best first; above `[B, W]`: parents' scores."""
    best, tokens = logits.topk(min(count, logits.shape[-1]), -1)
    # Rounding must not lift a child above its parent: trees rely on the order.
    steps = (best - logits.logsumexp(-1, keepdim=True)).clamp(max=0.0)
    scores = above.unsqueeze(-1) + steps
    chosen, index = scores.flatten(1).topk(min(count, scores.shape[1] * scores.shape[2]), -1)
    return chosen, index // scores.shape[2], tokens.expand_as(scores).flatten(1).gather(1, index)
