"""What a recipe will need, and its page under docs/recipes/: `python -m ctc_drafter.recipe_page recipes/*.yaml`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from ctc_drafter.drafters.registry import blank_drafter, trained_method
from ctc_drafter.recipe import Recipe, commands, read_recipe
from ctc_drafter.train.distill_cost import Answers, describe_distillation, distill_cost
from ctc_drafter.train.estimate import Plan, TextSize, describe, estimate
from ctc_drafter.train.settings import TrainSettings

PAGES = Path("docs/recipes")
# Yardsticks, not promises: operations and bytes per second that the pages' hours are given for.
RATE, BANDWIDTH = 1e14, 2e12
SERVED = 64  # rows that a server may write at a time
SIZES = ("frames", "draft_length", "predictor_rank")


def plan_of(recipe: Recipe) -> Plan:
    """Its training run, as if every row had its longest prompt and answer: what it needs is an upper bound."""
    train, distill = recipe.train, recipe.distill
    method = trained_method(train.get("method", "ctc"))
    settings = {key: value for key, value in train.items() if key in TrainSettings.model_fields}
    sizes = {key: train[key] for key in SIZES if key in train} | {"num_hidden_layers": train.get("draft_layers")}
    fresh = blank_drafter(train.get("method", "ctc"), **sizes)
    given = {key: value for key, value in recipe.architecture.items() if key != "model_type"}
    config = AutoConfig.for_model(recipe.architecture["model_type"], **given)
    longest = min(train["max_length"], distill["max_prompt_tokens"] + distill["max_new_tokens"])
    text = TextSize(distill["limit"], distill["limit"] * longest, longest)
    chosen = TrainSettings.parse(method.training | settings | train.get("set", {}))
    return Plan(config, getattr(torch, recipe.dtype), fresh, chosen, text)


def answers_of(recipe: Recipe) -> list[Answers]:
    """Its distillation with the rows of a batch, and with those of a server; prompts and answers at their longest."""
    distill = recipe.distill
    sizes = (distill["limit"], distill["max_prompt_tokens"], distill["max_new_tokens"])
    return [Answers(*sizes, rows) for rows in (distill.get("batch_size", 16), SERVED)]


def distillation(recipe: Recipe, rate: float, bandwidth: float, source: str) -> list[tuple[str, str]]:
    """Lines of a table."""
    plan = plan_of(recipe)
    costs = [(distill_cost(plan.config, plan.dtype, answers), answers) for answers in answers_of(recipe)]
    return [describe_distillation(cost, answers, rate, bandwidth, source) for cost, answers in costs]


def page(recipe: Recipe, file: Path) -> str:
    """Markdown: the commands, and what they need."""
    lines = [["ctc-drafter", *command] for command in commands(recipe, Path("runs") / file.stem)]
    shown = "\n".join("    " + shlex.join(line) for line in lines)
    rows = describe(estimate(plan_of(recipe)), RATE, "a yardstick; your own with `--flops`")
    rows += distillation(recipe, RATE, BANDWIDTH, "yardsticks; your own with `--flops` and `--bandwidth`")
    table = "\n".join(f"| {what} | {much} |" for what, much in rows)
    return f"""# {recipe.title}

{recipe.notes.strip()}

    ctc-drafter recipe recipes/{file.name} --out runs/{file.stem}

runs these commands, each of which goes on where it was killed:

{shown}

Distillation may be left to a server that runs the target: `ctc-drafter recipe ... --server URL` (see
[training](../training.md)).

What training and distillation need at most, by `ctc-drafter recipe recipes/{file.name} --estimate` from the
configuration, as if every row were as long as the recipe allows. Nobody has run it at this size yet; the tests run it
with a small random target of the same architecture.

| | |
|---|---|
{table}
"""


def write_pages(files: list[Path], folder: Path = PAGES) -> None:
    for file in files:
        (folder / f"{file.stem}.md").write_text(page(read_recipe(file), file), encoding="utf-8")


if __name__ == "__main__":
    write_pages([Path(name) for name in sys.argv[1:]])
