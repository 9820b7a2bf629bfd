"""Trains drafters for comparisons (`bench --quick`, `--ablations`), at one learning rate or the best of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.baselines.ctc_variants import PaperConfig, PaperDrafter
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import (
    FOR_ABLATIONS,
    PROMPT_LOOKUP,
    TRAINED,
    fresh_drafter,
    method_of,
    trained_method,
)
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.evaluate.bench import BenchSettings, Entry, about_drafter
from ctc_drafter.evaluate.typical import Typical
from ctc_drafter.files import cache_folder
from ctc_drafter.load import drafter_place, load_drafter
from ctc_drafter.quickstart import SAMPLE_DIR
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.temperature import fit_temperature
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.train.validate import offline_beta
from ctc_drafter.types import UserError

# `bench --quick`: small drafters of every method, each trained for a minute on the same data.

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
QUICK = BenchSettings(sizes=("chain", 16), limit=8, max_new_tokens=64, watched=1)


@dataclass(frozen=True)
class TrainedAlike:
    """Which drafters to train. kind: every method, or the ablations. only: names of some; all if empty.

    work: the folder that keeps them, None for one in the user's cache. data: distilled text to train them on, of the
    target that is measured; the sample that ships with the package, of the tiny one, without. learning_rates: each
    drafter is trained at every one of them, and the best one is kept (`best_of`); without, at its own.
    """

    kind: Literal["methods", "ablations"] = "methods"
    only: tuple[str, ...] = ()
    steps: int | None = None
    work: Path | None = None
    data: tuple[Path, ...] = ()
    learning_rates: tuple[float, ...] = ()

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
    return alike.work or cache_folder() / f"{alike.steps or TRAINING['steps']}-steps"


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
    learning_rates: Sequence[float] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Entry]:
    """An entry for each recipe, trained in `work/NAME`; those that are there already are only loaded.

    With learning rates each is the best of several, see `best_of`. Raises `UserError` if the folder holds drafters of
    other settings, or the rows are another target's.
    """
    found = {}
    for place, (name, recipe) in enumerate(recipes.items(), 1):
        tell(f"{place} of {len(recipes)}: {name}")
        given = target, tokenizer, recipe, rows, work / name.replace(" ", "_"), steps
        found[name] = best_of(learning_rates, *given) if learning_rates else train_one(*given)
    return found


HELD_OUT = 0.1  # share of the rows that a sweep of learning rates compares on
COMPARED = 512  # positions of them


def best_of(
    learning_rates: Sequence[float],
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rows: DistilledDataset,
    out: Path,
    steps: int | None = None,
) -> Entry:
    """Trains a recipe at each learning rate, in `OUT-RATE`, and returns the one of the largest held-out β of 16 nodes.

    A tenth of the rows is held out, the same ones for all; a method whose scores have a temperature gets the one that
    suits them. `sweep` among the facts has β by learning rate. Raises
    `UserError` if no held-out row is long enough.
    """
    learn, held_out = rows.split(HELD_OUT)
    entries: dict[float, Entry] = {}
    for rate in learning_rates:
        chosen = replace(recipe, training={**recipe.training, "learning_rate": rate})
        entries[rate] = train_one(target, tokenizer, chosen, learn, out.with_name(f"{out.name}-{rate:g}"), steps)
    sweep = {rate: held_out_beta(target, entry.drafter, held_out) for rate, entry in entries.items()}
    best = max(sweep, key=lambda rate: sweep[rate])
    known = {"learning_rate": best, "sweep": {f"{rate:g}": round(beta, 3) for rate, beta in sweep.items()}}
    found = entries[best].drafter
    assert isinstance(found, TrainableDrafter)
    known |= {"temperature": fit_temperature(target, found, held_out)}
    return replace(entries[best], facts=entries[best].facts | known)


def held_out_beta(target: Target, drafter: Drafter, held_out: DistilledDataset) -> float:
    """β of trees of 16 nodes, without decoding; what it copies is its own."""
    assert isinstance(drafter, TrainableDrafter)
    return offline_beta(target, drafter, held_out, nodes=(16,), max_positions=COMPARED)["beta_16"]


def parse_rates(text: str) -> tuple[float, ...]:
    """`5e-4,1e-3` as numbers. Raises `UserError` for others."""
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            rate = float(part)
        except ValueError:
            rate = 0.0
        if not 0 < rate < 1:
            raise UserError(f"--learning-rates {part} is none; give numbers between 0 and 1, with commas between them")
        found.append(rate)
    return tuple(dict.fromkeys(found))


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
    return Entry(ready(drafter, target), about_drafter(drafter, out))


def ready(drafter: TrainableDrafter, target: Target) -> TrainableDrafter:
    """The drafter as `load_drafter` returns it."""
    drafter.to(device=target.device, dtype=target.dtype).eval()
    columns_first(drafter)
    return drafter


def with_lookup(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The method without weights belongs to every comparison."""
    lookup = PromptLookup()
    return {**entries, PROMPT_LOOKUP: Entry(lookup, about_drafter(lookup, None))}


def selected(recipes: Mapping[str, Recipe], only: Sequence[str]) -> dict[str, Recipe]:
    """Recipes with these names. Raises `UserError` for unknown names."""
    unknown = [name for name in only if name not in recipes]
    if unknown:
        raise UserError(f"--only {unknown[0]} is not known; known are {', '.join(recipes)}")
    return {name: recipe for name, recipe in recipes.items() if not only or name in only}


# Ablations: variants of the drafter, each trained by the same short run.
#
# {linear heads, attention module} x {cross-entropy, full-sequence CTC, prefix likelihood} x {predictor on, off} x
# {static tree and collapse, prefix search} x {greedy, typical acceptance}, as far as they make sense: a static tree
# of alignments cannot ask a predictor, frames without blanks need no collapse. Then frames, rank and layers.


@dataclass(frozen=True)
class Variant:
    """A row of the table. name: what is trained; variants of the same name share their weights.

    static: the paper's static tree and collapse in place of the search. typical: Medusa's acceptance, which changes the
    output.
    """

    name: str
    recipe: Recipe
    static: bool = False
    typical: bool = False

    @property
    def label(self) -> str:
        return self.name + (", static tree" if self.static else "") + (", typical" if self.typical else "")


FULL = {"loss": "ctc"}
BARE = {"predictor_rank": 0, "copies": 0}
TEXT = {"loss": "prefix", "loss_decay": 0.8}  # cross-entropy, weighted as ours, whatever the method's authors do
CARRY = {"carry": True, "carry_rank": 64, "carry_root": True}
# A predictor with tables of its own and no joint terms, as the drafters without blanks have.
ADDITIVE = {"joint_tokens": 0, "predictor_tied": False, "predictor_width": 256}
CE, CE_PREDICTOR = Recipe("dflash", CARRY, TEXT), Recipe("dspark", {"predictor_width": 256, **CARRY}, TEXT)
LINEAR_CE = Recipe("medusa", {"own_outputs": False}, TEXT)


def ours(**sizes: Any) -> Recipe:
    """Our drafter with other sizes, and without copies, which no other part of it needs."""
    return Recipe("ctc", {"copies": 0, **sizes})


def variants() -> tuple[Variant, ...]:
    """All variants: first the drafter as it is, second the same without copies."""
    bare_prefix, bare_full = Recipe("ctc", BARE), Recipe("ctc", BARE, FULL)
    base = Variant("prefix, predictor", ours())
    return (
        Variant("prefix, predictor, copies", Recipe("ctc")),
        base,
        replace(base, typical=True),
        Variant("no carry", ours(carry=False, carry_rank=0, carry_root=False)),
        Variant("no carry of the root", ours(carry_root=False)),
        Variant("no joint terms", ours(joint_tokens=0)),
        Variant("no joint terms, tables of its own", ours(**ADDITIVE)),
        Variant("prefix", bare_prefix),
        Variant("prefix", bare_prefix, static=True),
        Variant("full CTC, predictor", replace(ours(), training=FULL)),
        Variant("full CTC", bare_full),
        Variant("full CTC", bare_full, static=True),
        Variant("CE, predictor", CE_PREDICTOR),
        Variant("CE", CE),
        Variant("CE", CE, typical=True),
        Variant("linear, prefix, predictor", Recipe("ctc-linear")),
        Variant("linear, prefix", Recipe("ctc-linear", BARE)),
        Variant("linear, full CTC, predictor", Recipe("ctc-linear", {}, FULL)),
        Variant("linear, full CTC", Recipe("ctc-linear", BARE, FULL)),
        Variant("linear, CE", LINEAR_CE),
        Variant("linear, CE", LINEAR_CE, typical=True),
        Variant("4 frames, 4 tokens", ours(frames=4, draft_length=4)),
        *(Variant(f"{frames} frames", ours(frames=frames)) for frames in (5, 8, 12, 16)),
        *(
            Variant(f"{frames} frames, {frames - 1} tokens", ours(frames=frames, draft_length=frames - 1))
            for frames in (8, 12, 16)
        ),
        *(Variant(f"rank {rank}", ours(predictor_rank=rank)) for rank in (16, 32, 128, 256)),
        Variant("table alone", ours(predictor_width=0)),
        *(Variant(f"{layers} layers", ours(num_hidden_layers=layers)) for layers in (2, 3)),
    )


def chosen_variants(only: tuple[str, ...]) -> tuple[Variant, ...]:
    """Variants with these labels, all if none are given. Raises `UserError` for unknown ones."""
    known = {variant.label: variant for variant in variants()}
    unknown = [label for label in only if label not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is no variant; known are: {'; '.join(known)}")
    return tuple(variant for label, variant in known.items() if not only or label in only)


def ablation_entries(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    chosen: tuple[Variant, ...],
    rows: DistilledDataset,
    work: Path,
    *,
    steps: int | None = None,
    learning_rates: Sequence[float] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Entry]:
    """An entry for each variant; what several share is trained once, in `work/NAME`."""
    recipes: Mapping[str, Recipe] = {variant.name: variant.recipe for variant in chosen}
    options: dict[str, Any] = {"steps": steps, "learning_rates": learning_rates, "tell": tell}
    trained = train_entries(target, tokenizer, recipes, rows, work, **options)
    return {variant.label: decided(variant, trained[variant.name], target) for variant in chosen}


def decided(variant: Variant, entry: Entry, target: Target) -> Entry:
    """The trained entry with the variant's tree and acceptance."""
    sampler: Sampler = Typical() if variant.typical else ARGMAX
    if not variant.static:
        return replace(entry, sampler=sampler)
    assert isinstance(entry.drafter, CTCDrafter)
    return replace(entry, drafter=ready(static_twin(entry.drafter), target), sampler=sampler)


def static_twin(drafter: CTCDrafter) -> PaperDrafter:
    """The same weights behind the paper's static tree. Raises `UserError` for a drafter with a predictor."""
    if drafter.predictor is not None:
        raise UserError("a static tree cannot ask a predictor; train with predictor_rank 0")
    known = PaperConfig.__dataclass_fields__
    sizes = {name: value for name, value in drafter.config.to_dict().items() if name in known}
    own = {name: value for name, value in sizes.items() if name not in ("model_type", "architectures")}
    twin = PaperDrafter(PaperConfig(**own))
    twin.load_state_dict(drafter.state_dict())
    return twin


# The drafters of a bench: those that a user named, or those that it trains itself.


def open_entries(named: Mapping[str, str], target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Entry]:
    """An entry for each name and its drafter, by a name that `load_drafter` takes; an empty name is the method's."""
    entries = {}
    for name, place in named.items():
        drafter, found = load_drafter(place, target, tokenizer), Path(drafter_place(place))
        entries[name or method_of(drafter)] = Entry(drafter, about_drafter(drafter, found if found.is_dir() else None))
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
    options: dict[str, Any] = {"steps": chosen.steps, "learning_rates": chosen.learning_rates, "tell": tell}
    if chosen.kind == "ablations":
        variants = chosen_variants(chosen.only)
        return ablation_entries(target, tokenizer, variants, chosen.rows(), work_folder(chosen), **options)
    which = selected(recipes(), chosen.only)
    return with_lookup(train_entries(target, tokenizer, which, chosen.rows(), work_folder(chosen), **options))
