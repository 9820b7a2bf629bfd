"""Recipes: YAML files that name a target, its prompts, and the options of distillation and training.

A recipe says nothing that the commands do not: it becomes the command lines that its page shows, and runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ctc_drafter.types import UserError


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
        reason = (str(error) or type(error).__name__).splitlines()[0]
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
