"""Sum of a loss over chunks of anchors, with gradients computed chunk by chunk: no second forward pass.

What is as large as the vocabulary exists for one chunk at a time. Gradient checkpointing gives that, too, and computes
each chunk's logits twice; here the gradients of a chunk are taken at once and kept, which are no larger than the states
and weights that they belong to. Source of the idea: Liger Kernel's fused linear cross-entropy (Hsu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

Part = Callable[[torch.Tensor, int], torch.Tensor]  # states of a chunk, number of the chunk -> its loss, a scalar


def chunked_sum(part: Part, states: torch.Tensor, size: int, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Sum of `part` over the states `[N, ...]`, `size` of them at a time: a scalar with the same gradients.

    parameters: all that `part` may use beside the states; those that need no gradient, or get none, are left alone.
    """
    chunks = states.split(size)
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.stack([part(chunk, number) for number, chunk in enumerate(chunks)]).sum()
    weights = [weight for weight in parameters if weight.requires_grad]
    sums: list[torch.Tensor | None] = [None] * len(weights)
    values, of_states = [], []
    for number, chunk in enumerate(chunks):
        own = chunk.detach().requires_grad_()
        # As a view: hooks on what modules are given, as those of `FlopCounterMode`, take no leaves under `grad`.
        value = part(own.view_as(own), number)
        found, *rest = torch.autograd.grad(value, [own, *weights], allow_unused=True)
        values.append(value.detach())
        of_states.append(torch.zeros_like(own) if found is None else found)
        sums = [added(sum_, each) for sum_, each in zip(sums, rest, strict=True)]
    used = [(weight, each) for weight, each in zip(weights, sums, strict=True) if each is not None]
    inputs, gradients = [states, *(weight for weight, _ in used)], [torch.cat(of_states), *(each for _, each in used)]
    total: torch.Tensor = WithGradients.apply(torch.stack(values).sum(), gradients, *inputs)
    return total


def added(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    return more if total is None else total if more is None else total + more


class WithGradients(torch.autograd.Function):
    """A value whose gradients for some inputs are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: Sequence[torch.Tensor], *_inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(gradient * outer[0] for gradient in ctx.saved_tensors)
