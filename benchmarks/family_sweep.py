"""Sweep over all causal LM and image-text model types of transformers: exact, different or refused.

Its part of `docs/families.md` is written by `python -m benchmarks.families`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.family_checks import CELLS, LENGTHS, NEW_TOKENS, Cell, Plain, differences
from benchmarks.family_configs import CAUSAL, PICTURES, small_config, small_model
from benchmarks.family_table import CHUNK, ORIGINAL, UNBUILT, VARIANTS, WINDOW, Family
from ctc_drafter.files import markdown_table
from ctc_drafter.target.checks import refuse_kind
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

AS_IT_COMES, EXACT = "as it comes", "exact"  # words of the page


def every_family() -> list[Family]:
    """One family for each class of the two mappings, and the variants; without what `UNBUILT` lists."""
    alone = {kind for kind in PICTURES if PICTURES[kind] != CAUSAL.get(kind)}
    families = [Family(kind, kind) for kind in CAUSAL]
    families += [Family(f"{kind}, text alone", kind, multimodal=True) for kind in sorted(alone)]
    return [family for family in families if family.name not in UNBUILT] + list(VARIANTS)


@dataclass(frozen=True)
class Outcome:
    """refusal: the reason, or empty where the family is taken. different: comparisons that do not hold. verified: by
    what drafts are, see `way_of`."""

    family: Family
    refusal: str
    different: tuple[str, ...] = ()
    verified: str = ""


def taken(family: Family, cache: str = "dynamic") -> Target:
    """The small model as a target. Raises `UserError` where it is refused, and what stock raises where it is not built.

    Stock `generate` comes first, so that a family which was built wrongly is not taken for one that is refused.
    """
    refuse_kind(small_config(family))
    model = small_model(family)
    reads_text(model)
    return Target.wrap(model, cache)


def reads_text(model: PreTrainedModel) -> None:
    row = torch.tensor([[7, 8, 9]])
    model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=2, do_sample=False, pad_token_id=0)


def outcome(family: Family, cells: Sequence[Cell] = CELLS) -> Outcome:
    """Tries one family over all comparisons."""
    try:
        target = taken(family)
    except UserError as error:
        return Outcome(family, str(error))
    return Outcome(family, "", tuple(differences(target, Plain.of(target, family.short), cells)), way_of(target))


def way_of(target: Target) -> str:
    """What a target verifies: trees, or chains and how."""
    if target.chain is None:
        return "tree"
    together = "" if target.chain.together else ", one row at a time"
    return "chain" + together + (", token by token" if target.chain.stepped else "")


def without_figures(refusal: str) -> str:
    """A reason as pages have it: the figures of a trial differ between machines."""
    return re.sub(r" [(].*[)]", "", refusal)


def sweep_page(outcomes: Sequence[Outcome]) -> str:
    """This part of the page as Markdown: counts and three tables."""
    exact = [each for each in outcomes if not each.refusal]
    refused = [each for each in outcomes if each.refusal]
    types = len({each.family.model_type for each in exact})
    lines = [HEAD, f"{len(exact)} configurations of {types} types are taken, {len(refused)} are refused,"]
    lines += [
        f"{len(UNBUILT)} are not tried. *{AS_IT_COMES}*: what the class's own defaults make, small.",
        "",
    ]
    rows = []
    for kind, way in dict.fromkeys((each.family.model_type, each.verified) for each in exact):
        own = [each for each in exact if (each.family.model_type, each.verified) == (kind, way)]
        names = "; ".join(each.family.name.removeprefix(kind).removeprefix(", ") or AS_IT_COMES for each in own)
        wrong = [each.family.name for each in own if each.different]
        rows.append((kind, names, way, "DIFFERS: " + "; ".join(wrong) if wrong else EXACT))
    lines += [markdown_table(["type", "configurations", "verified by", "output"], rows)]
    reasons = [(each.family.name, without_figures(each.refusal)) for each in refused]
    lines += ["", "Refused:", "", markdown_table(["configuration", "reason"], reasons)]
    lines += ["", "Not tried:", "", markdown_table(["type", "reason"], UNBUILT.items())]
    return "\n".join(lines) + "\n"


HEAD = f"""
## Every type that transformers maps

Each class of transformers' mappings for causal LMs and for image and text (text alone) was built small and random in
float32, with its length thresholds inside the text: sliding and kept windows of {WINDOW} tokens, chunks and temperature
steps of {CHUNK}, scaled rotary embeddings with an original context of {ORIGINAL}. Prompts of
{LENGTHS[0]}, {LENGTHS[1]} and {LENGTHS[2]} tokens were continued by {NEW_TOKENS}, alone and together,
with trees of 1, 8 and 32 nodes of up to 11 levels and drafts
that are never, always and sometimes right: greedy against transformers' own `generate`, sampled against plain sampled
decoding. *exact* means no difference in {len(CELLS)} comparisons. The same tests spoil the product on purpose (a mask
without branches, positions without depth, accepted nodes left where they were), and every type that is taken notices
each; positions where it has any.

Prompts with pictures are tested for eleven of the classes of images and text, on tiny random models against stock
`generate` (`tests/decode/test_pictures.py`: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V, ERNIE 4.5 VL, Gemma 3, SmolVLM,
Idefics3, LLaVA, Mistral 3, InternVL; videos with Qwen2.5-VL). Others that are verified by trees are tried at their
first pictures, those that are verified by chains read text alone ([generate.md](generate.md)).
"""
