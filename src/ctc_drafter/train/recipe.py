"""YAML recipes: target, prompts and options of a training; their pages under docs/recipes/."""

from __future__ import annotations

import argparse
import re
import shlex
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoConfig, PreTrainedConfig

from ctc_drafter.drafters.registry import blank_drafter, sizes_without_carry, trained_method
from ctc_drafter.files import markdown_table
from ctc_drafter.train.estimate import Answers, Plan, TextSize, describe, describe_distillation, distill_cost, estimate
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.types import UserError, first_line

# Recipes: YAML files that name a target, its prompts, and the options of distillation and training.
#
# A recipe says nothing that the commands do not: its page shows their command lines, and `recipe` calls them.


MOST_BYTES, DEEPEST = 1 << 16, 32  # of a recipe's file
# Options of train that are on or off, and have a default that a recipe may want otherwise: `--carry`, `--no-carry`.
SWITCHES = frozenset({"carry", "carry_root", "convolution", "predictor_tied", "resume"})
OPTION = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
# What is the user's alone to say: where files go, to whom keys and prompts are sent, whose code runs.
USERS = frozenset({"out", "data", "target", "revision", "server", "model", "api-key", "push-to-hub", "private"}) | {
    "trust-remote-code"
}


class Recipe(BaseModel):
    """title: of its page. target, revision: as for the commands. dtype: of both stages. chat_template: file beside it.

    distill, train: options of the commands by their long names; a list repeats an option, true stands alone, and
    `set` holds training settings. A list of such `distill` options is as many distillations, whose answers are trained
    on together. Those of `USERS` are refused: a recipe may be anybody's. architecture: model type and sizes of the
    target, so that an estimate needs no download. notes: for the page. ran: where it was run, for the page, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    target: str
    revision: str | None = None
    dtype: str = "bfloat16"
    chat_template: Path | None = None
    distill: dict[str, Any] | list[dict[str, Any]]
    train: dict[str, Any]
    architecture: dict[str, Any]
    notes: str = ""
    ran: str = ""

    @property
    def distillations(self) -> list[dict[str, Any]]:
        """Options of `distill`, one entry for each time that it runs."""
        return self.distill if isinstance(self.distill, list) else [self.distill]


PACKAGED = Path(__file__).parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted(PACKAGED.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe: of a packaged one its name will do. Raises `UserError` for one that is not there."""
    if Path(name).is_file():
        return Path(name)
    known = packaged_recipes()
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"give a file, or one of {', '.join(known)}"
        raise UserError(f"there is no recipe {name}; {hint}")
    return known[name]


def read_recipe(file: Path) -> Recipe:
    """Raises `UserError` for files that cannot be read, for keys that are not a recipe's, and for options that are not
    a recipe's to set."""
    try:
        with file.open("rb") as content:
            text = content.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"{file} is no recipe: it is longer than {MOST_BYTES} bytes")
        recipe = Recipe(**yaml.load(text.decode("utf-8"), PlainLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is no recipe: {reason}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is no recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not recipe.distillations:
        raise UserError(f"{file} is no recipe: distill is an empty list; say which prompts are answered")
    for stage, given in [*(("distill", each) for each in recipe.distillations), ("train", recipe.train)]:
        for name in given:
            option = str(name).replace("_", "-")
            if not OPTION.fullmatch(str(name)):
                raise UserError(f"{file} is no recipe: {stage}: {first_line(ValueError(name))} is no option")
            if option in USERS:
                raise UserError(f"{file} is no recipe: {stage} sets {option}, which is for you to say; leave it out")
    if recipe.chat_template is None:
        return recipe
    return recipe.model_copy(update={"chat_template": file.parent / recipe.chat_template})


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can make gigabytes of a line, and without deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*); write the value again")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("it is nested too deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


Stage = tuple[str, dict[str, Any]]  # a command and its options


def stages(recipe: Recipe, out: Path, own: dict[str, Any] | None = None, answers: Path | None = None) -> list[Stage]:
    """Commands of the recipe with their options; `own` replaces options of all distillations.

    With a folder of `answers`, which were distilled before, training is all there is to do. Of several distillations
    each has its own folder in `out/answers`.
    """
    both: dict[str, Any] = {name: getattr(recipe, name) for name in ("target", "revision", "dtype", "chat_template")}
    folder, found = out / "answers", []
    if answers is None:
        several = len(recipe.distillations) > 1
        for number, given in enumerate(recipe.distillations):
            place = str(folder / f"{number:02d}" if several else folder)
            found.append(("distill", {**both, **given, **(own or {}), "out": place}))
    data = str(answers or folder)
    return [*found, ("train", {**both, **recipe.train, "data": [data], "out": str(out / "drafter")})]


def command_lines(parts: list[Stage]) -> list[list[str]]:
    """The commands that a user may type instead, of `stages`."""
    return [[command, *options(values)] for command, values in parts]


def options(values: dict[str, Any]) -> list[str]:
    """`{"a": 1, "b": true, "set": {"c": 2}}` as `--a 1 --b --set c=2`; None leaves an option out, and so does False
    where there is no other way to say it (`SWITCHES`)."""
    found: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            value = [f"{key}={_text(each)}" for key, each in value.items()]
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                found.append(option)
            elif each is False and name.replace("-", "_") in SWITCHES:
                found.append(f"--no-{option[2:]}")
            elif each is not None and each is not False:
                found += [option, str(each)]
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


# Estimates of a recipe, and its page under docs/recipes/:
# `python -m ctc_drafter.train.recipe src/ctc_drafter/train/recipes/*.yaml`.

PAGES = Path("docs/recipes")
# Assumed operations and bytes per second for the hours on the pages.
RATE, BANDWIDTH = 1e14, 2e12
USUAL_BATCH = 32  # rows that `distill` writes at a time unless told otherwise
SERVED = 64  # rows that a server may write at a time
NOT_YET = "Nobody has run it at this size yet; the tests run it\nwith a small random target of the same architecture."
# Keys of a drafter's config -> what recipes call them, which is what `train` calls its options.
SIZES = {
    **{key: key for key in ("frames", "draft_length", "predictor_rank", "carry", "carry_rank", "carry_root")},
    **{
        key: key for key in ("predictor_width", "predictor_tied", "joint_tokens", "joint_rank", "convolution", "copies")
    },
    "lookup_length": "lookup",
    "num_hidden_layers": "draft_layers",
    "draft_vocab_size": "draft_vocabulary",
}


def plan_of(recipe: Recipe, config: PreTrainedConfig | None = None) -> Plan:
    """Its training run, as if every row had its longest prompt and answer: what it needs is an upper bound.

    config: of another target than the recipe's.
    """
    train = {name.replace("-", "_"): value for name, value in recipe.train.items()}
    method = trained_method(train.get("method", "ctc"))
    settings = {key: value for key, value in train.items() if key in TrainSettings.model_fields}
    sizes = sizes_without_carry({key: train.get(name) for key, name in SIZES.items()})
    fresh = blank_drafter(train.get("method", "ctc"), **sizes)
    config = config or architecture_of(recipe)
    rows, prompt, answer = text_sizes(recipe)
    longest = min(needed("train", train, "max_length"), prompt + answer)
    text = TextSize(rows, rows * longest, longest)
    chosen = TrainSettings.parse(method.training | settings | train.get("set", {}))
    return Plan(config, getattr(torch, recipe.dtype), fresh, chosen, text)


def architecture_of(recipe: Recipe) -> PreTrainedConfig:
    """Raises `UserError` for one that transformers does not know."""
    given = {key: value for key, value in recipe.architecture.items() if key != "model_type"}
    kind = recipe.architecture.get("model_type")
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # each family checks its own sizes
        raise UserError(f"the recipe's architecture {kind!r} is none: {first_line(error)}") from error


def text_sizes(recipe: Recipe) -> tuple[int, int, int]:
    """Rows, and tokens of the longest prompt and answer. Raises `UserError` for a recipe that does not say."""
    sizes = [distilled_sizes(given) for given in recipe.distillations]
    rows, prompts, answers = zip(*sizes, strict=True)
    return sum(rows), max(prompts), max(answers)


def distilled_sizes(given: dict[str, Any]) -> tuple[int, int, int]:
    """`text_sizes` of one distillation."""
    rows, prompt, answer = [needed("distill", given, key) for key in ("limit", "max_prompt_tokens", "max_new_tokens")]
    return rows, prompt, answer


def needed(stage: str, values: dict[str, Any], key: str) -> int:
    """A size that an estimate needs."""
    found = values.get(key, values.get(key.replace("_", "-")))
    if found is None:
        raise UserError(f"the recipe's {stage} has no {key}, which an estimate needs; add it")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"the recipe's {key} is {found!r}; give a number of at least 1")
    return found


def answers_of(recipe: Recipe) -> list[Answers]:
    """Its distillation with the rows of a batch, and with those of a server; prompts and answers at their longest."""
    sizes = text_sizes(recipe)
    at_a_time = sorted({recipe.distillations[0].get("batch_size", USUAL_BATCH), SERVED})
    return [Answers(*sizes, rows) for rows in at_a_time]


def distillation(
    recipe: Recipe, rate: float, bandwidth: float, source: str, config: PreTrainedConfig | None = None
) -> list[tuple[str, str]]:
    """Lines of a table. config: of another target than the recipe's."""
    plan = plan_of(recipe, config)
    costs = [(distill_cost(plan.config, plan.dtype, answers), answers) for answers in answers_of(recipe)]
    return [describe_distillation(cost, answers, rate, bandwidth, source) for cost, answers in costs]


BY_SERVER = """A server that runs the target can do the distillation: `ctc-drafter recipe ... --server URL` (see
[training](../training.md))."""
OWN_PROMPTS = "The target writes its own prompts, which a server cannot do for it: there is no `--server` here."


def page(recipe: Recipe, file: Path) -> str:
    """Markdown: the commands, and what they need."""
    lines = [["ctc-drafter", *line] for line in command_lines(stages(recipe, Path("runs") / file.stem))]
    shown = "\n".join("    " + shlex.join(line) for line in lines)
    own_prompts = any(each.get("prompts") == "self" for each in recipe.distillations)
    rows = describe(estimate(plan_of(recipe)), RATE, "assumed; set yours with `--flops`")
    rows += distillation(recipe, RATE, BANDWIDTH, "assumed; set yours with `--flops` and `--bandwidth`")
    return f"""# {recipe.title}

{recipe.notes.strip()}

    ctc-drafter recipe {file.stem} --out runs/{file.stem}

runs these commands, each of which resumes after a kill:

{shown}

{OWN_PROMPTS if own_prompts else BY_SERVER}

What training and distillation need at most, by `ctc-drafter recipe {file.stem} --estimate` from the
configuration, as if every row were as long as the recipe allows. {recipe.ran or NOT_YET}

{markdown_table(["", ""], rows)}
"""


def write_pages(files: list[Path], folder: Path = PAGES) -> None:
    for file in files:
        (folder / f"{file.stem}.md").write_text(page(read_recipe(file), file), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m ctc_drafter.train.recipe", description="Writes pages of recipes.")
    parser.add_argument("files", type=Path, nargs="+", help="YAML recipes")
    write_pages(parser.parse_args().files)
