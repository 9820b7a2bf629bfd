"""Drafting heads on the target's last hidden state: the base class of Medusa and Hydra, and Medusa."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.drafters.base import Committed, DraftSession, Step, TrainedSession
from ctc_drafter.drafters.baselines.chain_rule import StepwiseDrafter
from ctc_drafter.drafters.config import DrafterConfig
from ctc_drafter.drafters.layers import RMSNorm
from ctc_drafter.drafters.lm_head import DraftHead, head_logits
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.types import Candidates, UserError

# Drafters whose heads read the target's last hidden state: what Medusa and Hydra share.


class HeadsConfig(DrafterConfig):
    """Head k drafts the k-th token after the root, `draft_length` heads in all.

    Args:
        target_layer_ids: one block, the target's last.
        num_hidden_layers: residual layers of a head.
        own_outputs: each head has an output matrix of its own, which starts as the target's LM head; without, all
            share that one, frozen and not stored.
        rms_norm_eps: of the norm that takes the place of the target's final one.
    """

    model_type = "heads_drafter"

    draft_length: int = 5
    num_hidden_layers: int = 1
    own_outputs: bool = True
    rms_norm_eps: float = 1e-6

    def check(self) -> None:
        super().check()
        if len(self.target_layer_ids) != 1:
            raise UserError(
                f"target_layer_ids {self.target_layer_ids} must name one block: heads read one hidden state"
            )
        if self.num_hidden_layers < 1:
            raise UserError(f"num_hidden_layers is {self.num_hidden_layers}; a head needs at least 1")


class HeadsDrafter(StepwiseDrafter):
    """Draft states are hidden states `[B, A, H]`: of the token before each anchor's root, behind the norm."""

    def __init__(self, config: HeadsConfig):
        super().__init__(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.own = None
        if config.own_outputs:
            matrices = (
                nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(config.draft_length)
            )
            self.own = nn.ModuleList(matrices)

    @classmethod
    def feature_choice(cls, depth: int) -> list[int]:
        return [depth - 1]

    @torch.no_grad()
    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """The norm starts as the target's final one, own output matrices as its LM head."""
        if norm_scale is not None:
            self.norm.weight.copy_(norm_scale)
        weight = getattr(head, "weight", None)
        if self.own is not None and type(weight) is nn.Parameter:  # a quantised one cannot be learnt on
            for own in self.own.parameters():
                own.copy_(weight)

    def outputs(self, head: nn.Module) -> Sequence[nn.Module]:
        return super().outputs(head) if self.own is None else list(self.own)

    def states(self, features: torch.Tensor) -> torch.Tensor:
        """What heads read of features `[B, T, H]`."""
        return self.norm(features)

    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """See `TrainableDrafter.draft_states`. A root that begins its text has nothing before it: zeros for a state."""
        return before(self.states(features), anchors)

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""
        return LastStateSession(self, self.states, self.prepared(embed, head))


def before(states: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """States `[B, A, H]` of the tokens before anchors `int64 [B, A]`, of states `[B, T, H]`; zeros before the first."""
    index = (anchors - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states.gather(1, index) * (anchors > 0).unsqueeze(-1)


class LastStateSession(TrainedSession):
    """Keeps the state `[B, H]` of each row's newest committed token: what `states` makes of its features."""

    newest: torch.Tensor

    def __init__(self, drafter: TrainableDrafter, states: Callable[[torch.Tensor], torch.Tensor], head: DraftHead):
        super().__init__()
        self.drafter, self.states, self.head = drafter, states, head

    def take_in(self, committed: Committed) -> None:
        """See `TrainedSession.take_in`."""
        self.newest = self._newest(committed)

    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        """See `TrainedSession.draft`."""
        return self.drafter.candidates(self.newest, root, self.head, nodes, min_probability)

    def add_rows(self, committed: Committed) -> None:
        """See `TrainedSession.add_rows`."""
        self.newest = torch.cat([self.newest, self._newest(committed)])

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `TrainedSession.keep_rows`."""
        self.newest = self.newest[rows]

    def _newest(self, committed: Committed) -> torch.Tensor:
        assert committed.features is not None
        return self.states(before(committed.features, committed.counts.unsqueeze(1)))[:, 0]


# Medusa: independent residual heads on the target's last hidden state.
#
# Source: Cai, Li, Geng, Peng, Lee, Chen and Dao, "Medusa: Simple LLM Inference Acceleration Framework with Multiple
# Decoding Heads" (ICML 2024), Medusa-1: the target is frozen. Head k is x + SiLU(W x), W starting at 0, and an output
# matrix that starts as the LM head; its loss weighs decay^(k-1), 0.8 in the paper. The paper picks a fixed tree by
# the heads' accuracies; here each step has the best tree under the product of their probabilities.


class MedusaConfig(HeadsConfig):
    """See `HeadsConfig`."""

    model_type = "medusa_drafter"


class ResidualLayer(nn.Linear):
    """x + SiLU(W x + b). W and b start at 0, so that x goes through unchanged."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + fn.silu(super().forward(states))


class MedusaDrafter(HeadsDrafter):
    """Head k sees the last hidden state and no drafted token."""

    config_class = MedusaConfig
    config: MedusaConfig

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        size, depth = config.hidden_size, config.num_hidden_layers
        heads = (nn.Sequential(*(ResidualLayer(size, size) for _ in range(depth))) for _ in range(config.draft_length))
        self.heads = nn.ModuleList(heads)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLayer):
            nn.init.zeros_(module.weight)

    def steps(self, states: torch.Tensor, embed: nn.Module, outputs: Sequence[nn.Module]) -> Step:
        def step(prefixes: torch.Tensor, _places: torch.Tensor | None) -> torch.Tensor:
            head = prefixes.shape[2] - 1
            return head_logits(outputs[head], self.heads[head](states)).unsqueeze(1)

        return step
