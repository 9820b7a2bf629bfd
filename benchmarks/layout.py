"""docs/layout.md: every file of the package with the first line of its docstring.

`python -m benchmarks.layout docs/layout.md` writes the page; a test keeps it up to date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

from ctc_drafter.files import markdown_table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ctc_drafter"
# In reading order; what is not named here comes last.
FOLDERS = (
    *(".", "target", "ctc", "drafters", "drafters/baselines", "decode", "train", "evaluate", "serve"),
    *("integrations", "integrations/vllm", "quickstart", "cli"),
)
HEAD = """# Where things are

Written by `python -m benchmarks.layout docs/layout.md` from the first lines of the docstrings; a test keeps it up to
date. `CONTRIBUTING.md` has a line for each folder, `docs/design.md` explains the parts and why they are as they are.
"""


def first_line(file: Path) -> str:
    """The first sentence or line of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[\w)`])\. (?=[A-Z`])", paragraph, maxsplit=1)[0]
    return sentence.removesuffix(":").removesuffix(".")


def layout(package: Path = PACKAGE) -> str:
    """The page."""
    folders: dict[str, list[Path]] = {}
    for file in sorted(package.rglob("*.py")):
        if file.parent.name == "custom_generate":  # of a drafter that ships
            continue
        folders.setdefault(file.parent.relative_to(package).as_posix(), []).append(file)
    known = [name for name in FOLDERS if name in folders]
    parts = [HEAD]
    for name in [*known, *sorted(folders.keys() - set(known))]:
        rows = [(f"`{file.name}`", line) for file in folders[name] if (line := first_line(file))]
        if rows:
            title = "The package" if name == "." else f"{name}/"
            parts.append(f"## {title}\n\n{markdown_table(['file', 'what it has'], rows)}\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.layout", description="Writes docs/layout.md.")
    parser.add_argument("page", type=Path, help="file to write, docs/layout.md")
    parser.parse_args(arguments).page.write_text(layout(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
