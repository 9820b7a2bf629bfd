"""Linear layers whose product is an operator that compilers leave alone, with weights laid out by oneDNN.

Inductor packs weights itself only as constants of a graph ("freezing"): then no two layers share a graph, and none is
kept on disk. Here packed weights are an argument, of a type that compilers pass on without a look.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.library import Library, register_fake
from transformers.pytorch_utils import Conv1D

from ctc_drafter.target.packed import ROWS, PackedLinear, is_linear


class Blocks(OpaqueBase):
    """A matrix `[out, in]` in blocks of oneDNN's, for products with few rows."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Blocks:
        """Of a dense matrix, which is copied."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS))

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Code is kept on disk under a hash of what it was made for, and any blocks will do."""
        return str, ("blocks",)


register_opaque_type(Blocks, typ="reference")
OPERATORS = Library("ctc_drafter", "DEF")
OPERATORS.define(f"linear(Tensor states, {get_opaque_type_name(Blocks)} blocks, Tensor? bias, SymInt size) -> Tensor")


def product(states: torch.Tensor, blocks: Blocks, bias: torch.Tensor | None, _size: int) -> torch.Tensor:
    """`states [..., in]` times the matrix, plus `bias [out]`: `[..., out]`, in the dtype of all three."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, blocks.tensor, bias, "none", [], "")
    return output


def product_like(states: torch.Tensor, _blocks: Any, _bias: torch.Tensor | None, size: int) -> torch.Tensor:
    """Shape of a `product`, for compilers."""
    return states.new_empty(*states.shape[:-1], size)


OPERATORS.impl("linear", product, "CPU")
register_fake("ctc_drafter::linear", product_like, lib=OPERATORS)


class OpaqueLinear(nn.Linear):
    """A linear layer whose weights lie in `Blocks`; for inference alone."""

    blocks: Blocks

    @classmethod
    def of(cls, layer: nn.Module) -> OpaqueLinear:
        """In place of a layer that `can_replace`, with its parameters."""
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        assert isinstance(weight, torch.Tensor)
        made = nn.utils.skip_init(cls, weight.shape[1], weight.shape[0], bias=False)
        made.weight, made.bias = layer.weight, layer.bias
        made.blocks = Blocks(layer.blocks) if isinstance(layer, PackedLinear) else Blocks.of(weight)
        return made.train(layer.training)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.ctc_drafter.linear.default(states, self.blocks, self.bias, self.out_features)
        return output


def can_replace(layer: nn.Module) -> bool:
    """Whether it is a linear layer, or GPT-2's transposed one, of a dtype that oneDNN packs on this CPU."""
    if not (isinstance(layer, PackedLinear) or type(layer) is Conv1D or is_linear(layer)):
        return False
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def opaque_twin(model: nn.Module) -> nn.Module:
    """A copy of a model over the same weights, buffers and configurations, with `OpaqueLinear`s where they can be."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [module.config for module in model.modules() if hasattr(module, "config")]
    known: dict[int, Any] = {id(each): each for each in shared}
    known |= {id(layer): OpaqueLinear.of(layer) for layer in model.modules() if can_replace(layer)}
    return copy.deepcopy(model, known)
