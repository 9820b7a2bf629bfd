"""The files of deploy/: what can be said about them without Docker and without starting a service."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from ctc_drafter.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVE = typer.main.get_command(app).commands["serve"]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, comments left out and continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [tuple(line.split(maxsplit=1)) for line in lines.splitlines() if line]


def of(name: str) -> list[str]:
    return [value for found, value in instructions() if found == name]


def unit() -> dict[str, list[str]]:
    """Settings of the service's unit, whatever their section."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "ctc-drafter.service").read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def settings(arguments: list[str]) -> dict[str, object]:
    """What `serve` makes of these arguments, without running it."""
    return SERVE.make_context("serve", arguments, **SERVE.context_settings).params


def test_the_image_starts_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (pair.split("=", 1) for line in of("ENV") for pair in shlex.split(line)):
        monkeypatch.setenv(name, value)
    (entry,) = of("ENTRYPOINT")
    program, command, *arguments = json.loads(entry)
    assert (program, command) == ("ctc-drafter", "serve")
    assert program in PROJECT["scripts"]
    found = settings(arguments)
    assert (found["host"], found["port"]) == ("0.0.0.0", 8000), "the container's port is reached from outside"
    assert of("EXPOSE") == ["8000"]
    assert settings([*arguments, "--target", "T", "--port", "9000"])["port"] == 9000


def test_the_image_has_what_it_copies_and_is_not_run_by_root() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for line in of("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= {source for line in of("COPY") for source in line.split()}
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert of("USER") == ["serve"]
    (base,) = of("FROM")
    version = tuple(map(int, re.search(r"python:(\d+)\.(\d+)", base).groups()))
    assert version >= tuple(map(int, re.search(r"(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))
    assert '".[serve]"' in " ".join(of("RUN"))
    assert "serve" in PROJECT["optional-dependencies"]


def test_the_health_check_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = of("HEALTHCHECK")
    program, option, code = json.loads(check[check.index("[") :])
    assert (program, option) == ("python", "-c")
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url))
    exec(compile(code, "health", "exec"), {})
    assert asked == ["http://localhost:8000/health"]


def test_the_unit_starts_the_server() -> None:
    (line,) = unit()["ExecStart"]
    program, command, option, config = shlex.split(line)
    assert (Path(program).name, command, option) == ("ctc-drafter", "serve", "--config")
    assert Path(config).name == "serve.yaml"
    found = settings([option, str(DEPLOY / "serve.yaml")])
    assert (found["host"], found["port"], found["log_format"]) == ("127.0.0.1", 8000, "json")
    assert float(unit()["TimeoutStopSec"][0]) > found["grace"] + 5
    assert unit()["RestartPreventExitStatus"] == ["2"], "the exit code of bad input"


def test_every_line_of_the_settings_may_be_uncommented(tmp_path: Path) -> None:
    text = (DEPLOY / "serve.yaml").read_text(encoding="utf-8")
    path = tmp_path / "serve.yaml"
    path.write_text(re.sub(r"^# (?=[a-z-]+: )", "", text, flags=re.MULTILINE), encoding="utf-8")
    found = settings(["--config", str(path)])
    assert found["target"] == "Qwen/Qwen3-8B"
    assert list(found["allow_origin"]) == ["https://chat.example"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "ctc-drafter.service").read_text(encoding="utf-8")
    copy = tmp_path / "ctc-drafter.service"
    copy.write_text(text.replace("/opt/ctc-drafter/bin/ctc-drafter", sys.executable), encoding="utf-8")
    run = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    ours = [line for line in run.stderr.splitlines() if "ctc-drafter" in line]
    assert ours == []


def test_the_docs_say_how() -> None:
    for file in ("deploy/Dockerfile", "deploy/ctc-drafter.service", "deploy/serve.yaml"):
        assert file in DOCS
        assert (ROOT / file).is_file()
