"""What a prefix says about its next token: the bias that ties independent frames together.

m[prefix, v] = W2 · f(prefix), f(prefix) = table[last] + MLP(previous, last, root state). A stateless prediction
network as in transducers, of low rank, so that the normaliser of every (frame, prefix) is one matrix product.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.ctc.search import Bias


class Predictor(nn.Module):
    """vocab T, hidden size H, rank r, width of the MLP, 0 for the table of the last token alone; V tokens to draft."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, width: int, draft_vocab_size: int = 0):
        super().__init__()
        self.table = nn.Embedding(vocab_size, rank)
        self.width = width
        if width:
            self.previous = nn.Linear(hidden_size, width, bias=False)
            self.last = nn.Linear(hidden_size, width, bias=False)
            self.root = nn.Linear(hidden_size, width)
            self.inner = nn.Linear(width, rank, bias=False)
        self.output = nn.Linear(rank, draft_vocab_size or vocab_size, bias=False)

    def root_state(self, start: torch.Tensor) -> torch.Tensor:
        """What the MLP takes from the block's output at the root `[B, H]`, `[B, M]`."""
        return self.root(start) if self.width else start[:, :0]

    def state(
        self, previous: torch.Tensor, last: torch.Tensor, root_state: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """f(prefix) `[B, W, r]`.

        previous and last `int64 [B, W]` are the two newest tokens of each prefix, the root included; previous
        is -1 where there is only the root. root_state `[B, M]` is that of the block's output at the root.
        """
        if not self.width:
            return self.table(last)
        known = (previous >= 0).unsqueeze(-1)
        dtype = self.last.weight.dtype
        earlier = self.previous(embed(previous.clamp(min=0)).to(dtype)) * known
        inner = fn.silu(earlier + self.last(embed(last).to(dtype)) + root_state.unsqueeze(1))
        return self.table(last) + self.inner(inner)

    def bias(self, start: torch.Tensor, embed: nn.Module) -> Bias:
        """What the search asks for, of block outputs at the root `[B, H]`."""
        root_state, output = self.root_state(start), self.output.weight.t()
        return lambda previous, last: self.state(previous, last, root_state, embed) @ output

    def tables(self, embed: nn.Module) -> tuple[torch.Tensor, ...]:
        """The predictor as `best_first.LowRankBias` has it: both projections worked out for every token, W2 in int8.

        That moves a bias by about a hundredth of its size, and drafts need no precision.
        """
        table = self.table.weight.float()
        earlier, later, inner = table[:, :0], table[:, :0], table.new_zeros(table.shape[1], 0)
        if self.width:
            tokens = torch.arange(len(table), device=table.device)
            weights = torch.cat([self.previous.weight, self.last.weight])
            # A few thousand tokens at a time: embeddings of a whole vocabulary can be large.
            parts = [fn.linear(embed(part).to(weights.dtype), weights) for part in tokens.split(4096)]
            earlier, later = torch.cat(parts).float().chunk(2, -1)
            inner = self.inner.weight.float()
        output = self.output.weight.t().float()
        scale = output.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (output / scale.unsqueeze(1)).round().to(torch.int8)
        return table, earlier, later, inner, scale, rounded
