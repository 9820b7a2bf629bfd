"""Targets whose folder has no tokenizer (`--tokenizer`), and the line about a loading that takes long."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import typer

from ctc_drafter.cli import app, main
from ctc_drafter.load import load_config, load_target, said_if_slow
from ctc_drafter.types import UserError
from tiny_models import save_pair, tiny_drafter, tiny_llama, tiny_tokenizer


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A target without tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_a_target_without_tokenizer_says_what_to_give(bare: Path) -> None:
    for load in (lambda: load_target(str(bare), "float32", "cpu"), lambda: load_config(str(bare))):
        with pytest.raises(UserError, match=r"no tokenizer could be loaded from .*: --tokenizer NAME"):
            load()


def test_the_tokenizer_of_another_folder_is_taken(bare: Path, words: Path) -> None:
    _, found = load_target(str(bare), "float32", "cpu", tokenizer=str(words))
    _, again, ends = load_config(str(bare), tokenizer=str(words))
    assert found.get_vocab() == again.get_vocab() == tiny_tokenizer().get_vocab()
    assert tiny_tokenizer().eos_token_id in ends


def test_a_tokenizer_that_is_not_there(bare: Path, tmp_path: Path) -> None:
    """An id of the hub that is not there is in test_names.py."""
    nothing = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"no tokenizer could be loaded from {nothing}") as caught:
        load_target(str(bare), "float32", "cpu", tokenizer=nothing)
    assert "--tokenizer" not in str(caught.value)


def test_a_tokenizer_with_more_ids_than_the_target(tmp_path: Path, words: Path) -> None:
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "small")
    for load in (lambda **o: load_target(str(tmp_path / "small"), "float32", "cpu", **o),
                 lambda **o: load_config(str(tmp_path / "small"), **o)):  # fmt: skip
        with pytest.raises(UserError, match=r"has ids up to \d+, and the target 100 tokens"):
            load(tokenizer=str(words))


def test_generate_with_it_answers_as_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, drafter = save_pair(tmp_path)
    said = []
    for options in ([], ["--tokenizer", str(tmp_path / "words")]):
        if options:
            tiny_tokenizer().save_pretrained(tmp_path / "words")
            for file in target.glob("*token*"):
                file.unlink()
        pair = ["--target", str(target), "--drafter", str(drafter)]
        assert main(["generate", *pair, *options, "--prompt", "the cat", "--max-new-tokens", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


MORE = {
    "generate": ["--prompt", "x"],
    "serve": ["--port", "0"],
    "distill": ["--prompts", "PROMPTS", "--out", "OUT"],
    "train": ["--data", "ANSWERS", "--out", "OUT"],
    "export": ["--drafter", "DRAFTER", "--out", "OUT"],
    "recipe": ["vicuna-7b", "--estimate"],
    "eval": ["--tasks", "PROMPTS"],
    "bench": ["--tasks", "PROMPTS"],
}
COMMANDS = typer.main.get_command(app).commands
TAKERS = sorted(name for name, command in COMMANDS.items() if any("--target" in each.opts for each in command.params))


@pytest.mark.sparing(4)
@pytest.mark.parametrize("command", TAKERS)
def test_every_command_with_a_target_hands_it_on(command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*given, **named) -> None:
        found = [each for each in (*given, *named.values()) if each == "some words"]
        raise UserError(f"asked for {found}")

    for place in ("ctc_drafter.load", "ctc_drafter.train.publish"):
        monkeypatch.setattr(f"{place}.load_target", refuse)
        monkeypatch.setattr(f"{place}.load_config", refuse)
    monkeypatch.setattr("ctc_drafter.train.publish.TrainJob.rows", lambda self: (None, None))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    tiny_drafter(tiny_llama()).save_pretrained(tmp_path / "drafter")
    places = {"PROMPTS": "prompts.jsonl", "OUT": "out", "ANSWERS": "answers", "DRAFTER": "drafter"}
    more = [str(tmp_path / places[each]) if each in places else each for each in MORE.get(command, [])]
    assert main([command, "--target", "owner/name", "--tokenizer", "some words", *more]) == 2
    assert "error: asked for ['some words']" in capsys.readouterr().err


def test_a_slow_loading_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ctc_drafter"):
        with said_if_slow("loading this ...", 30):
            pass
        assert caplog.messages == []
        with said_if_slow("loading that ...", 0.05):
            end = time.monotonic() + 60
            while not caplog.messages:
                assert time.monotonic() < end
                time.sleep(0.01)
    assert caplog.messages == ["loading that ..."]
