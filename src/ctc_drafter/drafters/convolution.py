"""`DynamicConvolution`: two-tap causal convolution over a block whose kernels depend on its input.

Parallel drafters fill the places of a block independently. Attention mixes them by content; this mixes each place with
the one before it: out_t = k0_t x_t + k1_t x_{t-1}, with corrections shared by groups of channels.
Source: DFlash 2 (Z Lab, 2026), `GroupedDynamicCausalConv`; lightweight and dynamic convolutions (Wu et al., 2019).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import linear, pad

GROUP = 16  # channels that share a kernel's correction


class DynamicConvolution(nn.Module):
    """Kernels are a learned base per channel, plus a correction per group, projected from the input.

    It starts as the identity, so that layers that were trained without it can go on with it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.groups = width // math.gcd(width, GROUP)
        self.base = nn.Parameter(torch.zeros(2, width))  # k0 - 1 and k1
        self.correction = nn.Parameter(torch.zeros(2 * self.groups, width))

    def forward(self, states: torch.Tensor, size: int) -> torch.Tensor:
        """states `[B, A*size, H]`: blocks of `size` places one behind the other, which do not see each other."""
        blocks = states.unflatten(1, (-1, size))
        earlier = pad(blocks, (0, 0, 1, 0))[:, :, :-1].flatten(1, 2)
        change = linear(states, self.correction).unflatten(-1, (2, self.groups, 1))
        base = self.base.view(2, self.groups, -1)
        now, before = (1 + base[0] + change[..., 0, :, :], base[1] + change[..., 1, :, :])
        return states * now.flatten(-2) + earlier * before.flatten(-2)
