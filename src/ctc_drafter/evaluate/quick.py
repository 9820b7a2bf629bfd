"""Small drafters of every method, trained alike for a minute each: what `bench --quick` compares."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import FOR_ABLATIONS, PROMPT_LOOKUP, TRAINED, fresh_drafter, trained_method
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.evaluate.bench import BenchSettings, Entry
from ctc_drafter.evaluate.facts import facts
from ctc_drafter.quickstart import SAMPLE_DIR
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError

# The same for all: longest draft, text, steps, learning rate; losses are the methods' own. A minute each on two cores.
SIZES: dict[str, Any] = {"draft_length": 5, "frames": 6, "lookup_length": 0}
TRAINING: dict[str, Any] = {
    "steps": 160,
    "batch_size": 8,
    "anchors": 24,
    "learning_rate": 2e-3,
    "min_learning_rate": 2e-5,
    "warmup_steps": 20,
    "bf16": True,
    "save_every": 80,
}
TASKS = "mt_bench,gsm8k"
QUICK = BenchSettings(sizes=("chain", 16), limit=8, max_new_tokens=64, watched=1)


@dataclass(frozen=True)
class TrainedAlike:
    """Which drafters to train. kind: every method, or the ablations. only: names of some; all if empty.

    work: the folder that keeps them, None for one in the user's cache. data: distilled text to train them on, of the
    target that is measured; the sample that ships with the package, of the shipped one, without.
    """

    kind: Literal["methods", "ablations"] = "methods"
    only: tuple[str, ...] = ()
    steps: int | None = None
    work: Path | None = None
    data: tuple[Path, ...] = ()

    def rows(self) -> DistilledDataset:
        return DistilledDataset.load(self.data) if self.data else sample_rows()


@dataclass(frozen=True)
class Recipe:
    """A drafter to train: its method, what differs from the method's usual sizes, and from the usual training."""

    method: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def recipes() -> dict[str, Recipe]:
    """Every method that can be trained, by its name, and ours without its copies."""
    methods = {name: Recipe(name) for name in TRAINED if name not in FOR_ABLATIONS}
    return {"ctc": methods["ctc"], "ctc-no-copies": Recipe("ctc", {"copies": 0}), **methods}


def work_folder(alike: TrainedAlike) -> Path:
    """Where trained drafters are kept for the next run."""
    cache = os.environ.get("XDG_CACHE_HOME")
    usual = (
        (Path(cache) if cache else Path.home() / ".cache") / "ctc-drafter" / f"{alike.steps or TRAINING['steps']}-steps"
    )
    return alike.work or usual


def sample_rows() -> DistilledDataset:
    """The sample that ships with the package. Raises `UserError` in an installation without it."""
    if not any(SAMPLE_DIR.glob("shard-*")):
        raise UserError("this installation has no sample of distilled text; train drafters and name them by --drafter")
    return DistilledDataset.load([SAMPLE_DIR])


def train_entries(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    recipes: Mapping[str, Recipe],
    rows: DistilledDataset,
    work: Path,
    *,
    steps: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Entry]:
    """An entry for each recipe, trained in `work/NAME`; those that are there already are only loaded.

    Raises `UserError` if the folder holds drafters of other settings, or the rows are another target's.
    """
    found = {}
    for place, (name, recipe) in enumerate(recipes.items(), 1):
        tell(f"{place} of {len(recipes)}: {name}")
        found[name] = train_one(target, tokenizer, recipe, rows, work / name.replace(" ", "_"), steps)
    return found


def train_one(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rows: DistilledDataset,
    out: Path,
    steps: int | None = None,
) -> Entry:
    """Trains one recipe, or goes on with it."""
    method = trained_method(recipe.method)
    known = method.drafter.config_class.__dataclass_fields__
    sizes = {key: size for key, size in SIZES.items() if key in known} | dict(recipe.sizes)
    drafter = fresh_drafter(target, tokenizer, 0, recipe.method, **sizes)
    given = (
        TRAINING | method.training | {"progress": False} | dict(recipe.training) | ({"steps": steps} if steps else {})
    )
    train_drafter(target, drafter, rows, None, out, TrainSettings.parse(given))
    return Entry(ready(drafter, target), facts(drafter, out))


def ready(drafter: TrainableDrafter, target: Target) -> TrainableDrafter:
    """As `load_drafter` hands it out."""
    drafter.to(device=target.device, dtype=target.dtype).eval()
    columns_first(drafter)
    return drafter


def with_lookup(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The method without weights belongs to every comparison."""
    lookup = PromptLookup()
    return {**entries, PROMPT_LOOKUP: Entry(lookup, facts(lookup, None))}


def selected(recipes: Mapping[str, Recipe], only: Sequence[str]) -> dict[str, Recipe]:
    """Those that are named. Raises `UserError` for unknown names."""
    unknown = [name for name in only if name not in recipes]
    if unknown:
        raise UserError(f"--only {unknown[0]} is not known; known are {', '.join(recipes)}")
    return {name: recipe for name, recipe in recipes.items() if not only or name in only}
