"""Recipes become command lines, run at toy size, and their pages are what they say."""

import inspect
import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ctc_drafter.cli import main
from ctc_drafter.cli.options import arguments
from ctc_drafter.cli.train import distill, train
from ctc_drafter.train.estimate import describe, estimate
from ctc_drafter.train.recipe import command_lines, page, plan_of, read_recipe, stages
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer
from train_helpers import write_jsonl

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "ctc_drafter" / "train" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
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
    distillations = given["distill"] if isinstance(given["distill"], list) else [given["distill"]]
    for stage in (*distillations, given["train"]):
        stage |= {key: value for key, value in small.items() if key in stage}
    if "draft_vocabulary" in given["train"]:
        given["train"]["draft_vocabulary"] = 64
    given["train"]["set"] |= {"accumulate": 2, "progress": False, "warmup_steps": 1}
    given |= {"target": str(folder / "target"), "dtype": "float32"}
    for stage in distillations:
        stage["prompts"] = conversations(folder)
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
    recipe = read_recipe(file)
    times = len(recipe.distillations)
    assert (shown.count("ctc-drafter distill"), shown.count("ctc-drafter train")) == (times, 1)
    run = json.loads((out / "drafter" / "train.json").read_text())
    assert run["settings"]["bf16"] is recipe.train["bf16"]
    assert json.loads((out / "drafter" / "config.json").read_text())["frames"] == 8
    shards = sorted((out / "answers").rglob("shard-00000.jsonl"))
    assert len(shards) == times
    assert run["rows"]["count"] + run.get("held_out", 0) <= 11 * times
    row = json.loads(shards[0].read_text().splitlines()[0])
    shape = tiny_tokenizer().decode(row["prompt_ids"])
    assert shape.endswith("ASSISTANT:" if "vicuna" in file.stem else "<|assistant|>")


def recipe_file(folder: Path, **changes: object) -> Path:
    given = yaml.safe_load((FOLDER / "vicuna-7b.yaml").read_text()) | {"chat_template": None} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return folder / "recipe.yaml"


def test_several_distillations_are_trained_on_together(tmp_path: Path) -> None:
    distill = [{"prompts": "self", "limit": 3, "seed": 1}, {"prompts": "self", "limit": 4, "temperature": 0.7}]
    first, second, third = command_lines(stages(read_recipe(recipe_file(tmp_path, distill=distill)), Path("out")))
    assert first[-8:] == ["--prompts", "self", "--limit", "3", "--seed", "1", "--out", "out/answers/00"]
    assert second[-6:] == ["--limit", "4", "--temperature", "0.7", "--out", "out/answers/01"]
    assert third[third.index("--data") + 1] == "out/answers"


@pytest.mark.slow
def test_answers_that_are_there_are_trained_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (line,) = command_lines(stages(read_recipe(recipe_file(tmp_path)), Path("out"), answers=tmp_path / "there"))
    assert line[0] == "train"
    assert line[line.index("--data") + 1] == str(tmp_path / "there")
    given = ["recipe", str(tmp_path / "recipe.yaml"), "--answers", str(tmp_path / "there")]
    assert main([*given, "--dry-run"]) == 0
    assert "distill" not in capfd.readouterr().out
    assert main([*given, "--estimate", "--flops", "1e14", "--bandwidth", "1e12"]) == 0
    assert "distillation" not in (shown := capfd.readouterr().out)
    assert "training: " in shown
    assert main([*given, "--prompts", "self"]) == 2
    assert "leave out --prompts" in capfd.readouterr().err


def test_another_tokenizer_is_that_of_both_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["recipe", str(recipe_file(tmp_path)), "--tokenizer", "owner/name", "--dry-run"]
    for more, commands in (([], ["distill", "train"]), (["--answers", str(tmp_path)], ["train"])):
        assert main([*given, *more]) == 0
        lines = capfd.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines] == commands
        assert all("--tokenizer owner/name" in line for line in lines)


@pytest.mark.parametrize("distill", [[], [{"out": "elsewhere"}], [{"limit": 3}, {"server": "http://x"}]])
def test_every_distillation_of_a_recipe_is_checked(distill: list, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no recipe: distill"):
        read_recipe(recipe_file(tmp_path, distill=distill))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_calls_the_commands_with_what_its_command_lines_say(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of typer, which reads the command lines of the page, are those that the functions are given."""
    parts = stages(read_recipe(file), tmp_path)
    settings = parts[-1][1].pop("set")
    for (name, given), line in zip(parts, command_lines(parts), strict=True):
        command = {"distill": distill, "train": train}[name]
        app, said = typer.Typer(), {}

        def caught(said=said, **values):
            said |= values

        caught.__signature__ = inspect.signature(command, eval_str=True)
        caught.__annotations__ = {name: p.annotation for name, p in caught.__signature__.parameters.items()}
        app.command()(caught)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")  # for OpenAI's server alone
        app(line[1:], standalone_mode=False)
        usual = {name: p.default for name, p in caught.__signature__.parameters.items()}
        assert usual | arguments(command, given) == usual | said
        assert said.get("api_key") is None
    assert set(settings) <= set(TrainSettings.model_fields)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("train", {"anchor": 3}, "train has no option anchor; it has data"),
        ("train", {"anchors": "many"}, "train: anchors is many: Input should be a valid integer"),
        ("train", {"anchors": 0}, "setting anchors: Input should be greater than or equal to 1"),
        ("train", {"max_length": 1}, "train: max_length is 1: Input should be greater than or equal to 2"),
        ("train", {"set": {"frames": 3}}, "unknown setting frames; known are loss"),
        ("train", {"set": ["bf16"]}, "settings are"),
        ("train", {"loss": "best"}, "train: loss is best: Input should be 'prefix', 'ctc' or 'teacher'"),
        ("distill", {"limit": 0}, "distill: limit is 0: Input should be greater than or equal to 1"),
        ("distill", {"prompts": None}, "distill needs prompts"),
    ],
)
def test_a_recipe_that_asks_for_nonsense_is_refused_in_one_line(part, values, said, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(sys.modules[train.__module__], "distill", given_away(distill, ran))
    given = yaml.safe_load(RECIPES[0].read_text())
    given[part] |= values
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    assert main(["recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert ran == []  # before hours of distillation


def given_away(command, ran):
    """A command that notes that it ran."""

    def note(**_values):
        ran.append(command.__name__)

    note.__signature__, note.__name__ = inspect.signature(command, eval_str=True), command.__name__
    return note


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


BARE = "title: x\ntarget: t\narchitecture: {{model_type: llama}}\ndistill: {{{distill}}}\ntrain: {{{train}}}\n"


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("distill", "server: http://127.0.0.1:1/v1"),
        ("distill", "model: x"),
        ("distill", "api_key: x"),
        ("distill", "api-key: x"),
        ("distill", "out=/elsewhere: x"),
        ("distill", "out: /elsewhere"),
        ("distill", "trust_remote_code: true"),
        ("distill", "'a b': x"),
        ("distill", "-x: y"),
        ("distill", "1: y"),
        ("distill", "target: other"),
        ("train", "push_to_hub: a/b"),
        ("train", "private: true"),
        ("train", "data: /etc"),
        ("train", "out: /elsewhere"),
        ("train", "Push_To_Hub: a/b"),
    ],
)
def test_a_recipe_sends_nothing_and_writes_nowhere_else(stage: str, option: str, tmp_path: Path) -> None:
    """Whose recipe it is does not say where the user's keys and files go."""
    (tmp_path / "r.yaml").write_text(BARE.format(**{"distill": "", "train": "", stage: option}))
    with pytest.raises(UserError, match=rf"r.yaml is no recipe: {stage}"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b]",
        "[" * 5000,
        "a: " + "{b: " * 3000 + "}" * 3000,
        "a: 1\n" * 20_000,
        "a: !!python/object/apply:os.system [x]",
    ],
)
def test_yaml_that_expands_or_nests_without_end_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match="is no recipe") as raised:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("distill", "train", "said"),
    [
        ("max_prompt_tokens: 9, max_new_tokens: 9, limit: 9", "", "train has no max_length"),
        ("max_prompt_tokens: 9, max_new_tokens: 9", "max_length: 9", "distill has no limit"),
        ("max_new_tokens: 9, limit: 9", "max_length: 9", "distill has no max_prompt_tokens"),
        ("max_prompt_tokens: 9, max_new_tokens: many, limit: 9", "max_length: 9", "max_new_tokens is 'many'"),
    ],
)
def test_an_estimate_says_which_size_the_recipe_lacks(
    distill: str, train: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(BARE.format(distill=distill, train=train))
    assert main(["recipe", str(tmp_path / "r.yaml"), "--estimate"]) == 2
    message = capfd.readouterr().err.strip()
    assert said in message
    assert "\n" not in message


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    sizes = "max_prompt_tokens: 9, max_new_tokens: 9, limit: 9"
    text = BARE.format(distill=sizes, train="max_length: 9").replace("llama", "nothing_like_it")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match="nothing_like_it"):
        plan_of(read_recipe(tmp_path / "r.yaml"))


def test_every_recipe_can_be_planned() -> None:
    for file in RECIPES:
        plan = plan_of(read_recipe(file))
        assert plan.settings.batch_size * plan.settings.accumulate == (8 if file.stem == "smollm2-135m" else 32)
        assert plan.text.longest <= plan.config.max_position_embeddings
        assert (ROOT / "docs" / "recipes" / f"{file.stem}.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_pages_are_what_the_recipes_say(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # pages name files as their reader does
    beside = file.relative_to(ROOT)
    assert Path("docs", "recipes", f"{file.stem}.md").read_text() == page(read_recipe(beside), beside)


# Recipes by name.


def test_recipes_come_with_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0]: line.split()[1] for line in lines} == {
        file.stem: read_recipe(file).target for file in RECIPES
    }
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ctc_drafter"]
    package = ROOT / "src" / "ctc_drafter"
    shipped = {file for pattern in patterns for file in package.glob(pattern)}
    assert {file for file in FOLDER.rglob("*") if file.is_file()} <= shipped


def test_a_recipe_by_name_or_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "vicuna-7b", "--dry-run"]) == 0
    named = capsys.readouterr().out
    assert main(["recipe", str(FOLDER / "vicuna-7b.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == named
    assert [line.split()[1] for line in named.splitlines()] == ["distill", "train"]
    assert named.count(str(FOLDER / "templates" / "vicuna.jinja")) == 2
    for wrong, said in (
        ("qwen3-8", "there is no recipe qwen3-8; did you mean qwen3-8b?"),
        ("none", "one of llama-2-13b-chat"),
    ):
        assert main(["recipe", wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["recipe"]) == 2
    assert "which recipe?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_for_another_target_reckons_for_that_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration and its chat template, not those of the recipe's target."""
    target = toy_target("qwen3", tmp_path)
    assert main(["recipe", "vicuna-7b", "--target", target, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"--target {target}") == 2
    assert "--chat-template" not in shown
    options = ["--flops", "1e14", "--bandwidth", "1e12", "--estimate"]
    assert main(["recipe", "vicuna-7b", *options]) == 0
    large = capsys.readouterr().out
    assert main(["recipe", "vicuna-7b", *options, "--target", target]) == 0
    small = capsys.readouterr().out
    recipe = read_recipe(FOLDER / "vicuna-7b.yaml")
    figures = dict(describe(estimate(plan_of(recipe, AutoConfig.from_pretrained(target))), 1e14, "given"))
    assert {f"{what}: {much}" for what, much in figures.items()} <= set(small.splitlines())
    assert set(small.splitlines()) & set(large.splitlines()) == {"steps: 3,750"}
