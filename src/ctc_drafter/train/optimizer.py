"""Optimizers of training: AdamW, or Muon for hidden layers' matrices with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from ctc_drafter.train.settings import TrainSettings

# Muon's learning rate over AdamW's: its updates have AdamW's usual size at 1 (`match_rms_adamw`).
MUON_RATE = 3.0
SMALLEST = 32  # rows and columns of a matrix that is worth orthogonalising


class MuonAndAdamW(Optimizer):
    """Two optimizers as one, for trainers and schedulers that know one. Its parameter groups are theirs.

    Source of Muon: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/; of the mix, and of the learning
    rate that fits both: Liu et al., "Muon is Scalable for LLM Training" (2025).
    """

    def __init__(self, muon: Muon, adamw: AdamW):
        self.parts: tuple[Optimizer, ...] = (adamw, muon)  # the log shows the first one's learning rate
        super().__init__([group for part in self.parts for group in part.param_groups], adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # loading makes new ones


def hidden_matrices(model: nn.Module, vocabularies: Iterable[int]) -> set[str]:
    """Names of the matrices of linear layers between hidden states: no embeddings, no layers that score tokens.

    vocabularies: sizes of the target's and the drafter's vocabulary.
    """
    outputs = set(vocabularies)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features not in outputs
        and min(module.weight.shape) >= SMALLEST
        and module.weight.requires_grad
    }


def muon_and_adamw(
    model: nn.Module, vocabularies: Iterable[int], decayed: Iterable[str], settings: TrainSettings
) -> MuonAndAdamW:
    """decayed: names of the parameters with weight decay."""
    matrices, weights = hidden_matrices(model, vocabularies), dict(model.named_parameters())
    others = {name: weight for name, weight in weights.items() if weight.requires_grad and name not in matrices}
    with_decay = set(decayed)
    groups = [
        {"params": [w for name, w in others.items() if name in with_decay], "weight_decay": settings.weight_decay},
        {"params": [w for name, w in others.items() if name not in with_decay], "weight_decay": 0.0},
    ]
    rate = settings.learning_rate
    muon = Muon(
        [weights[name] for name in sorted(matrices)],
        lr=MUON_RATE * rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, AdamW(groups, lr=rate, betas=(0.9, settings.adam_beta2)))
