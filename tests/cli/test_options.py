"""Options of every command against a snapshot: names, types and defaults are an interface, help texts are not.

After a change that CHANGELOG.md names, `python tests/cli/test_options.py` writes the snapshot anew.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from ctc_drafter.cli import app
from ctc_drafter.cli.train import NAMED, SHOWN, SWITCHES
from ctc_drafter.train.settings import TrainSettings

SNAPSHOT = Path(__file__).parents[1] / "support" / "cli_options.json"
COMMANDS = typer.main.get_command(app).commands


def described(param: Any) -> dict[str, Any]:
    """What a user can type for a parameter, and what it means if it is left out."""
    kind = param.type_descriptor.annotation
    found = {"names": [*param.opts, *param.secondary_opts], "type": getattr(kind, "__name__", str(kind))}
    if "Literal" in str(kind):
        found["type"] = str(kind).removeprefix("typing.")
    if param.default is not None and not param.required:
        found["default"] = param.default if isinstance(param.default, bool | int | float) else str(param.default)
    for name in ("min", "max", "envvar", "required", "multiple"):
        value = getattr(param, name, None)
        if value is not None and value is not False:
            found[name] = value
    return found


def options(command: str) -> dict[str, Any]:
    return {param.name: described(param) for param in COMMANDS[command].params}


def snapshot() -> dict[str, Any]:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_commands_are_those_of_the_snapshot() -> None:
    assert sorted(COMMANDS) == sorted(snapshot())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_options_and_defaults_are_those_of_the_snapshot(command: str) -> None:
    assert options(command) == snapshot()[command]


@pytest.mark.parametrize("name", NAMED)
def test_options_of_training_settings_say_what_the_settings_say(name: str) -> None:
    """`TrainSettings` is the one place that declares them."""
    field = TrainSettings.model_fields[name]
    (param,) = (param for param in COMMANDS["train"].params if param.name == name)
    assert param.help.lower() == f"{field.description}.".lower()
    shown = param.show_default if isinstance(param.show_default, str) else None
    assert shown == (str(field.default) if name not in (*SHOWN, *SWITCHES) else SHOWN.get(name))


def write() -> None:
    text = json.dumps({name: options(name) for name in sorted(COMMANDS)}, indent=1, sort_keys=True)
    SNAPSHOT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
