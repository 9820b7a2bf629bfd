"""Copied tokens: the continuation of the longest earlier match with a prefix.

Texts repeat names, phrases and numbers. Of a prefix and the text before it take the newest tokens, and find the place
earlier in the text that agrees with most of them, up to `longest`; among equals the newest place. What follows it is
the copy. Places lie in the text up to the root: a prefix never copies from itself.

This is prompt lookup (Saxena, 2023) asked anew for every prefix of a search, so that its answer can be weighed against
everything else that is known of the next token; pointer networks (See et al., 2017) learn where to look instead.

Worked example, text `a b c a b`, root the last `b`, longest 3. After the root: `a b` agrees at 0..1, the copy is c,
length 2. After `c`: `a b c` agrees at 0..2, the copy is a, length 3. After `b d`: nothing, length 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

NOTHING = -1  # no token
OUTSIDE = -2  # no token either, and equal to none
PLACES_AT_A_TIME = 2**25  # that are compared with prefixes of a training batch, five bytes each


@dataclass(frozen=True)
class Text:
    """tokens `int64 [B, T]`: each row's text; its root stands at `ends int64 [B]`, and what lies behind is garbage."""

    tokens: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class Copies:
    """tokens `int64 [...]`: what each prefix would copy, -1 for nothing; lengths `int64 [...]`: tokens that agree."""

    tokens: torch.Tensor
    lengths: torch.Tensor


def find_copies(tokens: torch.Tensor, ends: torch.Tensor, newest: torch.Tensor) -> Copies:
    """The copies `[B, Q]` of Q prefixes in each row.

    tokens `int64 [B, T]`; ends `int64 [B, Q]`: places of the prefixes' roots; newest `int64 [B, Q, longest]`: their
    newest tokens and those of the text before, the newest first, -1 where there are none. Of static shape.
    """
    size = tokens.shape[1]
    text, newest = tokens.int(), newest.int()
    places = torch.arange(size, dtype=torch.int32, device=tokens.device)
    agrees = places < ends.unsqueeze(-1)  # [B, Q, T], place t: the text up to and with t against the newest tokens
    lengths = torch.zeros_like(agrees, dtype=torch.int32)
    for back in range(newest.shape[2]):
        earlier = pad(text, (back, 0), value=OUTSIDE)[:, :size]
        agrees = agrees & (newest[..., back, None] == earlier.unsqueeze(1))
        lengths += agrees
    best = (lengths * size + places).argmax(-1, keepdim=True)
    longest = lengths.gather(-1, best).squeeze(-1).long()
    copied = tokens.gather(1, (best.squeeze(-1) + 1).clamp(max=size - 1))
    return Copies(copied.masked_fill(longest == 0, NOTHING), longest)


def newest_tokens(text: Text, recent: torch.Tensor, longest: int) -> torch.Tensor:
    """The newest tokens of prefixes, `int64 [B, Q, longest]`, with the text before: -1 where there is none.

    recent `int64 [B, Q, R]`: tokens of each prefix and its root, the newest first, -1 behind the root.
    """
    drafted = (recent >= 0).sum(-1, keepdim=True)  # the root is one of them
    steps = torch.arange(longest, device=recent.device)
    place = text.ends.view(-1, 1, 1) + drafted - 1 - steps
    before = text.tokens.gather(1, place.clamp(0, text.tokens.shape[1] - 1).flatten(1)).view_as(place)
    own = pad(recent, (0, max(longest - recent.shape[2], 0)), value=NOTHING)[..., :longest]
    return torch.where(steps < drafted, own, before.masked_fill(place < 0, NOTHING))


def copies_at(tokens: torch.Tensor, positions: torch.Tensor, draft_length: int, longest: int) -> torch.Tensor:
    """Copies of prefixes of the text itself, for training: `int64 [B, A, 1+U, 2]`, tokens and lengths of `Copies`.

    tokens `int64 [B, T]`; positions `int64 [B, A]` of the roots; prefix u of U = `draft_length` has the u next tokens.
    """
    some = max(1, PLACES_AT_A_TIME // (tokens.numel() * (draft_length + 1)))
    parts = [_copies_at(tokens, part, draft_length, longest) for part in positions.split(some, 1)]
    return torch.cat(parts, 1)


def _copies_at(tokens: torch.Tensor, positions: torch.Tensor, draft_length: int, longest: int) -> torch.Tensor:
    steps = torch.arange(draft_length + 1, device=tokens.device)
    newest = (positions.unsqueeze(-1) + steps).flatten(1)
    ends = positions.repeat_interleave(len(steps), 1)
    place = newest.unsqueeze(-1) - torch.arange(longest, device=tokens.device)
    known = tokens.gather(1, place.clamp(0, tokens.shape[1] - 1).flatten(1)).view_as(place)
    found = find_copies(tokens, ends, known.masked_fill(place < 0, NOTHING))
    return torch.stack([found.tokens, found.lengths], -1).unflatten(1, (positions.shape[1], len(steps)))
