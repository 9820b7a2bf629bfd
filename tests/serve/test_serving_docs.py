"""docs/serving.md names every option, its default and what it does."""

from pathlib import Path

import typer

from ctc_drafter.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def options_table() -> str:
    """From the command itself."""
    lines = ["| option | default | what |", "|---|---|---|"]
    for option in typer.main.get_command(app).commands["serve"].params:
        shown = option.show_default if isinstance(option.show_default, str) else option.default
        default = "off" if shown is False else "none" if shown is None else shown
        lines.append(f"| `{option.opts[0]}` | {default} | {option.help} |")
    return "\n".join(lines)


def test_the_options_are_the_commands():
    between = PAGE.split("<!-- options -->\n")[1].split("\n<!-- end of options -->")[0]
    assert between == options_table()
