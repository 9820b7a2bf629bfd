"""The examples run as their first lines say, on the small pair that ships."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from serve_helpers import running, tiny_service

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, cwd: Path = ROOT) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    found = sorted(file.name for file in EXAMPLES.glob("*.py"))
    assert len(found) == 4
    assert all(f'run("{name}"' in here for name in found)
    assert all(len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40 for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], [str(TARGET_DIR)], [str(TARGET_DIR), str(DRAFTER_DIR)]], ids=len)
def test_generate(arguments: list[str]) -> None:
    assert "same text: True" in run("generate.py", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], [str(TARGET_DIR)]], ids=len)
def test_many_prompts(arguments: list[str]) -> None:
    lines = [line for line in run("many_prompts.py", *arguments).splitlines() if line[:1].isdigit()]
    assert sorted(int(line.partition(":")[0]) for line in lines) == list(range(6))


@pytest.mark.slow
def test_a_client() -> None:
    with running(tiny_service(), None) as server:
        assert len(run("chat_client.py", f"{server.url}/v1").splitlines()) >= 2


@pytest.mark.slow
def test_a_drafter_is_trained(tmp_path: Path) -> None:
    shown = run("train_drafter.py", "tiny", str(tmp_path))
    assert (tmp_path / "drafter" / "model.safetensors").is_file()
    assert shown.count("ctc-drafter ") >= 3


NOTEBOOK = EXAMPLES / "speculative_decoding.ipynb"


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_the_notebook_is_plain_python_without_outputs() -> None:
    """What it prints depends on the machine; its cells are run as a script, so that they hold no magic of IPython."""
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], len({cell["id"] for cell in book["cells"]})) == (4, len(book["cells"]))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for text in cells("code"):
        ast.parse(text)
    named = re.findall(r"`(docs/[\w.]+)`", "".join(cells("markdown")))
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(cells("code")))
    shown = run(str(script), cwd=tmp_path)
    assert shown.count("same text: True") == 2
    assert "repeated: True" in shown
    assert all(float(figure) > 1 for figure in re.findall(r"([\d.]+) tokens per step", shown))
    assert shown.count("tokens per step") == 2
    assert re.search(r"\[[^]]+ [^]]+\]", shown), "several words at once"


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    heads = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    assert heads[1][0] == version
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", heads[1][1])


def test_the_citation_names_paper_and_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "CTC-based Draft Model" in cited["references"][0]["title"]
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_commands_for_the_papers_tables_are_commands() -> None:
    """Every option of every command line in docs/reproduce.md is one of that command's."""
    import shlex

    import typer

    from ctc_drafter.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line) for line in re.findall(r"^ +(ctc-drafter .*)$", text, re.MULTILINE)]
    assert len(lines) >= 4
    for _, name, *arguments in lines:
        known = {option for each in commands[name].params for option in each.opts}
        assert {each for each in arguments if each.startswith("--")} <= known
