"""The README says what is there: its tree, and the figures of the results files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.layout import layout
from benchmarks.pages import insert_figures, markdown_figures, markdown_summary
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from ctc_drafter.types import UserError

ROOT = Path(__file__).parents[1]
README, PYTHON, CONTRIBUTING, PERFORMANCE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/python.md", "CONTRIBUTING.md", "docs/performance.md")
)


def listed() -> set[str]:
    """Folders below src/ctc_drafter in CONTRIBUTING's tree."""
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert block
    names = [line.split()[0] for line in block[1].splitlines()[1:]]
    return {name.rstrip("/") for name in names if name.endswith("/")}


def run_examples(page: str) -> tuple[int, dict[str, Any]]:
    """Runs the Python blocks of a page, on the tiny pair; returns how many there are, and their names."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"TARGET": str(TARGET_DIR), "DRAFTER": str(DRAFTER_DIR)}
    for block in blocks:
        block = block.replace('"Qwen/Qwen3-8B"', "TARGET").replace(', device_map="auto"', "")
        exec(re.sub(r"(max_new_tokens\W+)\d+", r"\g<1>8", block), names)
    return len(blocks), names


def test_the_first_example_runs(capsys):
    count, names = run_examples(README)
    assert count == 1
    assert names["output"].shape[0] == 1
    assert "tokens per step" in capsys.readouterr().out


@pytest.mark.slow
def test_the_examples_run(capsys):
    count, names = run_examples(PYTHON)
    assert count >= 5
    assert names["output"].shape[0] == 2
    assert capsys.readouterr().out


def test_the_tree_is_the_tree():
    package = ROOT / "src" / "ctc_drafter"
    there = {path.parent.relative_to(package).as_posix() for path in package.rglob("*.py")} - {"."}
    there = {folder for folder in there if not folder.endswith("/custom_generate")}  # of drafters that ship
    assert {folder for folder in there if "vllm" not in folder} == listed()


def test_the_page_of_files_is_up_to_date():
    assert (ROOT / "docs" / "layout.md").read_text(encoding="utf-8") == layout()


def test_the_figures_are_those_of_the_results():
    files = sorted((ROOT / "results").glob("eval-*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert insert_figures(PERFORMANCE, markdown_figures(results), "eval") == PERFORMANCE
    real = [result for result in results if result["meta"]["target"] == "smollm2"]
    assert insert_figures(README, markdown_summary(real), "summary") == README
    exact = [
        row
        for result in results
        if result["meta"]["dtype"] == "float32"
        for row in result["rows"]
        if row["method"] not in result["meta"].get("peers", ())  # other engines have weights and rounding of their own
    ]
    assert exact
    assert all(row["identical"] == row["compared"] > 0 for row in exact)


def test_a_page_without_markers_is_refused():
    with pytest.raises(UserError, match="figures"):
        insert_figures("# Nothing", "| a |")
