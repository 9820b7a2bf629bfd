"""`JointNetwork`: terms for each frame's likeliest tokens, from its state and the predictor's together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as fn

from ctc_drafter.ctc.joint import JointOfPrefixes, JointTerms
from ctc_drafter.drafters.predictor import Embed, Predictor

if TYPE_CHECKING:
    from ctc_drafter.ctc.search_cpu import FrameTerms


class JointNetwork(nn.Module):
    """g[t, p, v] = E(v) · silu(A s(t) + B h(p)) of rank J: frame states s `[H]`, the predictor's hidden layer h `[M]`,
    E a map of the target's embedding of v `[H]`. E starts at 0, so that a drafter begins without joint terms.

    tokens: of each frame that get a term, its likeliest by its own logits.
    """

    def __init__(self, hidden_size: int, width: int, rank: int, tokens: int):
        super().__init__()
        self.count = tokens
        self.frame = nn.Linear(hidden_size, rank)
        self.prefix = nn.Linear(width, rank, bias=False)
        self.token = TokenMap(hidden_size, rank, bias=False)

    def columns(self, frame_logits: torch.Tensor) -> torch.Tensor:
        """The tokens that get a term, as places in frame logits `[N, F, V]`: `int64 [N, F, K]`."""
        return frame_logits.detach().topk(min(self.count, frame_logits.shape[-1]), sorted=False).indices

    def terms(
        self, states: torch.Tensor, hidden: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor, embed: Embed
    ) -> JointTerms:
        """Terms after each prefix: states `[N, F, H]`, hidden layers of the predictor `[N, P, M]`, columns from
        `columns`; tokens `int64 [V]`: of all columns."""
        return JointTerms(columns, self.values(self.frame(states), self.vectors(columns, tokens, embed), hidden))

    def values(self, frames: torch.Tensor, vectors: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """g `[N, P, F, K]`, float32, of frames `[N, F, J]` from `frame` and of `vectors`."""
        mixed = fn.silu(frames.unsqueeze(1) + self.prefix(hidden).unsqueeze(2))
        return torch.einsum("npfj,nfkj->npfk", mixed, vectors.to(mixed.dtype)).float()

    def vectors(self, columns: torch.Tensor, tokens: torch.Tensor, embed: Embed) -> torch.Tensor:
        """E of the tokens of columns `int64 [N, F, K]`, `[N, F, K, J]`: one by one, or all tokens' where those are
        fewer (in training, where many anchors share them)."""
        if columns.numel() < len(tokens):
            return self.token_vectors(tokens[columns], embed)
        return fn.embedding(columns, self.token_vectors(tokens, embed))

    def token_vectors(self, tokens: torch.Tensor, embed: Embed) -> torch.Tensor:
        """E of tokens `int64 [...]`, `[..., J]`."""
        found: torch.Tensor = self.token(embed(tokens).to(self.token.weight.dtype))
        return found


class TokenMap(nn.Linear):
    """Starts at 0."""


def joint_of_prefixes(
    joint: JointNetwork,
    predictor: Predictor,
    states: torch.Tensor,
    frame_logits: torch.Tensor,
    tokens: torch.Tensor,
    embed: Embed,
    temperature: float = 1.0,
) -> JointOfPrefixes:
    """What the level-by-level search asks for: of block outputs `[B, 1+F, H]`, frame logits `[B, F, V]` and the tokens
    of their columns `int64 [V]`. What does not depend on the prefix is worked out once, not for each level."""
    root_state, columns = predictor.root_state(states[:, 0]), joint.columns(frame_logits)
    frames, vectors = joint.frame(states[:, 1:]), joint.vectors(columns, tokens, embed) / temperature

    def values(recent: torch.Tensor) -> torch.Tensor:
        hidden = predictor.hidden(recent[..., 1], recent[..., 0], root_state, embed)
        return joint.values(frames, vectors, hidden)

    return JointOfPrefixes(columns, values)


@torch.no_grad()
def joint_tables(
    joint: JointNetwork, embed: Embed, tokens: torch.Tensor, temperature: float
) -> Callable[[torch.Tensor, torch.Tensor], FrameTerms]:
    """What the search on a CPU reads of frame logits `[B, F, V]` and block outputs at the frames `[B, F, H]`. E is
    worked out here for every column's token `int64 [V]`."""
    from ctc_drafter.ctc.search_cpu import FrameTerms

    vectors = torch.cat([joint.token_vectors(part, embed) for part in tokens.split(4096)]).float() / temperature
    prefix = joint.prefix.weight.float().contiguous().numpy()

    def terms(frame_logits: torch.Tensor, states: torch.Tensor) -> FrameTerms:
        columns = joint.columns(frame_logits)
        own, frames = vectors[columns], joint.frame(states).float()
        return FrameTerms(columns.contiguous().numpy(), own.numpy(), frames.contiguous().numpy(), prefix)

    return terms
