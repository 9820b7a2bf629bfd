"""The drafters of a bench: those that a user named, or those that it trains itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctc_drafter.drafters.registry import method_of
from ctc_drafter.evaluate.ablations import ablation_entries, chosen_variants
from ctc_drafter.evaluate.bench import Entry
from ctc_drafter.evaluate.facts import facts
from ctc_drafter.evaluate.quick import TrainedAlike, recipes, selected, train_entries, with_lookup, work_folder
from ctc_drafter.load import load_drafter
from ctc_drafter.quickstart import DRAFTER_DIR
from ctc_drafter.target.model import Target


def open_entries(named: Mapping[str, str], target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Entry]:
    """An entry for each name and its folder or hub id; without any, the shipped drafter under its method's name."""
    if not named:
        shipped = load_drafter(None, target, tokenizer)
        return {method_of(shipped): Entry(shipped, facts(shipped, DRAFTER_DIR))}
    entries = {}
    for name, place in named.items():
        drafter = load_drafter(place, target, tokenizer)
        entries[name] = Entry(drafter, facts(drafter, Path(place) if Path(place).is_dir() else None))
    return entries


def chosen_entries(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    chosen: TrainedAlike | Mapping[str, str],
    tell: Callable[[str], None],
) -> dict[str, Entry]:
    """Entries of named drafters, or of trained ones; `tell` hears which one is being trained."""
    if not isinstance(chosen, TrainedAlike):
        return open_entries(chosen, target, tokenizer)
    if chosen.kind == "ablations":
        variants = chosen_variants(chosen.only)
        work = work_folder(chosen)
        return ablation_entries(target, tokenizer, variants, chosen.rows(), work, steps=chosen.steps, tell=tell)
    which = selected(recipes(), chosen.only)
    trained = train_entries(target, tokenizer, which, chosen.rows(), work_folder(chosen), steps=chosen.steps, tell=tell)
    return with_lookup(trained)
