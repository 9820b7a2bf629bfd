"""Recipes become command lines, run at toy size, and their pages are what they say."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ctc_drafter.cli import main
from ctc_drafter.train.recipe import commands, options, page, plan_of, read_recipe
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer
from train_helpers import write_jsonl

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TOY = {
    "vocab_size": 280,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Sliding layers among the others, as the real ones have them.
MORE = {"gemma3_text": {"sliding_window": 16, "layer_types": [*["sliding_attention"] * 2, "full_attention"]}}
FAST = ("vicuna-7b",)


def toy_target(kind: str, folder: Path) -> str:
    """A random target of this architecture, with a tokenizer made on the spot."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TOY | MORE.get(kind, {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def conversations(folder: Path) -> str:
    talk = [{"from": "human", "value": "the cat sat"}, {"from": "gpt", "value": "on the mat"}]
    rows = [{"conversations": [{"from": "human", "value": f"the cat {n} and the hat"}, *talk[1:]]} for n in range(10)]
    return str(write_jsonl(folder / "prompts.jsonl", [*rows, {"messages": [{"role": "user", "content": "hat"}]}, "{"]))


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_from_raw_text_to_drafted_answers_in_three_commands(kind: str, tmp_path: Path, capfd, caplog) -> None:
    target, prompts = toy_target(kind, tmp_path / "target"), conversations(tmp_path)
    answers, drafter = str(tmp_path / "answers"), str(tmp_path / "drafter")
    distill = ["distill", "--target", target, "--prompts", prompts, "--out", answers, "--max-new-tokens", "24"]
    assert main(distill) == 0
    assert "11 answers" in capfd.readouterr().out
    assert "1 bad (not JSON)" in caplog.text
    options = ["--steps", "3", "--batch-size", "2", "--draft-length", "3", "--set", "progress=no", "--held-out", "0.3"]
    assert main(["train", "--target", target, "--data", answers, "--out", drafter, *options]) == 0
    (tmp_path / "ask.txt").write_text("the cat\nthe hat and the mat\n")
    generate = ["generate", "--target", target, "--drafter", drafter, "--prompts-file", str(tmp_path / "ask.txt")]
    written = []
    for more in ([], ["--plain"]):
        out = tmp_path / "out.json"
        assert main([*generate, "--max-new-tokens", "20", "--json", str(out), *more]) == 0
        written.append([output["tokens"] for output in json.loads(out.read_text())["outputs"]])
    assert written[0] == written[1]
    assert sum(map(len, written[0])) > 20


def toy_recipe(file: Path, folder: Path) -> Path:
    """The recipe with small numbers in the places of its large ones, for a small target of its architecture."""
    given = yaml.safe_load(file.read_text())
    toy_target(given["architecture"]["model_type"], folder / "target")
    small = {"max_prompt_tokens": 300, "max_new_tokens": 12, "batch_size": 2, "anchors": 4, "max_length": 320}
    for stage in ("distill", "train"):
        given[stage] |= {key: value for key, value in small.items() if key in given[stage]}
    given["train"]["set"] |= {"accumulate": 2, "progress": False, "warmup_steps": 1}
    given |= {"target": str(folder / "target"), "dtype": "float32"}
    given["distill"]["prompts"] = conversations(folder)
    if "chat_template" in given:
        given["chat_template"] = str(file.parent / given["chat_template"])
    (folder / file.name).write_text(yaml.safe_dump(given))
    return folder / file.name


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[] if f.stem in FAST else pytest.mark.slow, id=f.stem) for f in RECIPES],
)
def test_every_recipe_runs_at_toy_size(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["recipe", str(toy_recipe(file, tmp_path)), "--out", str(out)]) == 0, capfd.readouterr()
    shown = capfd.readouterr().out
    assert shown.count("ctc-drafter distill") == shown.count("ctc-drafter train") == 1
    run = json.loads((out / "drafter" / "train.json").read_text())
    assert run["settings"]["bf16"] is True
    assert json.loads((out / "drafter" / "config.json").read_text())["frames"] == 8
    row = json.loads((out / "answers" / "shard-00000.jsonl").read_text().splitlines()[0])
    shape = tiny_tokenizer().decode(row["prompt_ids"])
    assert shape.endswith("ASSISTANT:" if "vicuna" in file.stem else "<|assistant|>")


def test_options_of_commands() -> None:
    values = {"a_b": 1, "c": True, "d": False, "e": None, "f": ["x", "y"], "set": {"g": [4, 8], "h": True}}
    assert options(values) == ["--a-b", "1", "--c", "--f", "x", "--f", "y", "--set", "g=4,8", "--set", "h=yes"]


def test_the_commands_of_a_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes" / "vicuna-7b.yaml")
    distill, train = commands(recipe, tmp_path, target="mine")
    assert distill[distill.index("--target") + 1] == train[train.index("--target") + 1] == "mine"
    assert distill[distill.index("--out") + 1] == train[train.index("--data") + 1]
    assert Path(train[train.index("--chat-template") + 1]).is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x", "target: Field required"),
        ("- a", "is no recipe"),
        ("a: [", "is no recipe"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="is no recipe"):
        read_recipe(tmp_path / "none.yaml")


def test_every_recipe_can_be_planned() -> None:
    for file in RECIPES:
        plan = plan_of(read_recipe(file))
        assert plan.settings.batch_size * plan.settings.accumulate == 32
        assert plan.text.longest <= plan.config.max_position_embeddings
        assert (ROOT / "docs" / "recipes" / f"{file.stem}.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_pages_are_what_the_recipes_say(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # pages name files as their reader does
    beside = file.relative_to(ROOT)
    assert Path("docs", "recipes", f"{file.stem}.md").read_text() == page(read_recipe(beside), beside)
