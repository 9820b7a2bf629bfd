"""A model's own Python code runs only where the user says so, and never because stdin says "y"."""

import json
from pathlib import Path

import pytest
import typer

from ctc_drafter.cli import app, main
from ctc_drafter.load import load_config, load_target
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from tiny_models import tiny_llama, tiny_tokenizer

CODE = """
from pathlib import Path
Path({ran!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS = {
    "config": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    "model": {"AutoModelForCausalLM": "own.OwnModel"},
    "tokenizer": {},
}


@pytest.fixture(autouse=True)
def says_yes(monkeypatch):
    """What `yes | ctc-drafter ...` answers to every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def folder_of(place: Path, part: str) -> tuple[str, Path]:
    """A model whose configuration, model or tokenizer brings its own code, and the file that this code writes."""
    ran = place / "ran"
    tiny_llama().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    (place / "own.py").write_text(CODE.format(ran=str(ran)), encoding="utf-8")
    config = json.loads((place / "config.json").read_text())
    types = {"config": "own_llama", "model": "clip_text_model", "tokenizer": config["model_type"]}
    config |= {"model_type": types[part]} | ({"auto_map": MAPS[part]} if MAPS[part] else {})
    (place / "config.json").write_text(json.dumps(config))
    if part == "tokenizer":
        file = place / "tokenizer_config.json"
        named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return str(place), ran


@pytest.mark.parametrize("part", MAPS)
def test_a_models_own_code_does_not_run_unasked(part, tmp_path):
    name, ran = folder_of(tmp_path, part)
    loads = [lambda: load_target(name, "float32", "cpu"), lambda: load_config(name)]
    for load in loads if part != "model" else loads[:1]:
        with pytest.raises(UserError) as raised:
            load()
        if part != "model":
            assert "--trust-remote-code" in str(raised.value)
        assert "\n" not in str(raised.value)
    if part != "tokenizer":
        with pytest.raises(UserError):
            Target.load(name)
    assert not ran.exists()


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_it_runs_where_the_user_says_so(part, tmp_path):
    name, ran = folder_of(tmp_path, part)
    target, _ = load_target(name, "float32", "cpu", trust_remote_code=True)
    assert ran.exists()
    ran.unlink()
    assert target.vocab_size == 280
    assert load_config(name, trust_remote_code=True)[0].vocab_size == 280


def test_the_command_line_says_which_option_allows_it(tmp_path, capfd):
    name, ran = folder_of(tmp_path, "config")
    command = ["generate", "--target", name, "--plain", "--prompt", "hi", "--max-new-tokens", "2"]
    assert main(command) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "--trust-remote-code" in message
    assert not ran.exists()
    assert main([*command, "--trust-remote-code"]) == 0
    assert ran.exists()


def test_whatever_takes_a_revision_takes_the_option():
    """Both belong to the target."""
    for name, command in typer.main.get_command(app).commands.items():
        options = {option for param in command.params for option in param.opts}
        assert ("--trust-remote-code" in options) == ("--revision" in options), name
