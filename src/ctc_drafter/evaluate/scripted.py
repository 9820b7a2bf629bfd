"""A drafter whose drafts are never, always or sometimes right, for checks that need no trained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ctc_drafter.drafters.base import refuse_call
from ctc_drafter.types import Candidates

SIBLINGS = 3


class ScriptedDrafter:
    """Drafts from a known text per prompt, spoilt from `wrong_after` tokens on, beside decoys.

    scripts: prompt and continuation of each row, in the order of the prompts. wrong_after: right tokens of a
    draft; of several numbers each step takes the next one. Each level holds the scripted token and two decoys, in
    an order that changes from step to step, so that the right path is found at different node indices.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(
        self, scripts: Sequence[Sequence[int]], wrong_after: int | Sequence[int], vocab_size: int, depth: int = 4
    ):
        self.scripts, self.depth, self.vocab_size = [list(script) for script in scripts], depth, vocab_size
        self.wrong_after = [wrong_after] if isinstance(wrong_after, int) else list(wrong_after)

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> ScriptedSession:
        return ScriptedSession(self, list(range(batch_size)))


class ScriptedSession:
    """See `DraftSession`."""

    def __init__(self, drafter: ScriptedDrafter, rows: list[int]):
        self.drafter, self.rows, self.step = drafter, rows, 0
        self.lengths = [0] * len(rows)
        self.known = len(rows)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts.tolist(), strict=True)]

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.rows += range(self.known, self.known + len(counts))
        self.known += len(counts)
        self.lengths += counts.tolist()

    def select(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.lengths = [self.lengths[i] for i in rows.tolist()]

    def propose(self, root: torch.Tensor, nodes: int, floor: float) -> Candidates:
        drafter, self.step = self.drafter, self.step + 1
        rows = []
        for place, row in enumerate(self.rows):
            good = drafter.wrong_after[(self.step + row) % len(drafter.wrong_after)]
            script = drafter.scripts[row][self.lengths[place] + 1 :][: drafter.depth]
            script += [0] * (drafter.depth - len(script))
            rows.append([token if i < good else token + 1 for i, token in enumerate(script)])
        return self.levels(torch.tensor(rows, device=root.device))

    def levels(self, scripts: torch.Tensor) -> Candidates:
        """Three siblings a level, children of the scripted node of the level above, for scripts `int64 [B, D]`."""
        batch, depth = scripts.shape
        level = torch.arange(depth, device=scripts.device).repeat_interleave(SIBLINGS)
        sibling = torch.arange(SIBLINGS, device=scripts.device).repeat(depth)
        lane = (self.step + level) % SIBLINGS
        tokens = scripts[:, level] + torch.where(sibling == lane, 0, 17 + 5 * sibling)
        above = SIBLINGS * (level - 1) + (self.step + level - 1) % SIBLINGS
        return Candidates(
            tokens=tokens % self.drafter.vocab_size,
            parents=torch.where(level == 0, -1, above).expand(batch, -1).contiguous(),
            depths=(level + 1).expand(batch, -1).contiguous(),
            scores=(-0.5 * level - 0.01 * sibling).expand(batch, -1).contiguous(),
        )
