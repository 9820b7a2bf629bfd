"""A recipe's estimate counts the drafter that the recipe names."""

from pathlib import Path

import yaml
from safetensors.torch import load_file

from ctc_drafter.cli.sizes import SIZE_OPTIONS
from ctc_drafter.quickstart import SMOLLM2_DRAFTER_DIR
from ctc_drafter.train.recipe import SIZES, packaged_recipes, plan_of, read_recipe
from helpers import tiny_config


def test_a_plan_knows_every_size_that_train_takes() -> None:
    assert {key: "--" + name.replace("_", "-") for key, name in SIZES.items()} == SIZE_OPTIONS


def test_the_plan_of_what_ships_has_its_parameters() -> None:
    plan = plan_of(read_recipe(packaged_recipes()["smollm2-135m"]))
    shipped = load_file(SMOLLM2_DRAFTER_DIR / "model.safetensors")
    planned = dict(plan.fresh(plan.config).named_parameters())
    assert {name: weight.shape for name, weight in planned.items()} == {
        name: weight.shape for name, weight in shipped.items() if name != "d2t"
    }


def test_a_plan_without_carry_has_none_of_its_parts(tmp_path: Path) -> None:
    given = yaml.safe_load(packaged_recipes()["vicuna-7b"].read_text())
    given["train"]["carry"] = False
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    plan = plan_of(read_recipe(tmp_path / "r.yaml"))
    assert not [name for name, _ in plan.fresh(tiny_config()).named_parameters() if name.startswith("carry")]
