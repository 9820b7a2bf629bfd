"""Nobody copies, or everybody does: drafters of a comparison with the same aids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.copying import ALL, NONE, OWN, drafting_alone, with_copies
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.evaluate.bench import Entry, longest_draft
from ctc_drafter.types import UserError

BOTH = (NONE, ALL)


def parse_copies(text: str) -> tuple[str, ...]:
    """`none,all` as modes; `own` alone. Raises `UserError` for others."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [part for part in found if part not in (*BOTH, OWN)]
    if unknown or not found or (OWN in found and len(found) > 1):
        wrong = unknown[0] if unknown else text
        raise UserError(f"--copies {wrong!r} is not known; give {NONE}, {ALL}, {NONE},{ALL} or {OWN}")
    return found


def as_told(drafter: Drafter, mode: str) -> Drafter:
    """One drafter without copies, with them, or as it is. Raises `UserError` where nothing would be left."""
    if mode == OWN:
        return drafter
    found = with_copies(drafter) if mode == ALL else drafting_alone(drafter)
    if found is None:
        raise UserError(f"this drafter does nothing but copy; leave --copies {mode} out, or give another --drafter")
    return found


def given_copies(entries: Mapping[str, Entry], modes: Sequence[str]) -> dict[str, Entry]:
    """The entries in each mode: `NAME` where nobody copies, `NAME, copies` where everybody does; facts say which.

    Prompt lookup, which does nothing but copy, is in the second only, under its own name. Raises `UserError` if no
    entry is left.
    """
    if tuple(modes) == (OWN,):
        return dict(entries)
    found: dict[str, Entry] = {}
    for mode in modes:
        for name, entry in entries.items():
            drafter = with_copies(entry.drafter) if mode == ALL else drafting_alone(entry.drafter)
            if drafter is None:
                continue
            known = entry.facts | {"copies": mode, "draft_length": longest_copied(drafter)}
            alone = mode == NONE or isinstance(drafter, PromptLookup)
            found[name if alone else f"{name}, copies"] = replace(entry, drafter=drafter, facts=known)
    if not found:
        raise UserError(f"these drafters do nothing but copy; give --copies {ALL}")
    return found


def longest_copied(drafter: Drafter) -> int | None:
    """The longest draft, copied or not; None where the drafter does not know."""
    try:
        own = longest_draft(drafter)
    except UserError:
        return None
    return max(own, getattr(getattr(drafter, "config", drafter), "lookup_length", 0))
