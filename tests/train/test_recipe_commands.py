"""The commands that a recipe prints, for users to type instead."""

from pathlib import Path

import typer

from ctc_drafter.cli import app
from ctc_drafter.train.recipe import SWITCHES, command_lines, options, packaged_recipes, read_recipe, stages


def test_options_of_commands() -> None:
    values = {"a_b": 1, "c": True, "d": False, "e": None, "f": ["x", "y"], "set": {"g": [4, 8], "h": True}}
    assert options(values) == ["--a-b", "1", "--c", "--f", "x", "--f", "y", "--set", "g=4,8", "--set", "h=yes"]


def test_what_is_off_is_said_as_train_takes_it() -> None:
    known = typer.main.get_command(app).commands["train"].params
    off = sorted(name for each in known for name in each.secondary_opts)
    assert options(dict.fromkeys(sorted(SWITCHES), False)) == off
    assert options({"predictor-tied": False, "bf16": False}) == ["--no-predictor-tied"]


def test_the_commands_of_a_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(packaged_recipes()["vicuna-7b"])
    first, second = command_lines(stages(recipe.model_copy(update={"target": "mine"}), tmp_path))
    assert first[first.index("--target") + 1] == second[second.index("--target") + 1] == "mine"
    assert first[first.index("--out") + 1] == second[second.index("--data") + 1]
    assert Path(second[second.index("--chat-template") + 1]).is_file()
