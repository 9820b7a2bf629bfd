"""Who may import whom, read from the source: imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "ctc_drafter"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# A row names a file or folder of the package, and what it may import besides its own folder; a file's row adds to its
# folder's. A name stands for all below it; "drafters.base" means that file alone.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "files": {"types"},
    "chat": {"types"},
    "rows": {"types", "files"},
    "provenance": {"types", "files", "chat"},
    "ctc": {"types"},
    "target": {"types"},
    "target.gguf": {"files"},
    "target.regional": {"files"},
    "target.openvino_graph": {"files", "provenance"},
    "target.names": {"quickstart"},
    "drafters": {"types", "ctc", "target.packed"},  # linear layers on a CPU, whosever they are
    "drafters.registry": {"target", "chat"},
    "drafters.custom_generate": {"__init__"},  # lies in drafters' folders, and uses the package as anybody does
    "drafters.warm_start": {"target", "chat", "provenance"},
    "decode": {"types", "target", "drafters.base"},
    "decode.profile": {"files", "provenance", "drafters.trainable"},
    "train": {"types", "files", "provenance", "chat", "rows", "ctc", "target", "drafters", "decode"},
    # Whole runs by names and folders, as the command line makes them.
    "train.publish": {"load", "quickstart"},
    # A bench trains small drafters of its own.
    "evaluate": {
        *("types", "files", "provenance", "chat", "rows", "target", "drafters", "decode"),
        *("train", "quickstart", "load"),
    },
    "serve": {"types", "chat", "target", "drafters", "decode"},
    # Engines verify a chain: which one is best is said in `decode.tree`.
    "integrations": {"types", "ctc", "drafters", "decode.tree"},
    "quickstart": set(),
    # The rows below serve the command line and the user; of the above only `evaluate` and `train.publish` import them.
    "load": {"types", "chat", "target", "drafters", "quickstart"},
    "steps": {"types", "load", "target", "drafters.base", "decode"},
    "cli": {"*"},
    "speculator": {"types", "target", "drafters", "decode"},
    "__init__": {"types", "speculator", "ctc", "target", "drafters", "decode"},
}

# In drafters/, what is shared imports no concrete drafter. Those of baselines/ do not import each other, but for what
# they share; ours imports none of them.
CONCRETE = {"drafters.ctc", "drafters.baselines"}
NOT_SHARED = {"drafters.registry", "drafters.warm_start"}
SHARED_BY_BASELINES = {f"drafters.baselines.{name}" for name in ("chain_rule", "chain_rule_cpu", "heads", "eagle")}

# Optional engines, and the only files or folders that may import them. Nobody but `cli` imports integrations, and
# lazily.
ENGINES = {
    "vllm": {"integrations.vllm"},
    "sglang": {"integrations.sglang"},
    "xllamacpp": {"evaluate.llama_cpp"},
    "openvino_genai": {"evaluate.openvino"},
    "openvino": {
        *("target.openvino", "target.openvino_attention", "target.openvino_graph", "evaluate.openvino"),
    },
}

# What pure folders may import from outside besides the standard library.
OUTSIDE = {"types": {"torch"}, "ctc": {"torch", "numpy", "numba"}}


@dataclass(frozen=True)
class Import:
    """`importer` and `imported` are dotted names inside the package; outside ones are `outside` and have no rule."""

    importer: str
    line: int
    imported: str
    outside: bool
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_names(root: Path) -> dict[str, Path]:
    """Dotted name inside the package -> file; a folder goes by its own name, the package by `__init__`."""
    names = {}
    for path in root.rglob("*.py"):
        if path.parent.name == "custom_generate":  # of a drafter that ships: data of the package
            continue
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


def absolute_names(node: ast.AST, package: list[str]) -> list[tuple[str, str | None]]:
    """(module, name taken from it) for a node that imports; `package` is where relative imports start."""
    match node:
        case ast.Import():
            return [(alias.name, None) for alias in node.names]
        case ast.ImportFrom():
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            return [(module, alias.name) for alias in node.names]
        case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
            first = node.args[0] if node.args else None
            return [(first.value, None)] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node with whether it runs only when a function is called."""
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    is_folder = path.name == "__init__.py"
    package = [PACKAGE, *(name.split(".") if name != "__init__" else [])]
    package = package if is_folder else package[:-1]
    for node, lazy in walk(ast.parse(path.read_text(encoding="utf-8"))):
        for module, taken in absolute_names(node, package):
            top, _, inside = module.partition(".")
            if top != PACKAGE:
                yield Import(name, node.lineno, module, True, lazy)
                continue
            submodule = ".".join(part for part in (inside, taken) if part)
            yield Import(name, node.lineno, submodule if submodule in known else inside or "__init__", False, lazy)


@cache
def all_imports(root: Path) -> list[Import]:
    known = module_names(root)
    return [found for name, path in sorted(known.items()) for found in imports_of(name, path, known)]


def within(name: str, scopes: set[str]) -> bool:
    return any(scope == "*" or name == scope or name.startswith(scope + ".") for scope in scopes)


def allowed(importer: str) -> set[str]:
    """What the rows of a file and of its folder let it import."""
    parts = importer.split(".")
    rows = (MAY_IMPORT.get(".".join(parts[:length]), set()) for length in range(1, len(parts) + 1))
    return set().union(*rows)


def drafter_complaint(importer: str, imported: str) -> str | None:
    """What is wrong with an import from drafters/ inside drafters/, or None."""
    if imported in SHARED_BY_BASELINES and within(importer, {"drafters.baselines"}):
        return None
    if within(imported, {"drafters.baselines"}) and imported != importer:
        if within(importer, {"drafters.baselines"}):
            return "baselines do not import each other"
        return "a baseline is imported by its name alone, in the registry"
    if within(imported, CONCRETE) and not within(importer, CONCRETE | NOT_SHARED):
        return "what drafters share imports none of them"
    return None


def complaint(found: Import) -> str | None:
    """What is wrong with an import, or None."""
    area = found.importer.split(".")[0]
    if found.outside:
        package = found.imported.split(".")[0]
        if package in ENGINES and not within(found.importer, ENGINES[package]):
            return f"only {' and '.join(sorted(ENGINES[package]))} may import {package}"
        if area in OUTSIDE and package not in OUTSIDE[area] | sys.stdlib_module_names:
            return f"{area} is pure: only {', '.join(sorted(OUTSIDE[area]))} from outside"
        return None
    if area not in MAY_IMPORT:
        return f"{area} has no row in the table"
    if found.imported.split(".")[0] == "integrations" and area != "integrations" and not found.lazy:
        return "integrations are imported lazily, inside a function"
    if area == "drafters" and (why := drafter_complaint(found.importer, found.imported)):
        return why
    own_folder = found.imported.split(".")[0] == area
    return None if own_folder or within(found.imported, allowed(found.importer)) else "not in its row of the table"


def violations(root: Path) -> list[str]:
    without_row = {name.split(".")[0] for name in module_names(root)} - MAY_IMPORT.keys()
    wrong = [f"{found}: {why}" for found in all_imports(root) if (why := complaint(found))]
    return [f"{area}: has no row in the table" for area in sorted(without_row)] + wrong


def cycle(root: Path) -> list[str] | None:
    """A cycle among imports made at load time, if there is one."""
    graph: dict[str, set[str]] = {}
    for found in all_imports(root):
        if not found.outside and not found.lazy:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_package_keeps_the_rule() -> None:
    assert len(all_imports(SOURCE)) > 20, "the sources were not found"
    assert violations(SOURCE) == []


def test_no_cycles() -> None:
    assert cycle(SOURCE) is None


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in SOURCE.rglob("*.py")} - {*SOURCE.rglob("custom_generate")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def write_package(root: Path, files: dict[str, str]) -> Path:
    """A small package that keeps the rule, with `files` (path -> source) on top."""
    base = {
        "__init__.py": "from ctc_drafter.drafters.ctc import CTC",
        "types.py": "import torch",
        "ctc/__init__.py": "",
        "ctc/loss.py": "import math\nfrom ctc_drafter.types import UserError",
        "target/__init__.py": "",
        "target/model.py": "import transformers\nfrom ctc_drafter import types",
        "drafters/__init__.py": "",
        "drafters/base.py": "from ctc_drafter.types import Candidates",
        "drafters/ctc.py": "from ctc_drafter.ctc import loss\nfrom .base import Drafter\nimport ctc_drafter.types",
        "drafters/baselines/__init__.py": "",
        "drafters/baselines/heads.py": "from ctc_drafter.drafters import base",
        "drafters/baselines/hydra.py": "from .heads import Heads\nfrom ctc_drafter.drafters.ctc import CTC",
        "drafters/baselines/eagle.py": "from . import heads",
        "decode/__init__.py": "",
        "decode/generate.py": "from ctc_drafter.drafters import base\nfrom ctc_drafter.target.model import Target",
        "integrations/__init__.py": "",
        "integrations/vllm.py": "import vllm.config",
        "cli.py": "def serve():\n    from ctc_drafter.integrations.vllm import register",
    }
    for path, source in (base | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source, encoding="utf-8")
    return root


def test_checker_accepts_a_good_package(tmp_path: Path) -> None:
    root = write_package(tmp_path, {})
    assert violations(root) == []
    assert cycle(root) is None


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("types.py", "from ctc_drafter.target.model import Target", "not in its row"),
        ("types.py", "import numpy as np", "pure"),
        ("ctc/loss.py", "from transformers import Cache", "pure"),
        ("ctc/loss.py", "from .. import target", "not in its row"),
        ("target/model.py", "from ctc_drafter import CTC", "not in its row"),
        ("decode/generate.py", "from ctc_drafter.drafters.ctc import CTC", "not in its row"),
        ("decode/generate.py", "from ctc_drafter.drafters import CTC", "not in its row"),
        ("decode/generate.py", "import ctc_drafter.drafters.ctc", "not in its row"),
        ("decode/generate.py", "def f():\n    from ctc_drafter.drafters import ctc", "not in its row"),
        ("decode/generate.py", "if TYPE_CHECKING:\n    from ctc_drafter.cli import main", "not in its row"),
        ("decode/generate.py", "importlib.import_module('ctc_drafter.drafters.ctc')", "not in its row"),
        ("drafters/baselines/eagle.py", "from .hydra import Hydra", "do not import each other"),
        ("drafters/baselines/heads.py", "def f():\n    from . import hydra", "do not import each other"),
        ("drafters/ctc.py", "from ctc_drafter.drafters.baselines.heads import Heads", "by its name alone"),
        ("drafters/base.py", "from ctc_drafter.drafters.ctc import CTC", "imports none of them"),
        ("drafters/ctc.py", "def f():\n    from ctc_drafter.decode.generate import generate", "not in its row"),
        ("decode/generate.py", "def f():\n    import vllm", "only integrations.vllm may"),
        ("integrations/vllm.py", "from sglang.srt import server", "only integrations.sglang may"),
        ("cli.py", "from ctc_drafter.integrations import vllm", "lazily"),
        ("extra/thing.py", "x = 1", "no row in the table"),
    ],
)
def test_checker_catches(tmp_path: Path, path: str, source: str, why: str) -> None:
    found = violations(write_package(tmp_path, {path: source}))
    assert found
    assert any(why in line for line in found)


def test_checker_catches_a_cycle(tmp_path: Path) -> None:
    root = write_package(tmp_path, {"ctc/search.py": "from .loss import x", "ctc/loss.py": "from .search import y"})
    assert set(cycle(root) or []) == {"ctc.loss", "ctc.search"}
