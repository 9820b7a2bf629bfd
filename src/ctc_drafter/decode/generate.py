"""The decoding loop, and plain decoding, which is its oracle."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from ctc_drafter.decode.accept import accept_greedy
from ctc_drafter.decode.cache import compact
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.decode.stats import Stats, Stopwatch
from ctc_drafter.decode.tree import build_tree
from ctc_drafter.decode.verify import verify
from ctc_drafter.decode.writer import OnTokens, Writer
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target import Target
from ctc_drafter.types import UserError

DEFAULT_NODES = 8
DEFAULT_FLOOR = 0.03


@dataclass(frozen=True)
class Generation:
    """tokens: the new tokens of each row, eos included where it was written. stats: see `Stats`."""

    tokens: list[list[int]]
    stats: Stats


@torch.inference_mode()
def generate(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    nodes: int = DEFAULT_NODES,
    floor: float = DEFAULT_FLOOR,
    eos: Collection[int] = (),
    on_tokens: OnTokens | None = None,
    timed: bool = False,
) -> Generation:
    """The target's greedy continuation of each prompt, drafted in trees of up to `nodes` nodes.

    Prefixes less likely than `floor` are not worth the time that a node adds to a verification.

    `on_tokens(row, tokens)` is called with what each verification emits. Rows may differ in length and finish
    at different times; a finished row leaves the batch. Output stops at the target's context.
    Raises `UserError` for prompts or settings that cannot be decoded.
    """
    check_settings(max_new_tokens, nodes, floor)
    begin, clock, stats = time.perf_counter(), Stopwatch(target.device, timed), Stats()
    with clock("prefill"):
        state = prefill(target, prompts, drafter.feature_layers)
        session = drafter.begin(target.embed, target.head, len(prompts))
        session.extend(state.tokens, state.features, state.lengths)
    cache, lengths, root = state.cache, state.lengths, state.root
    writer = Writer(limits(target, prompts, max_new_tokens), eos, stats, on_tokens)
    places = writer.start(root.tolist())
    stats.prefill_seconds = time.perf_counter() - begin

    while places:
        if len(places) < len(root):
            rows = torch.tensor(places, device=target.device)
            cache.batch_select_indices(rows)
            session.select(rows)
            lengths, root = lengths[rows], root[rows]
        with clock("draft"):
            candidates = session.propose(root, nodes, floor)
        with clock("tree"):
            tree = build_tree(root, candidates, nodes, floor)
        with clock("verify"):
            slots = cache.get_seq_length()
            verification = verify(target, cache, lengths, tree, drafter.feature_layers)
        with clock("accept"):
            acceptance = accept_greedy(tree, verification.logits)
            counts = acceptance.counts.tolist()
            path = acceptance.path[:, : max(counts) + 1]
        with clock("compact"):
            compact(cache, lengths, slots, path, acceptance.counts)
        with clock("draft"):
            session.extend(*committed(tree.tokens, verification.features, path), acceptance.counts + 1)
        lengths, root = lengths + acceptance.counts + 1, acceptance.bonus
        places = writer.write(acceptance.tokens.tolist(), counts)

    stats.seconds, stats.stages_ms = time.perf_counter() - begin, dict(clock.total_ms)
    return Generation(writer.tokens, stats)


@torch.inference_mode()
def plain_generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    on_tokens: OnTokens | None = None,
    timed: bool = False,
) -> Generation:
    """Greedy decoding, a token a step, with the same kernel, cache and stopping rules as `generate`."""
    check_settings(max_new_tokens)
    begin, clock, stats = time.perf_counter(), Stopwatch(target.device, timed), Stats()
    with clock("prefill"):
        state = prefill(target, prompts)
    cache, lengths, root = state.cache, state.lengths, state.root
    writer = Writer(limits(target, prompts, max_new_tokens), eos, stats, on_tokens)
    places = writer.start(root.tolist())
    stats.prefill_seconds = time.perf_counter() - begin
    path = torch.zeros(len(root), 1, dtype=torch.long, device=target.device)

    while places:
        if len(places) < len(root):
            rows = torch.tensor(places, device=target.device)
            cache.batch_select_indices(rows)
            lengths, root, path = lengths[rows], root[rows], path[rows]
        with clock("verify"):
            slots = cache.get_seq_length()
            logits = step(target, cache, lengths, root)
        with clock("compact"):
            compact(cache, lengths, slots, path, torch.zeros_like(lengths))
        lengths, root = lengths + 1, logits[:, -1].argmax(-1)
        places = writer.write(root.unsqueeze(1).tolist(), [0] * len(root))

    stats.seconds, stats.stages_ms = time.perf_counter() - begin, dict(clock.total_ms)
    return Generation(writer.tokens, stats)


def step(target: Target, cache: Cache, lengths: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Logits `[B, 1, V]` after one more token per row. Rows that fill the cache need no mask."""
    tokens, positions, slots = root.unsqueeze(1), lengths.unsqueeze(1), cache.get_seq_length()
    if bool((lengths == slots).all()):
        return target.forward(tokens, positions, cache).logits
    cached = torch.arange(slots, device=lengths.device).expand(len(root), -1)
    seen = torch.cat([cached < positions, torch.ones_like(positions, dtype=torch.bool)], 1)
    return target.forward(tokens, positions, cache, seen.unsqueeze(1), torch.cat([cached, positions], 1)).logits


def committed(
    tokens: torch.Tensor, features: torch.Tensor | None, path: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and features of the path's nodes, which have entered the cache."""
    if features is not None:
        features = features.gather(1, path.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    return tokens.gather(1, path), features


def limits(target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """New tokens that each row may have: as asked, or as many as its context still holds."""
    return [min(max_new_tokens, target.context - len(prompt)) for prompt in prompts]


def check_settings(max_new_tokens: int, nodes: int = 1, floor: float = 0.0) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    if nodes < 1:
        raise UserError(f"nodes is {nodes}; give at least 1, or use plain_generate")
    if not 0 <= floor < 1:
        raise UserError(f"floor is {floor}; give a probability, at least 0 and below 1")
