"""Predictor (prediction network): a low-rank bias on token logits given the drafted prefix.

m[prefix, v] = W2 · f(prefix), f(prefix) = table[last] + MLP(previous, last, root state). A stateless prediction
network as in transducers, of low rank, so that the normaliser of every (frame, prefix) is one matrix product.
The token that the text suggests as a copy gets more: an affine map, one for each length of the copy, of the MLP's
hidden layer. So it is learned when to trust copies, and how much beside what the frames say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.ctc.copies import Copies, Text, find_copies, newest_tokens
from ctc_drafter.ctc.search import Bias
from ctc_drafter.drafters.lm_head import token_columns

if TYPE_CHECKING:
    from ctc_drafter.ctc.search_cpu import LowRankBias

Embed = Callable[[torch.Tensor], torch.Tensor]  # tokens int64 [...] to the target's embeddings [..., H]


class Predictor(nn.Module):
    """vocab T, hidden size H, rank r, width M of the MLP, 0 for the table of the last token alone; V tokens to draft;
    the longest agreement of a copy that counts, 0 for no copies. Copies need the MLP.

    tied: table and W2 are maps of the target's embedding, `[r, H]` each in place of `[T, r]` and `[r, V]`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        rank: int,
        width: int,
        draft_vocab_size: int = 0,
        copies: int = 0,
        tied: bool = False,
    ):
        super().__init__()
        self.vocab_size, self.rank, self.width, self.tied = vocab_size, rank, width, tied
        self.table = nn.Linear(hidden_size, rank, bias=False) if tied else nn.Embedding(vocab_size, rank)
        if width:
            self.previous = nn.Linear(hidden_size, width, bias=False)
            self.last = nn.Linear(hidden_size, width, bias=False)
            self.root = nn.Linear(hidden_size, width)
            self.inner = nn.Linear(width, rank, bias=False)
        columns = (rank, draft_vocab_size or vocab_size)
        self.output = nn.Linear(hidden_size, rank) if tied else nn.Linear(*columns, bias=False)
        self.copying = nn.Linear(width, copies) if copies else None

    @torch.no_grad()
    def start_from(
        self, head: nn.Module, vocabulary: torch.Tensor | None = None, embed: nn.Module | None = None
    ) -> None:
        """The output matrix starts as the LM head's rows along their `rank` main directions.

        Tokens that the target tells apart little get biases that differ little from the first step on, where a random
        matrix has to learn so for each token. A tied one starts as the map of the embedding that comes nearest; without
        `embed` that is taken for the head's own. vocabulary `int64 [V]`: the tokens that are drafted, None for all. A
        quantised head changes nothing.
        """
        weight = getattr(head, "weight", None)
        if type(weight) is not nn.Parameter or weight.is_meta:
            return
        rows = (weight.detach() if vocabulary is None else weight.detach()[vocabulary]).float()
        centred, rank = rows - rows.mean(0), min(self.rank, rows.shape[1])
        main = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:]  # of the largest eigenvalues
        if not self.tied:
            self.output.weight[:, :rank] = (centred @ main).to(self.output.weight)
            return
        maps, shift = main, -(rows.mean(0) @ main)
        if embed is not None and getattr(embed, "weight", None) is not weight:
            maps, shift = nearest_map(embed(self.drafted(vocabulary)).float(), centred @ main)
        self.output.weight[:rank] = maps.T.to(self.output.weight)
        self.output.bias[:rank] = shift.to(self.output.bias)

    def output_rows(self, embed: Embed, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
        """The output matrix W2 `[V, r]`. vocabulary `int64 [V]`: the tokens that are drafted, None for all."""
        weight: torch.Tensor = self.output.weight
        if not self.tied:
            return weight
        found: torch.Tensor = self.output(embed(self.drafted(vocabulary)).to(weight.dtype))
        return found

    def drafted(self, vocabulary: torch.Tensor | None) -> torch.Tensor:
        """The tokens that are drafted, of all columns: `int64 [V]`."""
        return torch.arange(self.vocab_size, device=self.output.weight.device) if vocabulary is None else vocabulary

    def of_last(self, last: torch.Tensor, embed: Embed) -> torch.Tensor:
        """What the last token alone adds to f, `[..., r]`."""
        found: torch.Tensor = self.table(embed(last).to(self.table.weight.dtype) if self.tied else last)
        return found

    def root_state(self, start: torch.Tensor) -> torch.Tensor:
        """Projection of the block's output at the root for the MLP, `[B, H]`, `[B, M]`."""
        return self.root(start) if self.width else start[:, :0]

    def state(self, previous: torch.Tensor, last: torch.Tensor, root_state: torch.Tensor, embed: Embed) -> torch.Tensor:
        """f(prefix) `[B, W, r]`.

        previous and last `int64 [B, W]` are the two newest tokens of each prefix, the root included; previous
        is -1 where there is only the root. root_state `[B, M]` is that of the block's output at the root.
        """
        if not self.width:
            return self.of_last(last, embed)
        return self.of_last(last, embed) + self.inner(self.hidden(previous, last, root_state, embed))

    def hidden(
        self, previous: torch.Tensor, last: torch.Tensor, root_state: torch.Tensor, embed: Embed
    ) -> torch.Tensor:
        """The hidden layer of the MLP `[B, W, M]`; arguments as in `state`."""
        known = (previous >= 0).unsqueeze(-1)
        dtype = self.last.weight.dtype
        earlier = self.previous(embed(previous.clamp(min=0)).to(dtype)) * known
        return fn.silu(earlier + self.last(embed(last).to(dtype)) + root_state.unsqueeze(1))

    def bias(
        self,
        previous: torch.Tensor,
        last: torch.Tensor,
        root_state: torch.Tensor,
        embed: Embed,
        copies: Copies | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """m[prefix, v] `[B, W, V]`, float32; arguments as in `state`. copies `[B, W]`: columns in place of tokens.
        rows: those of `output_rows`, None for all tokens'."""
        rows = self.output_rows(embed) if rows is None else rows
        if self.copying is None or copies is None:
            return fn.linear(self.state(previous, last, root_state, embed), rows).float()
        hidden = self.hidden(previous, last, root_state, embed)
        bias = fn.linear(self.of_last(last, embed) + self.inner(hidden), rows).float()
        trust = self.copying(hidden).float().gather(-1, (copies.lengths - 1).clamp(min=0).unsqueeze(-1))
        trust = trust * ((copies.tokens >= 0) & (copies.lengths > 0)).unsqueeze(-1)
        return bias.scatter_add_(-1, copies.tokens.clamp(min=0).unsqueeze(-1), trust)

    def search_bias(
        self,
        start: torch.Tensor,
        embed: Embed,
        columns: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens,
        text: Text | None = None,
        rows: torch.Tensor | None = None,
    ) -> Bias:
        """What the search asks for, of block outputs at the root `[B, H]`.

        text: the rows up to their roots, without which nothing is copied; columns: of tokens, -1 for none.
        """
        root_state = self.root_state(start)

        def bias(recent: torch.Tensor) -> torch.Tensor:
            copies = None
            if self.copying is not None and text is not None:
                newest = newest_tokens(text, recent, self.copying.out_features)
                found = find_copies(text.tokens, text.ends.unsqueeze(1).expand(-1, recent.shape[1]), newest)
                copies = Copies(columns(found.tokens), found.lengths)
            return self.bias(recent[..., 1], recent[..., 0], root_state, embed, copies, rows)

        return bias

    def tables(self, embed: Embed, vocabulary: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The predictor as `search_cpu.LowRankBias` has it: both projections worked out for every token, W2 in int8.

        That moves a bias by about a hundredth of its size, and drafts need no precision.
        """
        tokens = torch.arange(self.vocab_size, device=self.output.weight.device)
        table = torch.cat([self.of_last(part, embed) for part in tokens.split(4096)]).float()
        earlier, later, inner = table[:, :0], table[:, :0], table.new_zeros(table.shape[1], 0)
        if self.width:
            weights = torch.cat([self.previous.weight, self.last.weight])
            # A few thousand tokens at a time: embeddings of a whole vocabulary can be large.
            parts = [fn.linear(embed(part).to(weights.dtype), weights) for part in tokens.split(4096)]
            earlier, later = torch.cat(parts).float().chunk(2, -1)
            inner = self.inner.weight.float()
        output = self.output_rows(embed, vocabulary).t().float()
        scale = output.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (output / scale.unsqueeze(1)).round().to(torch.int8)
        copying = (table[:0, :0], table[:0, 0])
        if self.copying is not None:
            copying = self.copying.weight.float(), self.copying.bias.float()
        return table, earlier, later, inner, scale, rounded, *copying


def nearest_map(vectors: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[H, R]` and c `[R]` with the least squares of vectors `[V, H]` @ A + c - wanted `[V, R]`."""
    mean = vectors.mean(0)
    centred = (vectors - mean).double()
    products = centred.T @ centred
    ridge = 1e-9 * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype, device=products.device)
    found = torch.linalg.solve(products + ridge, centred.T @ (wanted - wanted.mean(0)).double()).to(vectors.dtype)
    return found, wanted.mean(0) - mean @ found


@torch.no_grad()
def low_rank_bias(predictor: Predictor | None, embed: nn.Module, vocabulary: torch.Tensor | None = None) -> LowRankBias:
    """What the searches on a CPU read of a predictor; of rank 0 without one. vocabulary as in `search_head`."""
    from ctc_drafter.ctc.kernels_cpu import bfloat16_bits
    from ctc_drafter.ctc.search_cpu import LowRankBias

    nothing = torch.zeros(0, 0)
    if predictor is None:
        tables: tuple[torch.Tensor, ...] = (*(nothing,) * 4, torch.zeros(0), nothing.to(torch.int8))
    else:
        tables = (*predictor.tables(embed, vocabulary), token_columns(predictor.vocab_size, vocabulary))
    first, earlier, later, *rest = tables
    arrays = (table.contiguous().numpy() for table in rest)
    return LowRankBias(first.contiguous().numpy(), bfloat16_bits(earlier), bfloat16_bits(later), *arrays)
