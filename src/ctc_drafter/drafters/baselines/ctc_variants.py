"""Two other CTC drafters: the paper's, and ours with linear frames in place of attention."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from ctc_drafter.ctc.copies import Text
from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.ctc.loss import ctc_objective
from ctc_drafter.drafters.base import DraftSession
from ctc_drafter.drafters.baselines.heads import LastStateSession, before
from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig, FramesConfig, FramesModel
from ctc_drafter.drafters.lm_head import DraftHead, draft_head
from ctc_drafter.drafters.trainable import LossInputs, LossOptions
from ctc_drafter.types import Candidates, Prefix, UserError, padded

# The paper's own CTC drafting: full-sequence loss, independent frames, a static tree of choices, collapsed.
#
# Source: Wen, Gui and Feng, "Speculative Decoding with CTC-based Draft Model for LLM Inference Acceleration" (NeurIPS
# 2024). Every frame's likeliest symbols are ranked, blanks among them. A static tree says which sequences of ranks
# are looked at; each is an alignment, and collapses to tokens: repeats merge, blanks vanish. Alignments that collapse
# to the same prefix become one node, and the mask is built from what is left, so that positions, ancestors and bonus
# token are right; the released code keeps the old ones. The draft module is that of our other drafters, not the
# released autoregressive head. A prefix scores the sum of the alignments in the tree that complete it: less than its
# probability, of which our search finds all.

RANKS = 10  # likeliest symbols of a frame


class PaperConfig(FramesConfig):
    """See `FramesConfig`.

    Args:
        alignments: nodes of the static tree, before they collapse.
    """

    model_type = "ctc_paper_drafter"

    alignments: int = 64

    def check(self) -> None:
        super().check()
        if self.alignments < 1:
            raise UserError(f"alignments is {self.alignments}; give at least 1")


class PaperDrafter(FramesModel):
    """Frames with blanks, without a predictor."""

    config_class = PaperConfig
    config: PaperConfig

    def __init__(self, config: PaperConfig):
        super().__init__(config)
        self.post_init()

    def check_loss(self, loss: str) -> None:
        """`prefix` and `ctc` are the full-sequence loss: there is no other."""
        if loss == "teacher":
            raise UserError("the teacher loss is for drafters without blanks; leave it out for this method")

    def loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """See `TrainableDrafter.loss`."""
        labels = inputs.prefixes[:, 1:]
        found = lattice(*self.frame_logits(inputs.states, head), labels, None)
        with torch.autocast(inputs.states.device.type, enabled=False):
            return ctc_objective(found, labels, inputs.valid)

    def prepare(self, embed: nn.Module, head: nn.Module) -> DraftHead:
        return DraftHead(embed, draft_head(head))

    def candidates(
        self,
        states: torch.Tensor,
        root: torch.Tensor,
        heads: DraftHead,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """See `TrainableDrafter.candidates`: the static tree's prefixes, however many `nodes` there is room for."""
        tokens, blanks = self.frame_logits(states, heads.head)
        logits = torch.cat([tokens, blanks.unsqueeze(-1)], -1)
        best, symbols = logits.topk(min(RANKS, logits.shape[-1]), -1)
        scores = best - logits.logsumexp(-1, keepdim=True)
        tree = static_tree(self.config.alignments, self.config.frames, symbols.shape[-1])
        blank, depth = tokens.shape[-1], self.config.draft_length
        rows = [collapsed(tree, *row, blank, depth) for row in zip(symbols.tolist(), scores.tolist(), strict=True)]
        return padded(rows, root.device)


@lru_cache(maxsize=16)
def static_tree(nodes: int, depth: int, ranks: int) -> tuple[tuple[int, int, int], ...]:
    """(parent, frame, rank) of each node, parents first, -1 for a child of the root.

    The likeliest sequences of ranks, if the symbol of rank r (from 1) is right with a probability that falls as 1/r².
    """
    total = sum(1 / rank**2 for rank in range(1, ranks + 1))
    costs = [math.log(total * rank**2) for rank in range(1, ranks + 1)]
    waiting = [(cost, -1, 0, rank) for rank, cost in enumerate(costs)]
    found: list[tuple[int, int, int]] = []
    while waiting and len(found) < nodes:
        cost, parent, frame, rank = heapq.heappop(waiting)
        found.append((parent, frame, rank))
        if frame + 1 < depth:
            for below, more in enumerate(costs):
                heapq.heappush(waiting, (cost + more, len(found) - 1, frame + 1, below))
    return tuple(found)


def collapsed(
    tree: Sequence[tuple[int, int, int]],
    symbols: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    blank: int,
    depth: int,
) -> list[Prefix]:
    """The prefixes that the tree's alignments collapse to, of symbols and their log-probabilities by frame and rank.

    Example: `a a`, `a blank` and `a b` give the prefixes a and ab; `a blank a` would give aa.
    """
    places: dict[tuple[int, int], int] = {}
    tokens, parents, depths, masses = list[int](), list[int](), list[int](), list[float]()
    states = list[tuple[int, int, float]]()  # of each alignment: its prefix, its last symbol, its log-probability
    for above, frame, rank in tree:
        prefix, last, score = states[above] if above >= 0 else (-1, blank, 0.0)
        symbol, score = symbols[frame][rank], score + scores[frame][rank]
        full = prefix >= 0 and depths[prefix] == depth  # what follows is more than may be drafted
        if symbol not in (blank, last) and not full:
            parent, prefix = prefix, places.setdefault((prefix, symbol), len(tokens))
            if prefix == len(tokens):
                tokens.append(symbol)
                parents.append(parent)
                depths.append(depths[parent] + 1 if parent >= 0 else 1)
                masses.append(0.0)
            masses[prefix] += math.exp(score)
        states.append((prefix, symbol, score))
    logs = [math.log(mass) if mass else -math.inf for mass in masses]
    for place, parent in enumerate(parents):
        if parent >= 0:  # rounding must not lift a child above its parent
            logs[place] = min(logs[place], logs[parent])
    return list(zip(tokens, logs, parents, depths, strict=True))


# The CTC drafter without its attention: frames are linear maps of the last hidden state, as Medusa's heads are.
#
# For ablations of the attention module. Everything behind the frames is that of `ctc.py`.


class LinearCTCConfig(CTCDrafterConfig):
    """See `CTCDrafterConfig`; there are no draft layers."""

    model_type = "ctc_linear_drafter"

    num_hidden_layers: int = 0

    def check(self) -> None:
        super().check()
        if self.copies:
            raise UserError("ctc-linear copies nothing; leave copies at 0, or train ctc")
        if self.lookup_length:
            raise UserError("ctc-linear copies nothing; leave lookup_length at 0, or train ctc")


class FrameMaps(nn.Linear):
    """All frames' maps side by side; they start at 0, so that a frame starts as the state itself."""


class LinearCTCDrafter(CTCDrafter):
    """Frame t is x + W_t x for the last hidden state x behind the norm; so is the place of the root."""

    config_class = LinearCTCConfig
    config: LinearCTCConfig

    def __init__(self, config: LinearCTCConfig):
        super().__init__(config)
        self.maps = FrameMaps(config.hidden_size, (1 + config.frames) * config.hidden_size)
        del self.fc, self.hidden_norm
        self.post_init()

    @classmethod
    def feature_choice(cls, depth: int) -> list[int]:
        return [depth - 1]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FrameMaps):
            nn.init.zeros_(module.weight)

    def states(self, features: torch.Tensor) -> torch.Tensor:
        """What the maps read of features `[B, T, H]`."""
        return self.norm(features.to(self.norm.weight.dtype))

    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """The state before each anchor `[B, A, H]`; see `TrainableDrafter.draft_states`."""
        return before(self.states(features), anchors)

    def filled(self, states: torch.Tensor) -> torch.Tensor:
        """See `CTCDrafter.filled`, of states `[N, H]`."""
        return states.unsqueeze(1) + self.maps(states).unflatten(-1, (1 + self.frames, -1))

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""
        return LastStateSession(self, self.states, self.prepared(embed, head))
