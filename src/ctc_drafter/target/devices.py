"""Models over several devices (`device_map` of accelerate): offloaded embeddings, an LM head on another device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ctc_drafter.types import UserError

# accelerate moves what each layer reads to the layer's device. What is read beside that, features, keys and values, and
# the LM head by a drafter, is moved here: `.to` does nothing where all of it is on one device.


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Raises `UserError` for a model that is on no device: one without weights, or whose embedding is offloaded."""
    if model.device.type != "meta":
        return
    name = type(model).__name__
    if getattr(model, "hf_device_map", None) is None:
        raise UserError(f"the {name} has no weights yet, only shapes (meta device); load it with from_pretrained")
    raise UserError(f"the embedding of {name} is offloaded; give a device_map that leaves it on a device")


class OnAnotherDevice(nn.Module):
    """A module whose weights lie on another device than what it reads; its output comes back to where that was."""

    def __init__(self, inner: nn.Module, device: torch.device):
        super().__init__()
        self.inner, self.place = inner, device

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(states.to(self.place))
        return output.to(states.device)


def reachable_from(device: torch.device, module: nn.Module) -> nn.Module:
    """The module, so that it reads from and writes to this device wherever its own weights are; None stays None, where
    a model hands out no LM head."""
    weights: Iterable[nn.Parameter] = getattr(module, "parameters", tuple)()
    places = {weight.device for weight in weights} - {device}
    other = next((place for place in places if place.type != "meta"), None)  # offloaded ones come by themselves
    return module if other is None else OnAnotherDevice(module, other)
