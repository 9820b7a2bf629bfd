"""Attention to cached and new keys in two parts, with exact sums, as an operation that OpenVINO converts."""

from __future__ import annotations

import math
from typing import Any

import torch

# Attention in two parts, as an operation of its own, so that the exporter does not take it to pieces.
#
# Where products are of 8-bit numbers, a difference in the last bit of attention may round an activation to another
# number, which is then seen in the logits. So sums over keys must not depend on where keys lie, in a tree or as plain
# text. Here they do not, because they are exact: all terms are multiples of one step, few enough for the 24 bits of a
# float32, and a sum without rounding has no order. Weights of attention are split into two parts of 12 and 8 bits, and
# values are rounded to 12 bits of a range that is known beforehand, `grid` being their step.

HIGH, LOW = 2.0**12, 2.0**8
VALUE_BITS = 11  # and a sign
MARGIN = 4  # values may be so many times as large as those of the trial text before sums may round


@torch.library.custom_op("ctc_drafter::attention_in_parts", mutates_args=())
def attention_in_parts(
    query: torch.Tensor,
    past_keys: torch.Tensor,
    keys: torch.Tensor,
    past_values: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    sizes: list[int],
    exact: bool,
) -> torch.Tensor:
    """Grouped-query attention to cached and new keys `[B, K, S, D]` and `[B, K, T, D]`.

    query `[B, H, T, D]`, H a multiple of K; mask `[B, 1, T, S + T]`, added to the scores; sizes: H, K, D and D'. exact:
    whether sums over keys are exact, for values that are multiples of a step. Returns `[B, H, T, D']`.
    """
    rows, count, past = query.shape[0], query.shape[2], past_keys.shape[2]
    heads, kv_heads, size, value_size = sizes
    groups = heads // kv_heads
    grouped = (query * scale).reshape(rows, kv_heads, groups * count, size)
    scores = torch.cat([grouped @ past_keys.transpose(2, 3), grouped @ keys.transpose(2, 3)], -1)
    scores = scores + mask.repeat(1, 1, groups, 1)
    weights = torch.cat(split_weights(scores), 2) if exact else scores.softmax(-1)
    found = weights[..., :past] @ past_values + weights[..., past:] @ values
    if exact:
        high, low = found.chunk(2, 2)
        found = (high * LOW + low) / (HIGH * LOW)
    return found.reshape(rows, heads, count, value_size)


def grid_for(largest: float) -> float:
    """The step for values of up to `MARGIN` times this: a power of two, so that multiplying by it does not round."""
    return 2.0 ** (math.ceil(math.log2(max(largest, 2.0**-100) * MARGIN)) - VALUE_BITS)


def split_weights(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of scores as whole numbers: how often 1 / HIGH, and how often 1 / (HIGH * LOW) is left."""
    terms = (scores - scores.amax(-1, keepdim=True)).exp() * HIGH
    high = terms.round()
    low = ((terms - high) * HIGH).round()
    total = high.sum(-1, keepdim=True) * HIGH + low.sum(-1, keepdim=True)
    shares = (high * HIGH + low) / total * HIGH
    whole = shares.round()
    return whole, ((shares - whole) * LOW).round()


@attention_in_parts.register_fake
def _(query: Any, *inputs: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], inputs[6][3])


def convert_attention(context: Any) -> list[Any]:
    """`attention_in_parts` in OpenVINO's operations: a handful of nodes with batched products."""
    from openvino import opset13 as op

    query, past_keys, keys, past_values, values, mask = (context.get_input(index) for index in range(6))
    scale = context.get_values_from_const_input(6)
    heads, kv_heads, size, value_size = (int(each) for each in context.get_values_from_const_input(7))
    exact = bool(context.get_values_from_const_input(8))
    groups = heads // kv_heads

    def number(value: float) -> Any:
        return op.constant(float(value), dtype="float32")

    def length(states: Any) -> Any:
        return op.gather(op.shape_of(states), op.constant([2]), op.constant(0))

    def whole(states: Any) -> Any:
        return op.round(states, "half_to_even")

    # 0 keeps the dimension; the tokens of heads that share a key become rows of one product
    grouped = op.reshape(op.multiply(query, number(scale)), op.constant([0, kv_heads, -1, size]), True)
    scores = op.concat([op.matmul(grouped, past_keys, False, True), op.matmul(grouped, keys, False, True)], 3)
    scores = op.add(scores, op.concat([mask] * groups, 2) if groups > 1 else mask)
    if exact:  # as in `split_weights`
        last = op.constant([3])
        terms = op.multiply(op.exp(op.subtract(scores, op.reduce_max(scores, last, True))), number(HIGH))
        high = whole(terms)
        low = whole(op.multiply(op.subtract(terms, high), number(HIGH)))
        total = op.multiply(op.reduce_sum(high, last, True), number(HIGH))
        total = op.add(total, op.reduce_sum(low, last, True))
        shares = op.divide(op.add(op.multiply(high, number(HIGH)), low), total)
        shares = op.multiply(shares, number(HIGH))
        rounded_shares = whole(shares)
        rest = whole(op.multiply(op.subtract(shares, rounded_shares), number(LOW)))
        weights = op.concat([rounded_shares, rest], 2)
    else:
        weights = op.softmax(scores, 3)
    parts = op.variadic_split(weights, op.constant(3), op.concat([length(past_keys), length(keys)], 0))
    found = op.add(
        op.matmul(parts.output(0), past_values, False, False), op.matmul(parts.output(1), values, False, False)
    )
    if exact:
        halves = op.split(found, op.constant(2), 2)
        found = op.add(op.multiply(halves.output(0), number(LOW)), halves.output(1))
        found = op.multiply(found, number(1 / (HIGH * LOW)))
    shape = op.concat([op.constant([0, heads]), length(query), op.constant([value_size])], 0)
    return op.reshape(found, shape, True).outputs()
