"""Tiny targets and drafters whose drafts are never, always or sometimes right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.target import Target
from ctc_drafter.types import Candidates

VOCABULARY = 97


def tiny_config(**overrides) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # large: random logits then differ enough for text to vary
    }
    return LlamaConfig(**{**sizes, **overrides})


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Target:
    torch.manual_seed(seed)
    return Target.wrap(LlamaForCausalLM(tiny_config(**overrides)).to(dtype).eval())


def tiny_drafter(target: Target, seed: int = 0, **overrides) -> CTCDrafter:
    torch.manual_seed(seed)
    drafter = CTCDrafter.for_target(target.config, **{"frames": 5, "draft_length": 4, **overrides})
    return drafter.to(target.dtype).eval()


class ScriptedDrafter:
    """Drafts from a known continuation per prompt, spoilt from `wrong_after` tokens on, beside decoys.

    Each level holds the scripted token and two decoys, in an order that changes from step to step, so that the
    right path is found at different node indices.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(self, scripts: Sequence[Sequence[int]], wrong_after: int | Sequence[int], depth: int = 4):
        self.scripts, self.depth = [list(script) for script in scripts], depth
        self.wrong_after = [wrong_after] if isinstance(wrong_after, int) else list(wrong_after)

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> ScriptedSession:
        return ScriptedSession(self, list(range(batch_size)))


class ScriptedSession:
    def __init__(self, drafter: ScriptedDrafter, rows: list[int]):
        self.drafter, self.rows, self.step = drafter, rows, 0
        self.lengths = [0] * len(rows)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts.tolist(), strict=True)]

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
            rows.append([token if i < good else (token + 1) % VOCABULARY for i, token in enumerate(script)])
        return self.levels(torch.tensor(rows))

    def levels(self, scripts: torch.Tensor) -> Candidates:
        """Three siblings a level, children of the level above's scripted node."""
        batch, depth = scripts.shape
        tokens, parents, scores = [], [], []
        lane_above = -1
        for level in range(depth):
            lane = (self.step + level) % 3
            for sibling in range(3):
                offset = 0 if sibling == lane else 17 + 5 * sibling
                tokens.append((scripts[:, level] + offset) % VOCABULARY)
                parents.append(lane_above)
                scores.append(-0.5 * level - 0.01 * sibling)
            lane_above = 3 * level + lane
        size = len(tokens)
        return Candidates(
            tokens=torch.stack(tokens, 1),
            parents=torch.tensor(parents).expand(batch, size).contiguous(),
            depths=torch.arange(depth).repeat_interleave(3).add(1).expand(batch, size).contiguous(),
            scores=torch.tensor(scores).expand(batch, size).contiguous(),
        )
