"""`pack`: linear layers of a model on a CPU, with weights laid out once for oneDNN's kernels.

A product for several rows reads its weights in blocks. PyTorch makes these blocks anew at each call, in float32 and in
bfloat16, which costs more than the product for as few rows as a token tree has; here they are made once
(`docs/log.md`). bfloat16 is packed where the processor multiplies it. The layout is a second copy of the weights in
memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

MOST_BYTES = 2 * 2**30  # of weights that are laid out a second time
ROWS = 16  # rows of a product that the layout is chosen for


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    # PyTorch has no public question for this; a version without the private answer says no.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


class PackedLinear(nn.Linear):
    """A linear layer with its weights a second time, in blocks. Whatever else is asked of it, it is a linear layer."""

    blocks: Any

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """With the same parameters, which must not change afterwards."""
        packed = nn.utils.skip_init(cls, linear.in_features, linear.out_features, linear.bias is not None)
        packed.weight, packed.bias = linear.weight, linear.bias
        packed.blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        return packed.train(linear.training)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        plain = states.dtype != self.blocks.dtype or self.weight.dtype != self.blocks.dtype
        if (
            plain
            or states.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not states.numel()
        ):
            return super().forward(states)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, self.blocks, self.bias, "none", [], "")
        return output

    def linear(self) -> nn.Linear:
        """A plain linear layer with the same parameters."""
        plain = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None)
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        """A plain one: copies are made to be changed."""
        return copy.deepcopy(self.linear(), memo)


def can_pack(model: nn.Module) -> bool:
    """Whether all of its weights are on a CPU whose oneDNN packs their dtype, and few enough."""
    weights, dtypes = list(model.parameters()), [torch.float32]
    if multiplies_bfloat16():
        dtypes.append(torch.bfloat16)
    here = any(all(each.device.type == "cpu" and each.dtype == dtype for each in weights) for dtype in dtypes)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    kernels = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return here and 0 < size <= MOST_BYTES and kernels


@torch.no_grad()
def pack(model: nn.Module) -> int:
    """Replaces the linear layers of a model that `can_pack`; returns how many. Other models stay as they are."""
    if not can_pack(model):
        return 0
    found = [(parent, name) for parent in model.modules() for name, each in parent.named_children() if is_linear(each)]
    for parent, name in found:
        setattr(parent, name, PackedLinear.of(getattr(parent, name)))
    return len(found)


def unpack(model: nn.Module) -> None:
    """Undoes `pack`, for those who compute products in a way of their own: compiled graphs, exact steps."""
    for parent in model.modules():
        for name, each in parent.named_children():
            if isinstance(each, PackedLinear):
                setattr(parent, name, each.linear())


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and no more: torchao's have weights of another type, accelerate's a forward."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and not module.weight.is_meta
    return plain and not module._forward_hooks and "forward" not in vars(module)
