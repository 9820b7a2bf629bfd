import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ctc_drafter.cli import app, main
from ctc_drafter.cli.answer import figures_line
from ctc_drafter.decode.batch import DEFAULT_FLOOR, DEFAULT_NODES
from ctc_drafter.decode.stats import Stats
from tiny_models import save_pair, tiny_llama, tiny_tokenizer

COMMANDS = ("demo", "generate", "profile", "eval", "bench", "report", "exactness", "distill", "train", "serve")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny target and its drafter."""
    target, drafter = save_pair(tmp_path_factory.mktemp("models"))
    return ["--target", str(target), "--drafter", str(drafter)]


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    folder.joinpath("chat.jsonl").write_text('{"turns": ["the cat", "and?"]}\n{"turns": ["hat", "mat"]}\n')
    folder.joinpath("maths.jsonl").write_text('{"question": "how many?"}\n{"question": "and how?"}\n')
    return str(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    params = typer.main.get_command(app).commands[command].params
    assert [param.name for param in params if not getattr(param, "help", None)] == []
    if (nodes := [param for param in params if param.name == "nodes"]) and command != "bench":
        shown = {"generate": "auto", "chat": "auto", "serve": "auto", "profile": "those of --nodes auto"}
        assert nodes[0].show_default == shown.get(command, str(DEFAULT_NODES))


def test_help_needs_no_heavy_library() -> None:
    code = "import sys, ctc_drafter.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_generate_streams_the_targets_own_text(models: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["generate", *models, "--prompt", "the cat", "--max-new-tokens", "24"]
    assert main(options) == 0
    drafted = capfd.readouterr()
    assert main([*options, "--plain"]) == 0
    plain = capfd.readouterr()
    assert drafted.out == plain.out != "\n"
    assert drafted.err.startswith("24 tokens, ")
    assert drafted.err.endswith(" tokens per step\n")  # too few for a speed
    assert "tokens per step" not in drafted.out
    assert main([*options, "--raw"]) == 0
    assert capfd.readouterr().out != drafted.out


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_generate_from_a_file(models: list[str], tmp_path: Path, batch_size: str, capfd) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "out.json"
    prompts.write_text("the cat\na longer line about the hat\nmat\n")
    options = ["generate", *models, "--prompts-file", str(prompts), "--max-new-tokens", "9", "--json", str(out)]
    assert main([*options, "--batch-size", batch_size, "--nodes", "5"]) == 0
    drafted = json.loads(out.read_text())
    assert [output["prompt"] for output in drafted["outputs"]] == prompts.read_text().splitlines()
    assert (drafted["meta"]["nodes"], drafted["meta"]["batch_size"]) == (5, int(batch_size))
    assert drafted["stats"]["tokens"] == sum(len(output["tokens"]) for output in drafted["outputs"])
    assert all(output["text"] in capfd.readouterr().out for output in drafted["outputs"][:1])
    assert main([*options, "--plain"]) == 0
    assert json.loads(out.read_text())["outputs"] == drafted["outputs"]


def test_generate_samples_by_prompt_and_seed(models: list[str], tmp_path: Path, capfd) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "out.json"
    prompts.write_text("the cat\nthe cat\nmat\n")
    options = ["generate", *models, "--prompts-file", str(prompts), "--max-new-tokens", "12", "--json", str(out)]

    def texts(*more: str) -> list[list[int]]:
        assert main([*options, *more]) == 0
        return [output["tokens"] for output in json.loads(out.read_text())["outputs"]]

    sampled = ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "50"]
    drafted = texts(*sampled, "--seed", "3")
    assert drafted == texts(*sampled, "--seed", "3", "--batch-size", "3")
    assert drafted == texts(*sampled, "--seed", "3", "--plain")
    assert drafted != texts(*sampled, "--seed", "4")
    assert drafted[0] != drafted[1]
    assert drafted != texts()


def test_a_speed_is_shown_behind_fifty_tokens() -> None:
    stats = Stats(tokens=50, steps=20, step_tokens=49, seconds=2.0)
    assert figures_line(stats) == "50 tokens, 2.45 tokens per step, 25 tokens/s"
    assert figures_line(replace(stats, tokens=49)) == "49 tokens, 2.45 tokens per step"


def test_generate_samples_as_the_generation_config_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is not given is the model's; 0 is greedy all the same."""
    target, drafter = save_pair(tmp_path)
    options = [
        "generate",
        "--target",
        str(target),
        "--drafter",
        str(drafter),
        "--prompt",
        "the cat",
        "--max-new-tokens",
    ]

    def text(*more: str) -> str:
        assert main([*options, "16", "--seed", "3", *more]) == 0
        return capfd.readouterr().out

    greedy, sampled = text(), text("--temperature", "0.8", "--top-k", "9", "--top-p", "0.9")
    config = {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9}
    (target / "generation_config.json").write_text(json.dumps(config))
    assert text() == sampled != greedy
    assert text("--temperature", "0") == greedy
    assert text("--temperature", "0.8", "--top-k", "0", "--top-p", "1") != sampled


def test_generate_stops_at_a_text(models: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["generate", *models, "--prompt", "the cat", "--max-new-tokens", "24"]
    assert main(options) == 0
    full = capfd.readouterr().out.rstrip("\n")
    stop = full[len(full) // 2 :][:2]
    assert main([*options, "--stop", stop, "--stop", "never written"]) == 0
    cut = capfd.readouterr().out.rstrip("\n")
    assert cut == full[: full.index(stop)].rstrip("\n") != full


def test_eval_writes_and_shows_results(models: list[str], tasks_path: str, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out.json"
    options = ["--tasks-path", tasks_path, "--tasks", "chat, maths", "--limit", "1", "--max-new-tokens", "8"]
    assert main(["eval", *models, *options, "--batch-size", "2", "--json", str(out), "--seed", "3"]) == 0
    result = json.loads(out.read_text())
    assert {"command", "commit", "versions", "hardware", "dtype", "seed"} <= result["meta"].keys()
    assert (result["meta"]["seed"], result["meta"]["dtype"]) == (3, "float32")
    assert [(row["task"], row["method"], row["prompts"]) for row in result["rows"]] == [
        *(("chat", "plain", 1), ("chat", "ctc", 1), ("maths", "plain", 1), ("maths", "ctc", 1))
    ]
    assert all(row["identical"] == row["compared"] == 1 for row in result["rows"])
    shown = capfd.readouterr()
    assert "maths" in shown.out
    assert "\x1b" not in shown.out


@pytest.mark.parametrize("command", ["eval", "bench", "exactness"])
def test_the_chat_template_of_evaluations(
    command: str, models: list[str], tasks_path: str, tmp_path: Path, capfd
) -> None:
    """A template that makes a prompt of everything too long for the target leaves nothing to measure."""
    long = tmp_path / "long.jinja"
    long.write_text("{{ messages[0].content }}{{ ' and' * 5000 }}")
    drafter = f"one={models[3]}" if command == "bench" else models[3]
    options = [command, *models[:2], "--drafter", drafter, "--tasks-path", tasks_path, "--tasks", "maths"]
    options += ["--limit", "1", "--max-new-tokens", "4", "--dtype", "float32", "--chat-template", str(long)]
    assert main([*options, "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row.get("skipped", row.get("outputs")) for row in rows} == {0 if command == "exactness" else 1}
    assert main([*options[:-1], "no.jinja"]) == 2
    assert "cannot read the chat template no.jinja" in capfd.readouterr().err
    assert main([*options, "--chat-template-arg", "mood=good"]) == 2
    assert "the target's chat template has no variable mood" in capfd.readouterr().err


@pytest.mark.parametrize("drafts", ["the drafter's", "made up"])
def test_exactness_writes_and_shows_results(models: list[str], tasks_path: str, tmp_path: Path, capfd, drafts) -> None:
    out = tmp_path / "out.json"
    names = models if drafts == "the drafter's" else models[:2]
    options = ["--tasks-path", tasks_path, "--tasks", "chat", "--max-new-tokens", "8", "--dtype", "float32"]
    assert main(["exactness", *names, *options, "--batch-size", "2", "--nodes", "5", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"command", "commit", "versions", "hardware", "dtype", "kernel"} <= result["meta"].keys()
    assert (result["meta"]["drafter"] is None) == (drafts == "made up")
    assert [(row["outputs"], row["different"]) for row in result["rows"]] == [(4, 0)] * 4
    assert "trees of 5" in capfd.readouterr().out


def test_a_budget_is_measured_and_used(models: list[str], tasks_path: str, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "cache"))
    assert main(["profile", *models, "--nodes", "2", "--json", str(tmp_path / "steps.json")]) == 0
    shown, (file,) = capfd.readouterr().out, (tmp_path / "cache").iterdir()
    assert "2 nodes" in shown
    times = json.loads((tmp_path / "steps.json").read_text())
    assert times["times"] == json.loads(file.read_text())
    assert {"commit", "hardware", "dtype", "threads"} <= set(times["meta"])
    more = ["--limit", "1", "--max-new-tokens", "4", "--nodes", "2", "--budget", "--json", str(tmp_path / "out.json")]
    assert main(["eval", *models, "--tasks", "maths", "--tasks-path", tasks_path, *more]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["nodes"] for row in rows] == [None, 2, "budget"]
    assert all(row["identical"] == row["compared"] == 1 for row in rows)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert main(["generate", *models, "--prompt", "the cat", "--max-new-tokens", "4", "--nodes", "2", "--budget"]) == 0


@pytest.mark.measured
def test_answers_are_drafted_in_trees_that_pay_unless_a_number_is_given(models: list[str], tmp_path, caplog) -> None:
    caplog.set_level("INFO", "ctc_drafter")
    out, options = tmp_path / "out.json", ["--prompt", "the cat", "--max-new-tokens", "8"]
    texts = []
    for more in (["--plain"], ["--nodes", "4"], [], ["--nodes", "auto"], ["--nodes", "3", "--budget"]):
        assert main(["generate", *models, *options, *more, "--json", str(out)]) == 0
        result = json.loads(out.read_text())
        texts.append(result["outputs"][0]["tokens"])
        wanted = {"4": 4, "3": 3}.get(more[1] if more[1:] else "", "auto")
        assert result["meta"]["nodes"] == wanted
    assert len(set(map(tuple, texts))) == 1
    assert caplog.text.count("measuring step times") == 2, "up to all nodes, and up to 3"
    assert len(list((tmp_path / "cache").glob("steps-*.json"))) == 2


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"], ["serve"]])
@pytest.mark.parametrize("size", ["0", "-1", "2.5", "many"])
def test_sizes_that_are_none_are_refused(models: list[str], command, size, capfd) -> None:
    assert main([*command, *models, "--nodes", size]) == 2
    assert f"--nodes {size} is no size; give a number from 1, or auto" in capfd.readouterr().err


def test_demo_without_a_terminal(models: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *models, "--max-new-tokens", "10"]) == 0
    shown = capfd.readouterr()
    assert shown.out.count("identical: yes") == 2
    assert shown.out.count("Write a Python function") == 1
    assert "|" in shown.out
    assert "\x1b" not in shown.out
    assert shown.err == ""


@pytest.mark.slow
def test_from_prompts_to_a_drafter(models: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, answers, drafter = models[:2], tmp_path / "answers", tmp_path / "drafter"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {n}"}) + "\n" for n in range(12)))
    distill = ["distill", *target, "--prompts", str(prompts), "--out", str(answers), "--max-new-tokens", "16"]
    assert main(distill) == 0
    assert "12 answers" in capfd.readouterr().out
    assert main(distill) == 0
    assert capfd.readouterr().out.endswith("nothing to do, 12 answers are there\n")
    train = ["train", *target, "--data", str(answers), "--out", str(drafter), "--steps", "2", "--batch-size", "2"]
    train += ["--set", "progress=no", "--set", "warmup-steps=1", "--frames", "3", "--draft-length", "2"]
    assert main([*train, "--held-out", "0"]) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith(f"{drafter}: 2 steps")
    assert "{'" not in shown.out + shown.err, "the Trainer prints dictionaries"
    config = json.loads((drafter / "config.json").read_text())
    assert (config["frames"], config["draft_length"], config["mask_token_id"]) == (3, 2, 1)
    generate = ["generate", *target, "--prompt", "the cat", "--max-new-tokens", "5", "--drafter"]
    assert main([*generate, str(drafter)]) == 0

    authors = {"hydra": ("prefix", 1.0), "eagle": ("teacher", 0.8)}
    peers = {method: str(tmp_path / method) for method in authors}
    for method, peer in peers.items():
        options = ["--out", peer, "--method", method, "--draft-length", "2", "--steps", "1", "--held-out", "0"]
        assert main(["train", *target, "--data", str(answers), *options, "--set", "progress=no"]) == 0
        assert json.loads(Path(peer, "config.json").read_text())["model_type"] == f"{method}_drafter"
        learnt_from = json.loads(Path(peer, "train.json").read_text())["settings"]
        assert (learnt_from["loss"], learnt_from["loss_decay"]) == authors[method]
    capfd.readouterr()
    for name in (str(drafter), *peers.values(), "prompt_lookup"):
        assert main([*generate, name]) == 0
        shown = capfd.readouterr().out
        assert main([*generate, name, "--plain"]) == 0
        assert capfd.readouterr().out == shown


TRAIN = ["train", "--data", "x", "--out", "y", "--method"]
BAD = {
    "exactness without a target": (["exactness", "--drafter", "d"], "give --target as well"),
    "exactness of a folder": (["exactness", "--tasks-path", "."], "give --tasks as well"),
    "exactness of a file": (["exactness", "--tasks", "none.jsonl"], "none.jsonl"),
    "no prompt": (["generate"], "give either --prompt or --prompts-file"),
    "two prompts": (["generate", "--prompt", "a", "--prompts-file", "b"], "give either --prompt or --prompts-file"),
    "empty prompt": (["generate", "--prompt", " "], "the prompt is empty"),
    "no such file": (["generate", "--prompts-file", "none.jsonl"], "cannot read none.jsonl"),
    "half a pair": (["generate", "--prompt", "a", "--drafter", "x"], "give --target as well"),
    "half a pair, measured": (["profile", "--drafter", "x"], "give --target as well"),
    "revision of a name": (["demo", "--target", "tiny", "--revision", "v1"], "leave --revision out"),
    "revision of a folder": (["serve", "--target", ".", "--revision", "v1"], "--revision is for Hugging Face ids"),
    "revision in the id": (["demo", "--target", "owner/name@v1"], "--revision v1"),
    "a model of Ollama": (["demo", "--target", "ollama:qwen2.5"], "give the Hugging Face id of the weights"),
    "no folder": (["generate", "--prompt", "a", "--json", "none/out.json"], "cannot write none/out.json"),
    "zero tokens": (["generate", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
    "negative nodes": (["demo", "--nodes", "-1"], "--nodes"),
    "top-p without temperature": (["generate", "--prompt", "a", "--top-p", "0.9"], "--temperature"),
    "no mass": (["generate", "--prompt", "a", "--temperature", "1", "--top-p", "0"], "top_p"),
    "cold": (["generate", "--prompt", "a", "--temperature", "-1"], "--temperature"),
    "empty stop": (["generate", "--prompt", "a", "--stop", ""], "--stop"),
    "unknown dtype": (["demo", "--dtype", "int3"], "--dtype"),
    "unknown option": (["eval", "--task", "x"], "--task"),
    "unknown command": (["evil"], "evil"),
    "missing option": (["eval", "--tasks", "x"], "--tasks-path"),
    "no tasks": (["eval", "--tasks", "x", "--tasks-path", "none"], "none is not a folder"),
    "no folder of tasks": (["bench", "--tasks", "nothing_known"], "task nothing_known has no file"),
    "no size": (["bench", "--tasks", "x.jsonl", "--nodes", "8,many"], "--nodes many is no size"),
    "sizes by step times": (["bench", "--tasks", "x.jsonl", "--nodes", "auto"], "eval --budget"),
    "a name without a drafter": (["bench", "--tasks", "x.jsonl", "--drafter", "medusa"], "write NAME=DIR"),
    "a name twice": (["bench", "--tasks", "x.jsonl", "--drafter", "a=b", "--drafter", "a=c"], "the name a is taken"),
    "quick with a drafter": (["bench", "--quick", "--drafter", "a=b"], "leave out --drafter"),
    "quick of another target": (["bench", "--quick", "--target", "x"], "need --target and --data together"),
    "quick without a place": (["bench", "--quick", "--target", "x", "--data", "y"], "give --work as well"),
    "data without quick": (["bench", "--tasks", "x.jsonl", "--data", "y"], "belong to --quick or --ablations"),
    "no depth": (["bench", "--tasks", "x.jsonl", "--depths", "3,none"], "--depths none is no depth"),
    "steps without quick": (["bench", "--tasks", "x.jsonl", "--steps", "5"], "belong to --quick or --ablations"),
    "both": (["bench", "--quick", "--ablations"], "either --quick or --ablations"),
    "bench of half a pair": (["bench", "--tasks", "x.jsonl", "--drafter", "a=b"], "give --target as well"),
    "no target": (["generate", "--prompt", "a", "--target", "./none", "--drafter", "./none"], "./none"),
    "no corpus": (["distill", "--prompts", "none", "--out", "x"], "none"),
    "a file to train on": (["train", "--data", __file__, "--out", "y"], "first ctc-drafter distill --prompts"),
    "no value": (["train", "--data", "x", "--out", "y", "--set", "anchors"], "NAME=VALUE"),
    "unknown setting": (["train", "--data", "x", "--out", "y", "--set", "anchor=3"], "unknown setting anchor"),
    "unknown method": (["train", "--data", "x", "--out", "y", "--method", "medus"], "unknown method medus"),
    "nothing to train": (["train", "--data", "x", "--out", "y", "--method", "prompt_lookup"], "nothing to train"),
    "no draft vocabulary": ([*TRAIN, "eagle", "--draft-vocabulary", "9"], "takes no --draft-vocabulary; ctc does"),
    "no frames": ([*TRAIN, "medusa", "--frames", "4"], "--method medusa takes no --frames; ctc, ctc-paper do"),
    "no copies": ([*TRAIN, "eagle", "--copies", "16"], "--method eagle takes no --copies; ctc does"),
    "no copying first": ([*TRAIN, "dflash", "--lookup", "0"], "--method dflash takes no --lookup; ctc does"),
    "no predictor": ([*TRAIN, "hydra", "--predictor-rank", "8"], "takes no --predictor-rank; ctc, dspark do"),
    "no block": ([*TRAIN, "hydra++", "--no-carry"], "--carry; ctc, ctc-paper, dflash, dflash2, dspark do"),
    "another GPU for training": (["train", "--data", "x", "--out", "y", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
    "unknown device": (["generate", "--prompt", "a", "--target", "tiny", "--device", "tpu9"], "tpu9 is no device"),
    "bad setting": (["train", "--data", "x", "--out", "y", "--steps", "0"], "steps"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments: list[str], part: str, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "distill":
        save_pair(tmp_path)
        arguments = [*arguments, "--target", "target"]
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert part in shown.err


def test_bad_input_after_loading(models: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide"
    tiny_llama(vocab_size=300).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    corrupt = tmp_path / "corrupt"
    save_pair(corrupt)
    (corrupt / "drafter" / "model.safetensors").write_bytes(b"no tensors")
    turns = tmp_path / "turns.jsonl"
    turns.write_text('{"turns": ["a", "b"]}')
    for arguments, part in [
        (["--target", str(wide), *models[2:], "--prompt", "a"], "vocabulary"),
        ([*models[:2], "--drafter", str(corrupt / "drafter"), "--prompt", "a"], "corrupt"),
        ([*models, "--prompt", "the cat " * 600], "context"),
        ([*models, "--prompts-file", str(turns)], "2 turns"),
        ([*models, "--prompt", "a\udce9"], "Unicode"),
    ]:
        assert main(["generate", *arguments]) == 2
        shown = capfd.readouterr()
        assert (shown.out, shown.err.count("\n"), part in shown.err) == ("", 1, True), shown.err


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch, models: list[str]) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("ctc_drafter.cli.answer.generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["generate", *models, "--prompt", "a"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, models: list[str]) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ctc_drafter.cli.answer.generate", interrupted)
    assert main(["generate", *models, "--prompt", "a"]) == 130


def test_the_defaults_that_help_names_are_those_that_serve():
    """They are written out there because reading them would import torch."""
    options = {option.name: option for option in typer.main.get_command(app).commands["eval"].params}
    assert options["nodes"].show_default == str(DEFAULT_NODES)
    assert options["floor"].show_default == str(DEFAULT_FLOOR)
