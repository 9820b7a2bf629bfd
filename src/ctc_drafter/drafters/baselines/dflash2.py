"""DFlash 2: DFlash's block with dynamic convolutions, and a selector that scores pairs of neighbouring candidates.

Source: Z Lab, "DFlash 2" (2026), as its authors' code (z-lab/dflash, `dflash/model.py`), NeMo AutoModel
(`components/speculative/dflash/draft_qwen3_dflash2.py`) and vllm-project/speculators (`models/dflash2/`) have it.
Tensor names and config keys are theirs, so that published checkpoints load (`dflash_format.py`).

Around attention and around the MLP of each layer a place of the block is mixed with the one before it:

    out_t = (base_0 + d_t,0) x_t + (base_1 + d_t,1) x_(t-1)

with bases for each channel, and corrections d for groups of channels. What goes in has its own bases, and so has what
comes out, but both corrections are projected from what goes in. It starts as the identity: a trained DFlash goes on.

Frame u offers its `selector_top_k` likeliest tokens. After token w of the frame before (or the root), v of them scores

    logit_u[v] + <predecessor[w] * (P h_u), successor[v]>

for the frame's state h_u; softmax over the candidates is P(v | w). The authors walk one path greedily; here each step
has the best tree under the chain rule. The loss is DFlash's on the frames' logits, and beside it the cross-entropy of
the token among the candidates, the weakest of which makes room for it where it is not one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as fn
from transformers import PreTrainedConfig

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.base import Step
from ctc_drafter.drafters.baselines.chain_rule import OutputHeads, StepwiseDrafter, cross_entropy, expand, tempered
from ctc_drafter.drafters.block import BlockConfig, BlockModel, frame_logits
from ctc_drafter.drafters.layers import Context, CosSin, DraftLayer
from ctc_drafter.drafters.lm_head import needed_size, target_probabilities
from ctc_drafter.drafters.trainable import LossInputs, LossOptions
from ctc_drafter.types import Candidates, UserError


class DFlash2Config(BlockConfig):
    """See `BlockConfig`; a block has `draft_length` masks.

    Args:
        conv_kernel_size: places that a convolution mixes, its own and those before. conv_group_size: channels that
            share a correction; it divides `hidden_size`.
        selector_rank: of the pair scores; 256 in published checkpoints, whose vocabularies are larger.
        selector_top_k: candidates of a frame.
    """

    model_type = "dflash2_drafter"

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 64
    selector_top_k: int = 16

    def check(self) -> None:
        super().check()
        if not 1 <= self.conv_kernel_size <= 1 + self.draft_length:
            raise UserError(f"conv_kernel_size is {self.conv_kernel_size}; give 1 to {1 + self.draft_length}")
        if self.conv_group_size < 1 or self.hidden_size % self.conv_group_size:
            raise UserError(f"conv_group_size {self.conv_group_size} does not divide hidden_size {self.hidden_size}")
        if self.selector_rank < 1:
            raise UserError(f"selector_rank is {self.selector_rank}; give at least 1, or train dflash")
        if not 1 <= self.selector_top_k <= self.vocab_size:
            raise UserError(f"selector_top_k is {self.selector_top_k}; give 1 to {self.vocab_size}")
        if self.convolution:
            raise UserError("dflash2 has convolutions of its own; leave convolution out")


class KernelProjection(nn.Linear):
    """From a place to the corrections of its kernels; it starts at 0."""


class ConvolutionPair(nn.Module):
    """The convolutions before and after one branch of a layer."""

    def __init__(self, width: int, taps: int, group: int):
        super().__init__()
        self.taps, self.groups = taps, width // group
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, width))
        with torch.no_grad():
            self.base_kernel[:, 0] = 1.0
        self.kernel_projection = KernelProjection(width, 2 * taps * self.groups, bias=False)

    def before(self, states: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the branch reads of states `[B, A*size, H]`, and the corrections for `after`, `[B, A*size, taps, G]`.

        Blocks of `size` places lie one behind the other, and do not see each other.
        """
        corrections = self.kernel_projection(states).unflatten(-1, (2, self.taps, self.groups))
        return self._mixed(states, corrections[..., 0, :, :], self.base_kernel[0], size), corrections[..., 1, :, :]

    def after(self, states: torch.Tensor, corrections: torch.Tensor, size: int) -> torch.Tensor:
        """What the branch adds to the residual stream, of its output `[B, A*size, H]`."""
        return self._mixed(states, corrections, self.base_kernel[1], size)

    def _mixed(self, states: torch.Tensor, corrections: torch.Tensor, base: torch.Tensor, size: int) -> torch.Tensor:
        blocks = states.unflatten(1, (-1, size)).unflatten(-1, (self.groups, -1))
        kernels = base.to(states.dtype).unflatten(-1, (self.groups, -1)) + corrections.unsqueeze(-1)
        kernels = kernels.unflatten(1, (-1, size))
        total = blocks * kernels[..., 0, :, :]
        for tap in range(1, self.taps):
            earlier = fn.pad(blocks, (0, 0, 0, 0, tap, 0))[:, :, :size]
            total = total + earlier * kernels[..., tap, :, :]
        return total.flatten(-2).flatten(1, 2)


class DFlash2Layer(DraftLayer):
    """DFlash's layer with convolutions around its branches."""

    def __init__(self, config: DFlash2Config):
        super().__init__(config)
        sizes = config.hidden_size, config.conv_kernel_size, config.conv_group_size
        self.attention_conv, self.mlp_conv = ConvolutionPair(*sizes), ConvolutionPair(*sizes)

    def forward(
        self, states: torch.Tensor, rotary: CosSin, context: Context, mask: torch.Tensor | None, size: int = 0
    ) -> torch.Tensor:
        """See `DraftLayer.forward`."""
        normed, corrections = self.attention_conv.before(self.input_layernorm(states), size)
        keys, values = context(*self.self_attn.keys_values(normed, rotary))
        attended = self.self_attn(normed, rotary, keys, values, mask)
        states = states + self.attention_conv.after(attended, corrections, size)
        normed, corrections = self.mlp_conv.before(self.post_attention_layernorm(states), size)
        return states + self.mlp_conv.after(self.mlp(normed), corrections, size)


class CandidateSelector(nn.Module):
    """Scores of a token after another one, given the state of the token's frame."""

    def __init__(self, config: DFlash2Config):
        super().__init__()
        shape = config.vocab_size, config.selector_rank
        self.predecessor_codebook = nn.Parameter(0.02 * torch.randn(shape))
        self.successor_codebook = nn.Parameter(0.02 * torch.randn(shape))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def forward(self, states: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Float32 `[..., W, K]` of tokens `int64 [..., K]` after each of `previous int64 [..., W]`, for frames whose
        states are `[..., H]`."""
        projected = self.hidden_projection(states).unsqueeze(-2)
        left = self.predecessor_codebook[previous].to(projected.dtype) * projected
        return (left @ self.successor_codebook[tokens].to(projected.dtype).transpose(-1, -2)).float()


class DFlash2Drafter(StepwiseDrafter, BlockModel):
    """Frames, and pairs of their candidates."""

    config_class = DFlash2Config
    config: DFlash2Config

    def __init__(self, config: DFlash2Config):
        super().__init__(config)
        self.layers = nn.ModuleList(DFlash2Layer(config) for _ in range(config.num_hidden_layers))
        self.candidate_selector = CandidateSelector(config)
        self.post_init()

    @classmethod
    def for_target(cls, target: PreTrainedConfig, **overrides: Any) -> Self:
        """See `TrainableDrafter.for_target`. Groups are smaller where the hidden size asks for it."""
        hidden = needed_size(target.get_text_config(decoder=True), "hidden_size")
        return super().for_target(target, **{"conv_group_size": math.gcd(16, hidden)} | overrides)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KernelProjection):
            nn.init.zeros_(module.weight)

    def steps(self, states: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        """Logits of every token, -inf but for the candidates of a frame."""
        logits = frame_logits(states, outputs[0])
        unary, tokens = logits.topk(self.config.selector_top_k, -1)

        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            frame = prefixes.shape[2] - 1
            pairs = self.candidate_selector(states[:, 1 + frame], prefixes[:, :, -1], tokens[:, frame])
            scores = unary[:, frame].unsqueeze(1) + pairs
            places = tokens[:, frame].unsqueeze(1).expand_as(scores)
            return logits.new_full((*scores.shape[:2], logits.shape[2]), -torch.inf).scatter(2, places, scores)

        return step

    def candidates(
        self,
        states: torch.Tensor,
        root: torch.Tensor,
        heads: OutputHeads,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """See `TrainableDrafter.candidates`. The tree is looked for among places of candidates, not tokens: few."""
        unary, tokens = frame_logits(states, heads.outputs[0]).topk(self.config.selector_top_k, -1)
        first = unary[:, 0].unsqueeze(1) + self.candidate_selector(states[:, 1], root.unsqueeze(1), tokens[:, 0])
        later = unary[:, 1:].unsqueeze(2) + self.candidate_selector(states[:, 2:], tokens[:, :-1], tokens[:, 1:])

        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            if prefixes.shape[2] == 1:
                return first
            last = prefixes[:, :, -1:].expand(-1, -1, tokens.shape[2])
            return later[:, prefixes.shape[2] - 2].gather(1, last)

        step_at = tempered(step, self.config.score_temperature)
        found = expand(step_at, root, nodes=nodes, depth=tokens.shape[1], min_probability=min_probability)
        places = (found.depths - 1) * tokens.shape[2] + found.tokens
        return replace(found, tokens=tokens.flatten(1).gather(1, places))

    def loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """See `ChainDrafter.loss`, of the frames alone; and the selector's cross-entropy."""
        logits, labels = frame_logits(inputs.states, head), inputs.prefixes[:, 1:]
        selected = self.selected(inputs.states, logits, inputs.prefixes)
        with torch.autocast(inputs.states.device.type, enabled=False):
            if options.loss == "teacher":
                assert inputs.last is not None
                frames = -fn.cross_entropy(
                    logits.flatten(0, 1), target_probabilities(head, inputs.last).flatten(0, 1), reduction="none"
                )
            else:
                frames = -fn.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            frames = frames.view_as(selected)
            found, pairs = (cross_entropy(part, inputs.valid, options.decay) for part in (frames, selected))
            return found + pairs

    def selected(self, states: torch.Tensor, logits: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        """log P(y_u | y(u-1)) among the candidates, float32 `[N, U]`; y_u has the weakest one's place if it is none."""
        labels = prefixes[:, 1:, None]
        tokens = logits.topk(self.config.selector_top_k, -1).indices
        among = tokens == labels
        last = torch.where(among.any(-1, keepdim=True), tokens[..., -1:], labels)
        tokens = torch.cat([tokens[..., :-1], last], -1)
        pairs = self.candidate_selector(states[:, 1:], prefixes[:, :-1, None], tokens)[..., 0, :]
        scores = (logits.gather(-1, tokens) + pairs).log_softmax(-1)
        return scores.masked_fill(tokens != labels, -torch.inf).amax(-1)
