"""The same drafters with shorter drafts: a method that pays for every token has a depth that suits it best."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.evaluate.bench import Entry
from ctc_drafter.types import UserError


def at_depths(entries: Mapping[str, Entry], depths: Sequence[int]) -> dict[str, Entry]:
    """An entry for each drafter and depth that it can draft; `of` among its facts is the drafter's own name.

    Without depths the entries as they are. Raises `UserError` if a drafter drafts fewer tokens than every depth.
    """
    if not depths:
        return dict(entries)
    found = {}
    for name, entry in entries.items():
        longest = longest_draft(entry.drafter)
        fit = [depth for depth in depths if depth <= longest]
        if not fit:
            raise UserError(f"{name} drafts {longest} tokens at most; give --depths one that is not more")
        for depth in fit:
            known = entry.facts | {"of": name, "draft_length": depth}
            found[f"{name}, depth {depth}"] = replace(entry, drafter=shortened(entry.drafter, depth), facts=known)
    return found


def longest_draft(drafter: Drafter) -> int:
    """Tokens. Raises `UserError` for a drafter that does not know."""
    found = drafter.config if isinstance(drafter, TrainableDrafter) else drafter
    if not hasattr(found, "draft_length"):
        raise UserError(f"{type(drafter).__name__} has no depth; leave it out, or leave out --depths")
    return int(found.draft_length)


def shortened(drafter: Drafter, depth: int) -> Drafter:
    """A drafter on the same weights with drafts of at most `depth` tokens, copies of the text included.

    Heads beyond the depth are not asked, EAGLE makes as many passes, blocks of DFlash and DSpark have as many masks;
    CTC fills all its frames and searches them for shorter prefixes.
    """
    if isinstance(drafter, PromptLookup):
        return replace(drafter, draft_length=depth)
    assert isinstance(drafter, TrainableDrafter)
    twin = copy.copy(drafter)
    twin.config, twin._borrowed = copy.copy(drafter.config), None
    twin.config.draft_length = depth
    if getattr(twin.config, "lookup_length", 0):
        twin.config.lookup_length = min(depth, twin.config.lookup_length)
    return twin


def parse_depths(text: str) -> tuple[int, ...]:
    """`3,5,7` as numbers. Raises `UserError` for others."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not (part.isdecimal() and int(part) > 0):
            raise UserError(f"--depths {part} is no depth; give numbers from 1, with commas between them")
    return tuple(dict.fromkeys(map(int, parts)))
