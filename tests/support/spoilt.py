"""The product spoilt on purpose: what a test of losslessness must notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from benchmarks.family_checks import Cell, Plain, same
from ctc_drafter.decode import batch
from ctc_drafter.target import chain_cache
from ctc_drafter.target.cache import compact
from ctc_drafter.target.chain_cache import ChainCache
from ctc_drafter.target.model import Target

CELLS = (Cell(32, "always", 3), Cell(8, "sometimes", 3), Cell(32, "never", 3), Cell(32, "sometimes", 3))


class NoBranches(Target):
    """Every node of a tree sees all of its nodes."""

    def forward(self, tokens, positions, cache, allowed=None, key_positions=None, *rest, **options):
        if allowed is not None:
            allowed = allowed.clone()
            allowed[:, :, -tokens.shape[1] :] = True
        return super().forward(tokens, positions, cache, allowed, key_positions, *rest, **options)


class NoDepth(Target):
    """Every node of a tree stands where its root does."""

    def forward(self, tokens, positions, cache, allowed=None, key_positions=None, *rest, **options):
        if allowed is not None:
            positions = positions[:, :1].expand_as(positions)
        return super().forward(tokens, positions, cache, allowed, key_positions, *rest, **options)


class OneFurther(Target):
    """Every node of a tree stands one position too far."""

    def forward(self, tokens, positions, cache, allowed=None, key_positions=None, *rest, **options):
        if allowed is not None:
            positions = positions + 1
        return super().forward(tokens, positions, cache, allowed, key_positions, *rest, **options)


@contextmanager
def nothing_moves() -> Iterator[None]:
    """Accepted nodes stay in the slots where the tree put them."""

    def stay(cache, lengths, first, path, counts):
        compact(cache, lengths, first, torch.arange(path.shape[1]).expand_as(path), counts)

    with patch.object(batch, "compact", stay):
        yield


POSITIONS = {"depth ignored": NoDepth, "positions one further": OneFurther}
SPOILT = {"mask without branches": NoBranches} | POSITIONS


def unnoticed(target: Target, plain: Plain) -> list[str]:
    """The ways of spoiling that leave every text as it is."""
    left = [name for name, kind in SPOILT.items() if unchanged(kind(target.model, target.cache), plain)]
    with nothing_moves():
        return [*left, "nothing moves"] if unchanged(target, plain) else left


def nothing_is_cut(layer, before, drops, size) -> None:
    """Rejected tokens stay in the state."""
    cut(layer, before, [0] * len(drops), size)


def forgets_what_it_has_not_read(cache) -> None:
    """What was accepted behind the snapshot is not read again."""
    settle(cache)
    cache.unread = [[] for _ in cache.unread]


cut, settle = chain_cache.cut, ChainCache.settle


def unnoticed_in_chains(target: Target, plain: Plain) -> list[str]:
    """The ways of spoiling chains that leave every text as it is."""
    left = []
    with patch.object(chain_cache, "cut", nothing_is_cut):
        left += ["nothing is cut"] if unchanged(target, plain) else []
    if any(map(chain_cache.has_recurrent_states, read_once(target))):
        with patch.object(ChainCache, "settle", forgets_what_it_has_not_read):
            left += ["nothing is read again"] if unchanged(target, plain) else []
    return left


@torch.inference_mode()
def read_once(target: Target) -> list:
    """The layers of the target's cache after a first token."""
    cache = target.new_cache()
    cache.feed(target, [[5]])
    return cache.inner.layers


def unchanged(target: Target, plain: Plain) -> bool:
    """Whether every text is what it was. A forward that no longer fits its cache is noticed, too."""
    try:
        return all(same(target, plain, cell) for cell in CELLS)
    except RuntimeError:
        return False


@torch.inference_mode()
def knows_positions(target: Target) -> bool:
    """Whether stock logits change where the positions of a text have gaps."""
    row = torch.tensor([range(10, 20)])
    places = torch.arange(row.shape[1])[None]
    logits = [target.model(input_ids=row, position_ids=spread).logits for spread in (places, places * 2)]
    return not torch.allclose(logits[0], logits[1], atol=1e-3)
