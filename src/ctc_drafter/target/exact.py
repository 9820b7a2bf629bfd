"""Exact target (`--exact`): rounding that depends on no neighbour, so that trees write what plain steps write.

In bfloat16 a product of one row and one of seventeen may round differently, as may attention to keys in other slots,
and a real model has many near-ties. An `ExactTarget` computes decoding steps in ways whose rounding is each token's
own: products in sizes that are known to agree, attention in order of position (`exact_attention`), prompts one by one.
Nothing is stored on the model: its calls are redirected while a forward runs. Whether the kernels of a machine do
their part is tried at loading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode
from transformers import Cache

from ctc_drafter.target.cache import compact, join, placed
from ctc_drafter.target.exact_attention import NEAR, Order, attention, order_of
from ctc_drafter.target.model import Target
from ctc_drafter.target.self_test import trial_tokens
from ctc_drafter.types import UserError, Verification, first_line

TILE = 17  # rows of a product that others must agree with: a root and 16 nodes
SIZES = (1, 2, 4, 8, TILE, 2 * TILE, 3 * TILE, 4 * TILE, 8 * TILE)
REMEDY = "leave out --exact"
LINEAR, ATTENTION = fn.linear, fn.scaled_dot_product_attention  # what is redirected


@dataclass(frozen=True)
class ExactTarget(Target):
    """A `Target` whose decoding steps are bitwise the same in plain steps, trees and batches. Build it with
    `exact_target`.

    sizes: of products whose rows agree, bit for bit, on this machine; others are filled up.
    """

    alone: ClassVar[bool] = True

    sizes: tuple[int, ...] = (TILE,)

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        allowed: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        layers: Sequence[int] = (),
        keep: torch.Tensor | None = None,
        long: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> Verification:
        """See `Target.forward`. Prompts are computed as ever: each is read alone, the same way by everybody."""
        if keep is not None or (allowed is None and tokens.shape[1] > 1):
            return super().forward(tokens, positions, cache, allowed, key_positions, layers, keep, long, shift)
        if tokens.shape[1] > NEAR + 1:
            raise UserError(f"exact trees have at most {NEAR} nodes; give --nodes {NEAR}, or {REMEDY}")
        if allowed is None or key_positions is None:
            key_positions = torch.arange(cache.get_seq_length() + 1, device=tokens.device).expand(len(tokens), -1)
            allowed = torch.ones_like(key_positions, dtype=torch.bool).unsqueeze(1)
        with Redirected(self.sizes, order_of(allowed, positions, key_positions)) as redirected:
            found = super().forward(tokens, positions, cache, allowed, key_positions, layers, keep, long, shift)
        if redirected.attended < len(cache.layers):
            raise UserError(f"this model's attention is not PyTorch's scaled_dot_product_attention; {REMEDY}")
        return found


class Redirected(TorchFunctionMode):
    """While open, this thread's linear layers and attention are computed in the exact way."""

    def __init__(self, sizes: tuple[int, ...], order: Order):
        super().__init__()
        self.sizes, self.order, self.attended = sizes, order, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is LINEAR:
            return linear(self.sizes, *args, **kwargs)
        if func is ATTENTION:
            self.attended += 1
            return self.attend(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is None or attn_mask.dtype is torch.bool or attn_mask.shape[1] != 1 or dropout_p or is_causal:
            raise UserError(f"this model's attention takes no mask of the usual kind; {REMEDY}")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        # transformers packs the heads of a single token's query into rows where it has a mask.
        queries = query.reshape(len(query), -1, self.order.near.shape[1], query.shape[-1])
        return attention(queries, key, value, attn_mask, scale, self.order).reshape(*query.shape[:3], -1)


def linear(
    sizes: tuple[int, ...], states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`fn.linear` of states `[..., K]` in products of these sizes alone."""
    rows = states.reshape(-1, states.shape[-1])
    parts = [product(sizes, part, weight, bias) for part in rows.split(sizes[-1])]
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found.view(*states.shape[:-1], -1)


def product(
    sizes: tuple[int, ...], rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    count = len(rows)
    size = next(each for each in sizes if each >= count)
    if size > count:
        rows = fn.pad(rows, (0, 0, 0, size - count))
    return multiplied(rows, weight, bias)[:count]


def multiplied(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What a kernel makes of exactly these rows `[M, K]`."""
    return LINEAR(rows, weight, bias)


# The trial: what the kernels of this machine must do for it.


def exact_target(target: Target) -> ExactTarget:
    """The target in exact mode, after a trial of its products, and of short steps and trees.

    Raises `UserError` for a target that cannot be: compiled, with static caches, or where kernels round otherwise.
    """
    name = type(target.model).__name__
    if target.compiled or target.cache != "dynamic":
        raise UserError("exact steps are neither compiled nor in static caches; leave out --compile or --exact")
    if target.chain is not None:
        raise UserError(f"{name} follows chains with a recurrent state, which exact steps do not; {REMEDY}")
    sizes = agreeing_sizes(target)
    if TILE not in sizes:
        raise UserError(f"here a row of a {target.dtype} product depends on its place in it; {REMEDY}")
    made = ExactTarget(target.model, sizes=sizes)
    try:
        found = difference(made)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever a model does with its attention
        raise UserError(f"{name} fails in exact steps ({first_line(failure)}); {REMEDY}") from failure
    if found:
        raise UserError(f"{name} rounds {found} otherwise than single plain steps; {REMEDY}")
    return made


@torch.inference_mode()
def agreeing_sizes(target: Target) -> tuple[int, ...]:
    """The `SIZES` of products whose rows are, bit for bit, those of a product of `TILE` rows, in every place."""
    shapes: dict[tuple[int, ...], torch.Tensor] = {}
    for module in target.model.modules():
        if type(module) is torch.nn.Linear and module.weight.is_floating_point():
            shapes.setdefault((*module.weight.shape, *module.weight.stride()), module.weight)
    good = set(SIZES)
    for weight in shapes.values():
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(SIZES[-1], weight.shape[1], generator=generator).to(weight)
        expected = torch.cat([multiplied(part.roll(1, 0), weight).roll(-1, 0) for part in rows.split(TILE)])
        for size in tuple(good):
            same = torch.cat([multiplied(part, weight) for part in rows.split(size)[: max(1, 2 * TILE // size)]])
            if not torch.equal(same, expected[: len(same)]):
                good.discard(size)
    return tuple(sorted(good))


CUTS = (0, 4, 9)  # tokens that the rows of the trial's batch lack at their beginning
BRANCHES = ((0, 1, 2, 3), (0, 5, 2, 7))  # where the plain text's nodes are in two trees of 8


@torch.inference_mode()
def difference(target: ExactTarget) -> str:
    """What differs, in words, by a single bit from plain steps of one row; nothing if all is well.

    The text reaches beyond what is near, and the steps cross a block of positions.
    """
    length = min(2 * NEAR - 2, target.limit - 5)
    if length < 2 * max(CUTS):
        return ""
    text = trial_tokens(length + 5, target.vocab_size).to(target.device)
    plain = [plain_steps(target, text[cut:]) for cut in CUTS]
    if not torch.equal(plain[0], tree_logits(target, text, BRANCHES[0])):
        return "a chain"
    if not torch.equal(plain[0], tree_logits(target, text, BRANCHES[1])):
        return "a tree"
    if not all(torch.equal(a, b) for a, b in zip(plain, batched_steps(target, text), strict=True)):
        return "a batch"
    return ""


def prefilled(target: ExactTarget, text: torch.Tensor) -> Cache:
    """A cache of one row with all but the last five tokens of a text."""
    read, cache = text[None, :-5], target.new_cache(len(text))
    positions = torch.arange(read.shape[1], device=text.device)
    target.forward(read, positions.unsqueeze(0), cache, keep=positions[-1:])
    return cache


def plain_steps(target: ExactTarget, text: torch.Tensor) -> torch.Tensor:
    """Logits `[4, V]` of four plain steps, after the tokens -5 to -2 of a text."""
    cache, places = prefilled(target, text), torch.arange(len(text), device=text.device).unsqueeze(1)
    steps = zip(text[-5:-1, None, None], places[-5:-1, None], strict=True)
    return torch.cat([target.forward(token, place, cache).logits[0] for token, place in steps])


def tree_logits(target: ExactTarget, text: torch.Tensor, nodes: tuple[int, ...]) -> torch.Tensor:
    """The same of one tree of 8, where the text's tokens are a path at these nodes and the others hang on the root; and
    after it was compacted and its last token taken back, of a plain step."""
    cache, device, length = prefilled(target, text), text.device, len(text) - 5
    tokens = text[:8].clone()
    depths = torch.ones(8, dtype=torch.long, device=device)
    ancestors = torch.eye(8, dtype=torch.bool, device=device)
    ancestors[:, 0] = True
    for depth, node in enumerate(nodes):
        tokens[node], depths[node] = text[length + depth], depth
        ancestors[node, list(nodes[: depth + 1])] = True
    positions = (length + depths).unsqueeze(0)
    cached = torch.arange(length, device=device).unsqueeze(0)
    allowed = torch.cat([torch.ones(8, length, dtype=torch.bool, device=device), ancestors], 1).unsqueeze(0)
    key_positions = torch.cat([cached, positions], 1)
    logits = target.forward(tokens.unsqueeze(0), positions, cache, allowed, key_positions).logits[0, list(nodes)]
    lengths, path = torch.tensor([length], device=device), torch.tensor([nodes[:3]], device=device)
    compact(cache, lengths, length, path, torch.tensor([2], device=device))
    last = target.forward(text[None, -2:-1], lengths.unsqueeze(0) + 3, cache).logits[0]
    return torch.cat([logits[:3], last])


def batched_steps(target: ExactTarget, text: torch.Tensor) -> list[torch.Tensor]:
    """As `plain_steps`, of the rows of a batch whose texts begin later."""
    rows = [text[cut:] for cut in CUTS]
    cache = prefilled(target, rows[0])
    for row in rows[1:]:
        join(cache, prefilled(target, row))
    found = []
    for step in range(4):
        lengths = torch.tensor([[len(row) - 5 + step] for row in rows], device=text.device)
        end = int(lengths.max()) + 1
        key_positions = torch.arange(end, device=text.device).expand(len(rows), -1)
        tokens = torch.stack([row[len(row) - 5 + step] for row in rows]).unsqueeze(1)
        with placed(cache, lengths, end):
            allowed = (key_positions <= lengths).unsqueeze(1)
            found.append(target.forward(tokens, lengths, cache, allowed, key_positions).logits[:, 0])
    return list(torch.stack(found, 1))
