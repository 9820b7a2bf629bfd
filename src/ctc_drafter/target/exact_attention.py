"""Attention whose rounding depends on a query and its keys in order of position alone, not on slots, tree or batch.

Keys of a tree lie in other slots than they would as plain text, and sums in another order round otherwise. Here the
keys that a query sees are always summed in the same parts. The *near* ones, in its own block of positions and the one
before, are gathered in order of position; that is where a tree's nodes are. The *far* ones lie where they always lie,
slot s at position s; they are taken in chunks of fixed size. Every product has a fixed shape but for how many of them
there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

NEAR = 64  # positions of a block; no tree may be deeper
FAR = 256  # slots of a chunk
QUERIES = 16  # of a product with far keys
HIDDEN = float("-inf")


@dataclass(frozen=True)
class Order:
    """Where the keys of a forward lie. near `int64 [B, T, 2*NEAR]`: slots of near keys in order of position, 0 where
    `missing`; start `int64 [B, T]`: the first near position, below which keys are far; far: slots of the far keys of
    any query, in whole chunks."""

    near: torch.Tensor
    missing: torch.Tensor
    start: torch.Tensor
    far: int


def order_of(allowed: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor) -> Order:
    """The order of keys at key_positions `int64 [B, S]` for queries at positions `int64 [B, T]`, which see the keys in
    allowed `bool [B, T, S]`; no two of them at one position."""
    start = (positions.div(NEAR, rounding_mode="floor") - 1).clamp(min=0) * NEAR
    offset = key_positions.unsqueeze(1) - start.unsqueeze(2)
    seen = allowed & (offset >= 0) & (offset < 2 * NEAR)
    slots = torch.arange(allowed.shape[2], device=allowed.device).expand_as(allowed)
    # What is not seen goes to a column behind the last one, which is dropped.
    near = slots.new_full((*positions.shape, 2 * NEAR + 1), -1)
    near = near.scatter(2, torch.where(seen, offset, 2 * NEAR), slots)[..., :-1]
    return Order(near.clamp(min=0), near < 0, start, -(-int(start.max()) // FAR) * FAR)


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float, order: Order
) -> torch.Tensor:
    """Attention of queries `[B, heads, T, D]` to keys and values `[B, kv_heads, S, D]` under an additive mask
    `[B, 1, T, S]`, computed in float32 and returned in the queries' dtype."""
    groups = queries.shape[1] // keys.shape[1]
    # [B, kv_heads, T, groups, D]
    asked = (queries.float() * scale).unflatten(1, (keys.shape[1], groups)).transpose(2, 3)
    scores = scores_by_slot(asked, keys, mask.float())
    near = scores.flatten(-2).gather(-1, order.near[:, None, :, None].expand(*scores.shape[:4], -1))
    near = near.masked_fill(order.missing[:, None, :, None], HIDDEN)
    most = near.amax(-1, keepdim=True)
    if order.far:
        slots = torch.arange(order.far, device=mask.device).view(-1, FAR)
        hidden = slots >= order.start[:, None, :, None, None, None]
        far = scores[..., : order.far // FAR, :].masked_fill(hidden, HIDDEN)
        most = torch.maximum(most, far.amax((-1, -2)).unsqueeze(-1))
    weights = (near - most).exp()
    total, mixed = weights.sum(-1), weights @ in_order(values, order)
    if order.far:
        found = far_sums((far - most.unsqueeze(-1)).exp(), values)
        total, mixed = found[0] + total, found[1] + mixed
    return (mixed / total.unsqueeze(-1)).transpose(2, 3).flatten(1, 2).to(queries.dtype)


def scores_by_slot(asked: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores `[B, kv_heads, T, groups, chunks, FAR]` of all keys, where they lie: each is a sum of its own."""
    slots = -(-keys.shape[2] // FAR) * FAR
    parts = chunked(keys, slots, 2).float().contiguous().transpose(-1, -2)  # [B, kv_heads, chunks, D, FAR]
    found = by_query(products(tiles(asked), parts), asked.shape[2], asked.shape[3])
    return found + chunked(mask, slots, 3, HIDDEN).unsqueeze(3)


def in_order(values: torch.Tensor, order: Order) -> torch.Tensor:
    """The near values of each query in order of position, `[B, kv_heads, T, 2*NEAR, D]`."""
    rows = torch.arange(len(values), device=values.device)[:, None, None]
    heads = torch.arange(values.shape[1], device=values.device)[:, None]
    found = values[rows, heads, order.near.flatten(1).unsqueeze(1)]
    return found.unflatten(2, order.near.shape[1:]).float()


def far_sums(weights: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of weights `[B, kv_heads, T, groups, chunks, FAR]`, and of values by them, chunk after chunk."""
    count, groups, chunks = weights.shape[2:5]
    parts = chunked(values, chunks * FAR, 2).float().contiguous()  # [B, kv_heads, chunks, FAR, D]
    mixed = (
        by_query(products(tiles(weights[:, :, :, :, chunk]), parts[:, :, chunk : chunk + 1]), count, groups).squeeze(4)
        for chunk in range(chunks)
    )
    return reduce(torch.add, weights.sum(-1).unbind(-1)), reduce(torch.add, mixed)


def chunked(states: torch.Tensor, slots: int, dimension: int, filler: float = 0.0) -> torch.Tensor:
    """The first slots, of dimension 2 or 3 of 4, in chunks, filled up where there are fewer."""
    states = states.narrow(dimension, 0, min(slots, states.shape[dimension]))
    missing = slots - states.shape[dimension]
    if missing:
        room = (0, missing) if dimension == 3 else (0, 0, 0, missing)
        states = torch.nn.functional.pad(states, room, value=filler)
    return states.unflatten(dimension, (-1, FAR))


def tiles(asked: torch.Tensor) -> torch.Tensor:
    """Rows of `[B, kv_heads, T, groups, D]` as tiles `[B, kv_heads, tiles, QUERIES, D]`, filled up with zeros."""
    rows = asked.flatten(2, 3)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[2] % QUERIES))
    return rows.unflatten(2, (-1, QUERIES)).contiguous()


def products(rows: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Each tile `[B, kv_heads, tiles, QUERIES, D]` with each part `[B, kv_heads, chunks, D, N]`: `[B, kv_heads, tiles,
    chunks, QUERIES, N]`."""
    return torch.stack([tile.unsqueeze(2).expand(-1, -1, parts.shape[2], -1, -1) @ parts for tile in rows.unbind(2)], 2)


def by_query(found: torch.Tensor, count: int, groups: int) -> torch.Tensor:
    """`products` as `[B, kv_heads, T, groups, chunks, N]`."""
    rows = found.transpose(2, 3).flatten(3, 4)[:, :, :, : count * groups]
    return rows.unflatten(3, (count, groups)).permute(0, 1, 3, 4, 2, 5).contiguous()
