"""Variants of the drafter, one row a variant: what each part is worth, trained by the same short run.

{linear heads, attention module} x {cross-entropy, full-sequence CTC, prefix likelihood} x {predictor on, off} x {static
tree and collapse, prefix search} x {greedy, typical acceptance}, as far as they make sense: a static tree of alignments
cannot ask a predictor, frames without blanks need no collapse. Then frames, rank and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ctc_drafter.decode.sampling import ARGMAX, Chooser
from ctc_drafter.decode.typical import Typical
from ctc_drafter.drafters.baselines.ctc_variants import PaperConfig, PaperDrafter
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.evaluate.bench import Entry
from ctc_drafter.evaluate.quick import Recipe, ready, train_entries
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.types import UserError


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
    """All of them; the first is the drafter as it is, and what it is worth to copy is seen beside the second."""
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
    """Those with these labels, all of them without. Raises `UserError` for unknown ones."""
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
    chooser: Chooser = Typical() if variant.typical else ARGMAX
    if not variant.static:
        return replace(entry, chooser=chooser)
    assert isinstance(entry.drafter, CTCDrafter)
    return replace(entry, drafter=ready(static_twin(entry.drafter), target), chooser=chooser)


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
