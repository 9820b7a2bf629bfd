"""Help, version, completion, examples; conversations in a terminal; what an interrupt says."""

import importlib
import io
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from ctc_drafter import __version__
from ctc_drafter.chat import encode_conversation
from ctc_drafter.cli import app, main
from ctc_drafter.cli.answer import Answerer, AnswerSettings
from ctc_drafter.cli.chat import converse
from ctc_drafter.cli.help import EXAMPLES, resumable
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.target.model import Target
from tiny_models import save_pair, tiny_drafter, tiny_llama, tiny_tokenizer

COMMANDS = typer.main.get_command(app).commands


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr()
    assert (main(["--help"]), bare.err) == (0, "")
    assert capsys.readouterr().out == bare.out
    assert all(name in bare.out for name in COMMANDS)


def test_short_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-h"]) == 0
    short = capsys.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert capsys.readouterr().out == short
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ctc-drafter {__version__}\n"


def test_version_needs_no_heavy_library() -> None:
    code = "import sys, ctc_drafter.cli as c; c.main(['--version']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_CTC_DRAFTER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ctc-drafter ex")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.split() == ["exactness", "export"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_takes(name: str) -> None:
    command = COMMANDS[name]
    assert command.epilog == f"Example: {EXAMPLES[name]}"
    program, called, *arguments = shlex.split(EXAMPLES[name])
    assert (program, called) == ("ctc-drafter", name)
    command.make_context(name, arguments)  # raises for options that it does not have


@pytest.mark.parametrize("name", ["generate", "serve", "train", "bench", "distill"])
def test_long_help_is_in_groups(name: str) -> None:
    panels = [getattr(param, "rich_help_panel", None) for param in COMMANDS[name].params]
    assert len(set(panels)) >= 4
    assert panels.count(None) <= 10


def test_switches_are_shown_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if "--help" not in line]  # typer's own
        assert not any("<bool>" in line for line in shown), name


def test_options_of_training_stand_together() -> None:
    panels = {param.name: getattr(param, "rich_help_panel", None) for param in COMMANDS["train"].params}
    assert {panels[name] for name in ("steps", "epochs", "batch_size", "seed", "learning_rate")} == {"Training"}
    assert panels["convolution"] == panels["carry"] == "Drafter's sizes"
    panels = {param.name: getattr(param, "rich_help_panel", None) for param in COMMANDS["distill"].params}
    assert panels["batch_size"] == "Decoding"


def test_a_prompt_from_standard_input(tmp_path: Path, monkeypatch, capsys) -> None:
    target, drafter = save_pair(tmp_path)
    options = ["generate", "--target", str(target), "--drafter", str(drafter), "--max-new-tokens", "8", "--prompt"]
    assert main([*options, "the cat"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert main([*options, "-"]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main([*options, "-"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


# Conversations.


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    model = tiny_llama()
    return Answerer(Target.wrap(model), tiny_drafter(model), tiny_tokenizer(), AnswerSettings(6, 1, 5))


def told(answerer: Answerer, *turns: str, system: str = "") -> list[str]:
    """What plain decoding answers to these turns, each with the ones before it."""
    answers: list[str] = []
    for count in range(1, len(turns) + 1):
        ids = encode_conversation(answerer.tokenizer, turns[:count], answers, system=system)
        tokens = plain_generate(answerer.target, [ids], max_new_tokens=6, eos=(1,)).tokens[0]
        answers.append(answerer.text(tokens))
    return answers


def test_a_conversation_keeps_what_was_said(answerer: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    converse(answerer, ["the cat\n", "\n", "and the hat?\n", "/new\n", "the hat\n", "/exit\n", "never asked"], out)
    first, fresh = told(answerer, "the cat", "and the hat?"), told(answerer, "the hat")
    assert out.getvalue() == "".join(f"{text}\n" for text in [*first, *fresh])
    err = capsys.readouterr().err
    assert err.count("tokens per step") == 3
    assert "tokens/s" not in err


def test_a_conversation_with_a_system_prompt(answerer: Answerer) -> None:
    out = io.StringIO()
    converse(answerer, ["the cat"], out, "be brief")
    assert out.getvalue().rstrip("\n") == told(answerer, "the cat", system="be brief")[0].rstrip("\n")


def test_lines_that_cannot_be_answered_cost_nothing_else(answerer: Answerer, capsys, monkeypatch) -> None:
    out = io.StringIO()
    converse(answerer, ["/help", "cat " * 600, "a \udce9", "the cat"], out)
    err = capsys.readouterr().err
    assert "there is no /help; /new starts" in err
    assert "the chat is full (" in err
    assert "/new starts another" in err
    assert "not valid Unicode" in err
    assert out.getvalue() == told(answerer, "the cat")[0] + "\n"


def test_an_answer_that_is_stopped_is_not_in_the_conversation(answerer: Answerer, capsys, monkeypatch) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    out = io.StringIO()
    lines = iter(["the mat", "the cat"])

    def typed():
        with monkeypatch.context() as patch:
            patch.setattr("ctc_drafter.cli.answer.generate", interrupted)
            yield next(lines)
        yield next(lines)

    converse(answerer, typed(), out)
    assert "stopped" in capsys.readouterr().err
    assert out.getvalue() == told(answerer, "the cat")[0] + "\n"


def test_chat_from_a_pipe(tmp_path: Path, monkeypatch, capsys) -> None:
    target, drafter = save_pair(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nand?\n"))
    assert main(["chat", "--target", str(target), "--drafter", str(drafter), "--max-new-tokens", "6"]) == 0
    drafted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nand?\n"))
    assert main(["chat", "--target", str(target), "--plain", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == drafted != ""


# Interrupts.


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SimpleNamespace(code=143), 143)])
def test_an_interrupted_command_says_that_it_goes_on(error: object, code: int, capsys) -> None:
    def command() -> None:
        interrupt = KeyboardInterrupt()
        if not isinstance(error, KeyboardInterrupt):
            interrupt.code = error.code
        raise interrupt

    with pytest.raises(typer.Exit) as caught:
        resumable(command)()
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"


@pytest.mark.parametrize("command", ["distill", "train", "recipe"])
def test_long_commands_say_it(command: str, monkeypatch, capsys, tmp_path: Path) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    place = {"distill": "ctc_drafter.load.load_target", "train": "ctc_drafter.train.publish.train_for_target"}
    monkeypatch.setattr(place.get(command, "ctc_drafter.train.recipe.read_recipe"), interrupted)
    arguments = {"distill": ["--prompts", "p"], "train": ["--data", "d"], "recipe": ["qwen3-8b"]}
    assert main([command, *arguments[command], "--out", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on\n")


@pytest.mark.parametrize("tool", ["families", "layout"])
def test_tools_that_write_pages_write_none_called_help(tool: str, tmp_path: Path, monkeypatch, capsys) -> None:
    main_of = importlib.import_module(f"benchmarks.{tool}").main
    monkeypatch.chdir(tmp_path)
    for arguments, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            main_of(arguments)
        assert caught.value.code == code
        assert "usage: python -m benchmarks" in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []
