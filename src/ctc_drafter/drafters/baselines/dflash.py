"""DFlash and DSpark: one parallel pass over a block of masks, one token per mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.base import Step
from ctc_drafter.drafters.baselines.chain_rule import OutputHeads, StepwiseDrafter
from ctc_drafter.drafters.block import BlockConfig, BlockModel, frame_logits
from ctc_drafter.drafters.predictor import Predictor, low_rank_bias
from ctc_drafter.types import Candidates, UserError

if TYPE_CHECKING:
    from ctc_drafter.ctc.search_cpu import LowRankBias

# DFlash: one parallel pass over a block of masks, a token for each mask.
#
# Source: Chen, Liang and Liu, "DFlash: Block Diffusion for Flash Speculative Decoding" (2026). The network is that of
# `block.py`: draft layers that attend to the block, both ways, and to projections of several target layers' features
# for all committed tokens. Frame k drafts the k-th token after the root; there is no blank, and no frame knows what
# the others hold. The loss is cross-entropy, a token weighing decay^(k-1): the paper's exp(-(k-1)/4) for blocks of 8
# is decay .78. The paper drafts one chain; here each step has the best tree under the product of the frames'
# probabilities.


class DFlashConfig(BlockConfig):
    """See `BlockConfig`; a block has `draft_length` masks."""

    model_type = "dflash_drafter"


class TokenFrames(StepwiseDrafter, BlockModel):
    """Frames, and a predictor that ties them together if there is one."""

    predictor: Predictor | None

    def prepare(self, embed: nn.Module, head: nn.Module) -> FrameHeads:
        ready = super().prepare(embed, head)
        on_cpu = next(embed.parameters()).device.type == "cpu"
        bias = low_rank_bias(self.predictor, embed) if on_cpu else None
        return FrameHeads(ready.embed, ready.head, ready.outputs, bias)

    def best_first(self, heads: OutputHeads) -> bool:
        """See `TrainableDrafter.best_first`."""
        return isinstance(heads, FrameHeads) and heads.bias is not None

    def candidates(
        self,
        states: torch.Tensor,
        root: torch.Tensor,
        heads: OutputHeads,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """See `TrainableDrafter.candidates`: best first on a CPU, level by level elsewhere."""
        if not isinstance(heads, FrameHeads) or heads.bias is None:
            return super().candidates(states, root, heads, nodes, min_probability)
        from ctc_drafter.ctc.chain_search_cpu import best_chains

        start = states[:, 0]
        state = start[:, :0] if self.predictor is None else self.predictor.root_state(start)
        logits, bias = frame_logits(states, heads.outputs[0]), heads.bias
        if self.config.score_temperature != 1:
            logits, bias = (
                logits / self.config.score_temperature,
                bias._replace(scale=bias.scale / self.config.score_temperature),
            )
        return best_chains(logits, root, bias, state.float(), count=nodes, min_probability=min_probability)


class DFlashDrafter(TokenFrames):
    """Independent frames, one a token."""

    config_class = DFlashConfig
    config: DFlashConfig

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        self.predictor = None
        self.post_init()

    def steps(self, states: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        logits = frame_logits(states, outputs[0])
        return lambda prefixes, _: logits[:, prefixes.shape[2] - 1].unsqueeze(1)


# DSpark: DFlash's frames, and a bias that ties each of them to the token before it.
#
# Source: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation" (DeepSeek-AI and
# Peking University, 2026). The paper's sequential part is a low-rank table of the last token, `predictor_width` 0
# here; a width gives it the MLP over the two last tokens and the root's state that the CTC drafter has. The authors'
# loss is `teacher_score`, with DFlash's weights. Their confidence head, which shortens chains under load, is not needed
# where a tree's nodes are chosen by their probabilities.


class DSparkConfig(BlockConfig):
    """See `BlockConfig`; a block has `draft_length` masks.

    Args:
        predictor_rank: rank of the bias. predictor_width: of its MLP, 0 for the table of the last token alone.
    """

    model_type = "dspark_drafter"

    predictor_rank: int = 64
    predictor_width: int = 0

    def check(self) -> None:
        super().check()
        if self.predictor_rank < 1:
            raise UserError(f"predictor_rank is {self.predictor_rank}; give at least 1, or train dflash")


class DSparkDrafter(TokenFrames):
    """Frames that know the tokens before them through a bias."""

    config_class = DSparkConfig
    config: DSparkConfig
    predictor: Predictor

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        sizes = (config.vocab_size, config.hidden_size, config.predictor_rank, config.predictor_width)
        self.predictor = Predictor(*sizes)
        self.post_init()

    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """See `BlockModel.start_from`; with the CTC drafter's MLP it starts as that does, else as its authors' does."""
        super().start_from(norm_scale, head, embed)
        if self.config.predictor_width:
            self.predictor.start_from(head)

    def steps(self, states: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        logits, root_state = frame_logits(states, outputs[0]), self.predictor.root_state(states[:, 0])

        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            size, last = prefixes.shape[2], prefixes[:, :, -1]
            previous = prefixes[:, :, -2] if size > 1 else torch.full_like(last, -1)
            bias = self.predictor.output(self.predictor.state(previous, last, root_state, embed))
            return logits[:, size - 1].unsqueeze(1) + bias.float()

        return step

    def teacher_score(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The authors' sum: 0.1 log-probability of the label, less 0.9 of the summed differences to the teacher's."""
        likely = -fn.cross_entropy(logits, labels, reduction="none")
        return 0.1 * likely - 0.9 * (logits.softmax(-1) - teacher).abs().sum(-1)


# Block drafters with a frame for each drafted token: what DFlash and DSpark share.


@dataclass(frozen=True)
class FrameHeads(OutputHeads):
    """bias: what the predictor adds, for the search on a CPU; None elsewhere."""

    bias: LowRankBias | None = None
