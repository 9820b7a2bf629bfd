"""The README says what is there: its tree, and the figures of the results files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.layout import layout
from benchmarks.pages import insert_figures, markdown_figures
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from ctc_drafter.types import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def listed() -> set[str]:
    """Folders below src/ctc_drafter in the README's tree."""
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", README, re.DOTALL)
    assert block
    names = [line.split()[0] for line in block[1].splitlines()[1:]]
    return {name.rstrip("/") for name in names if name.endswith("/")}


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    names = {"TARGET": str(TARGET_DIR), "DRAFTER": str(DRAFTER_DIR)}
    for block in blocks:
        exec(re.sub(r"(max_new_tokens\W+)\d+", r"\g<1>8", block), names)
    assert names["output"].shape[0] == 2
    assert capsys.readouterr().out


def test_the_tree_is_the_tree():
    package = ROOT / "src" / "ctc_drafter"
    there = {path.parent.relative_to(package).as_posix() for path in package.rglob("*.py")} - {"."}
    assert {folder for folder in there if "vllm" not in folder} == listed()


def test_the_page_of_files_is_up_to_date():
    assert (ROOT / "docs" / "layout.md").read_text(encoding="utf-8") == layout()


def test_the_figures_are_those_of_the_results():
    files = sorted((ROOT / "results").glob("eval-*.json"))
    assert files, "make bench writes them"
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert insert_figures(README, markdown_figures(results)) == README
    exact = [row for result in results if result["meta"]["dtype"] == "float32" for row in result["rows"]]
    assert exact
    assert all(row["identical"] == row["compared"] > 0 for row in exact)


def test_a_page_without_markers_is_refused():
    with pytest.raises(UserError, match="figures"):
        insert_figures("# Nothing", "| a |")
