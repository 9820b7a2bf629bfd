"""Trains drafters for comparisons (`bench --quick`, `--ablations`); typical acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.decode.sequence import SequenceState
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
from ctc_drafter.files import cache_folder
from ctc_drafter.load import load_drafter
from ctc_drafter.quickstart import DRAFTER_DIR, SAMPLE_DIR
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import TokenTree, UserError

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
CE, CE_PREDICTOR = Recipe("dflash", {}, TEXT), Recipe("dspark", {"predictor_width": 256}, TEXT)
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
        Variant("no carry", ours(carry=False)),
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
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Entry]:
    """An entry for each variant; what several share is trained once, in `work/NAME`."""
    recipes: Mapping[str, Recipe] = {variant.name: variant.recipe for variant in chosen}
    trained = train_entries(target, tokenizer, recipes, rows, work, steps=steps, tell=tell)
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
    """An entry for each name and its folder or hub id; without any, the shipped drafter under its method's name."""
    if not named:
        shipped = load_drafter(None, target, tokenizer)
        return {method_of(shipped): Entry(shipped, about_drafter(shipped, DRAFTER_DIR))}
    entries = {}
    for name, place in named.items():
        drafter = load_drafter(place, target, tokenizer)
        entries[name] = Entry(drafter, about_drafter(drafter, Path(place) if Path(place).is_dir() else None))
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


# Typical acceptance: tokens that are likely enough for the target pass. It CHANGES THE OUTPUT: for comparison only.
#
# Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (ICML 2024).
# A drafted token x passes where P(x) > min(epsilon, delta exp(-H)), P being the target's distribution at temperature
# and H its entropy; of the paths all of whose tokens pass the longest is taken, the likeliest among equals. What
# follows it, and every row's first token, is the argmax; the argmax itself always passes, since its probability is at
# least exp(-H).


@dataclass(frozen=True)
class Typical:
    """A sampler, see `decode/sampling.py`. The defaults are Medusa's."""

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 0.7

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give more than 0")

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        return

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return logits.argmax(-1)

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        log_probs = (logits.float() / self.temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).nansum(-1)
        least = (self.delta * (-entropy).exp()).clamp(max=self.epsilon).log()
        own = log_probs.gather(1, tree.parents.unsqueeze(-1).expand_as(log_probs)).gather(2, tree.tokens.unsqueeze(-1))
        own = own.squeeze(-1)
        passes = (own > least.gather(1, tree.parents)) & tree.valid
        passes[:, 0], own[:, 0] = True, 0.0
        whole = ~(tree.ancestors & ~passes.unsqueeze(1)).any(-1)
        likelihood = (tree.ancestors * own.nan_to_num(neginf=-1e4).unsqueeze(1)).sum(-1)
        depths = torch.where(whole, tree.depths, -1)
        longest = depths == depths.amax(1, keepdim=True)
        last = torch.where(longest, likelihood, float("-inf")).argmax(1)
        return wanted_on_path(tree, logits.argmax(-1), last)


def wanted_on_path(tree: TokenTree, target_tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`target_tokens int64 [B, 1+N]` with the tokens of the path from the root to node `last int64 [B]` put in."""
    rows = torch.arange(len(last), device=last.device)
    found, node = target_tokens.clone(), last
    for _ in range(int(tree.depths.max())):
        on = node > 0
        parent = tree.parents[rows, node]
        found[rows[on], parent[on]] = tree.tokens[rows, node][on]
        node = parent
    return found
