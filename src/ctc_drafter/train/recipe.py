"""YAML recipes: target, prompts and options of a training; their pages under docs/recipes/."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoConfig

from ctc_drafter.drafters.registry import blank_drafter, trained_method
from ctc_drafter.files import markdown_table
from ctc_drafter.train.estimate import Answers, Plan, TextSize, describe, describe_distillation, distill_cost, estimate
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.types import UserError, first_line

# Recipes: YAML files that name a target, its prompts, and the options of distillation and training.
#
# A recipe says nothing that the commands do not: it becomes the command lines that its page shows, and runs them.


class Recipe(BaseModel):
    """title: of its page. target: folder or hub id. dtype: of both stages. chat_template: a file beside the recipe.

    distill, train: options of the commands by their long names; a list repeats an option, true stands alone, and
    `set` holds training settings. architecture: model type and sizes of the target, so that an estimate needs no
    download. notes: for the page.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    target: str
    dtype: str = "bfloat16"
    chat_template: Path | None = None
    distill: dict[str, Any]
    train: dict[str, Any]
    architecture: dict[str, Any]
    notes: str = ""


def read_recipe(file: Path) -> Recipe:
    """Raises `UserError` for files that cannot be read and for keys that are not a recipe's."""
    try:
        recipe = Recipe(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is no recipe: {reason}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is no recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if recipe.chat_template is None:
        return recipe
    return recipe.model_copy(update={"chat_template": file.parent / recipe.chat_template})


def commands(recipe: Recipe, out: Path, **changes: Any) -> list[list[str]]:
    """The command lines of its stages; `changes` replace target, dtype and so on."""
    recipe = recipe.model_copy(update=changes)
    both = {"target": recipe.target, "dtype": recipe.dtype, "chat-template": recipe.chat_template}
    answers = str(out / "answers")
    return [
        ["distill", *options({**both, **recipe.distill, "out": answers})],
        ["train", *options({**both, **recipe.train, "data": answers, "out": str(out / "drafter")})],
    ]


def options(values: dict[str, Any]) -> list[str]:
    """`{"a": 1, "b": true, "set": {"c": 2}}` as `--a 1 --b --set c=2`; None leaves an option out."""
    found: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            value = [f"{key}={_text(each)}" for key, each in value.items()]
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                found.append(option)
            elif each is not None and each is not False:
                found += [option, str(each)]
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


# Estimates of a recipe, and its page under docs/recipes/: `python -m ctc_drafter.train.recipe recipes/*.yaml`.

PAGES = Path("docs/recipes")
# Assumed operations and bytes per second for the hours on the pages.
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
    rows = describe(estimate(plan_of(recipe)), RATE, "assumed; set yours with `--flops`")
    rows += distillation(recipe, RATE, BANDWIDTH, "assumed; set yours with `--flops` and `--bandwidth`")
    return f"""# {recipe.title}

{recipe.notes.strip()}

    ctc-drafter recipe recipes/{file.name} --out runs/{file.stem}

runs these commands, each of which resumes after a kill:

{shown}

A server that runs the target can do the distillation: `ctc-drafter recipe ... --server URL` (see
[training](../training.md)).

What training and distillation need at most, by `ctc-drafter recipe recipes/{file.name} --estimate` from the
configuration, as if every row were as long as the recipe allows. Nobody has run it at this size yet; the tests run it
with a small random target of the same architecture.

{markdown_table(["", ""], rows)}
"""


def write_pages(files: list[Path], folder: Path = PAGES) -> None:
    for file in files:
        (folder / f"{file.stem}.md").write_text(page(read_recipe(file), file), encoding="utf-8")


if __name__ == "__main__":
    write_pages([Path(name) for name in sys.argv[1:]])
