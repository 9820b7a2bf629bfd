"""Reads docs/families.md back: verdicts and outcomes of families as the page has them, to compare them one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.families import Verdict
from benchmarks.family_sweep import AS_IT_COMES, EXACT, Outcome
from benchmarks.family_table import Family
from ctc_drafter.target.checks import KERNELS
from ctc_drafter.target.model import CACHES

Rows = list[list[str]]


def tables(text: str) -> list[Rows]:
    """The rows of each Markdown table, without head and rule; escaped pipes are unescaped."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[cells(line) for line in block.splitlines()[2:]] for block in blocks]


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def verdicts_of(text: str) -> list[Verdict]:
    """What the page says of the common families, in its order."""
    taken, refused, *_ = tables(text)
    columns = [(cache, kernel) for cache in CACHES for kernel in KERNELS]
    found = [Verdict(name, "", dict(zip(columns, row, strict=True)), way) for name, way, *row in taken]
    return found + [Verdict(name, reason, {}) for name, reason in refused]


def outcomes_of(text: str, families: Sequence[Family]) -> list[Outcome]:
    """What the page says of these families, without those that it does not have. Raises `KeyError` for a family of the
    page that is not among them."""
    _, _, taken, refused, _ = tables(text)
    known = {family.name: family for family in families}
    found = {name: Outcome(known[name], reason) for name, reason in refused}
    for kind, names, way, output in taken:
        for rest in names.split("; "):
            name = kind if rest == AS_IT_COMES else f"{kind}, {rest}"
            found[name] = Outcome(known[name], "", () if output == EXACT else (output,), way)
    return [found[family.name] for family in families if family.name in found]
