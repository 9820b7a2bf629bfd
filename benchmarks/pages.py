"""Inserts tables of results files into Markdown pages; shared command-line helpers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ctc_drafter.cli import bad_input
from ctc_drafter.evaluate.hf_generate import HF, HF_LOOKUP
from ctc_drafter.evaluate.results import BUDGET, computed_in, engines_of
from ctc_drafter.files import markdown_table, number, read_json
from ctc_drafter.load import keep_quiet
from ctc_drafter.types import UserError

# Results as Markdown tables.

TASK_NAMES = {"mt_bench": "MT-bench", "gsm8k": "GSM8K"}
TARGETS = {"shipped": "tiny"}  # as results of earlier versions call it


def markdown_figures(results: Sequence[dict[str, Any]]) -> str:
    """The rows of several results as one Markdown table, and where they were measured."""
    head = ["target", "task", "dtype", "threads", "batch", "method", "tokens/s", "speedup", "tokens/step", "identical"]
    rows = []
    for result in results:
        meta = result["meta"]
        for row in result["rows"]:
            method = row["method"] + (", budget" if row["nodes"] == BUDGET else "")
            peers = meta.get("peers", {})
            as_it_is = row["method"] in (HF, HF_LOOKUP, *peers)  # not compiled
            kind = peers.get(row["method"], {}).get("weights", meta["dtype"]) if as_it_is else computed_in(meta)
            cells = [
                TARGETS.get(meta["target"], meta["target"]),
                row["task"],
                kind,
                str(meta["threads"]),
                str(meta["batch_size"]),
                method,
            ]
            cells += [number(row["tokens_per_s"], 0), number(row["gamma"], 2), number(row["beta"], 2)]
            rows.append([*cells, f"{row['identical']} of {row['compared']}"])
    engines = sorted({line for result in results for line in engines_of(result["meta"])})
    return "\n".join([markdown_table(head, rows), "", *measured_on(results), *engines])


def markdown_summary(results: Sequence[dict[str, Any]]) -> str:
    """A line for each task and dtype: plain decoding beside what drafts by default, and prompt lookup's speedup.

    Where trees were chosen by step times, as `generate` and `serve` do it, the line is theirs.
    """
    head = [
        "task",
        "dtype",
        "plain tokens/s",
        "CTC tokens/s",
        "speedup",
        "tokens per step",
        "identical",
        "prompt lookup",
    ]
    lines = []
    if not results:
        return "Not measured yet."
    for result in results:
        rows = {(row["task"], row["method"], row["nodes"]): row for row in result["rows"]}
        ours_by_task = {key[0]: key for key in rows if key[1] == "ctc"}
        ours_by_task |= {key[0]: key for key in rows if key[1:] == ("ctc", BUDGET)}
        for task, _, nodes in ours_by_task.values():
            ours, plain = rows[task, "ctc", nodes], next(r for key, r in rows.items() if key[:2] == (task, "plain"))
            copied = next((row for key, row in rows.items() if key[:2] == (task, "prompt_lookup")), None)
            cells = [TASK_NAMES.get(task, task), computed_in(result["meta"]), number(plain["tokens_per_s"], 1)]
            cells += [number(ours["tokens_per_s"], 1), f"**{number(ours['gamma'], 2)}x**", number(ours["beta"], 2)]
            cells += [f"{ours['identical']} of {ours['compared']}"]
            lines.append([*cells, "" if copied is None else f"{number(copied['gamma'], 2)}x"])
    return "\n".join([markdown_table(head, lines), "", *measured_on(results)])


def measured_on(results: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences: hardware, versions and limits of the results; where they differ, of which dtypes."""
    places: dict[str, list[str]] = {}
    for result in results:
        meta = result["meta"]
        place = (
            f"{meta['hardware']['gpu'] or meta['hardware']['cpu']}, torch {meta['versions']['torch']}, "
            f"transformers {meta['versions']['transformers']}, {trees_of(result)}, "
            f"at most {meta['max_new_tokens']} new tokens"
            f"{'' if meta['complete'] else ', unfinished run'}"
        )
        places.setdefault(place, []).append(computed_in(meta))
    lines = []
    for place, dtypes in sorted(places.items()):
        of = f" ({'; '.join(dict.fromkeys(dtypes))})" if len(places) > 1 else ""
        lines.append(f"Measured on{of}: {place}.")
    return lines


def trees_of(result: dict[str, Any]) -> str:
    """The sizes of a result's trees: fixed, and by step times where there are such rows."""
    nodes, floor = result["meta"]["nodes"], result["meta"]["floor"]
    fixed = f"trees of {nodes} nodes of probability {floor:g} and more"
    by_times = any(row["nodes"] == BUDGET for row in result["rows"])
    return f"{fixed}, or of up to {nodes} by step times (budget)" if by_times else fixed


def main(
    page: Annotated[Path, typer.Argument(help="Markdown page with the markers.")],
    files: Annotated[list[Path], typer.Argument(help="Results files of eval.")],
) -> None:
    """Writes the figures of results files into a page: a summary into README.md, all rows into another."""
    if page.name == "README.md":
        write_figures(page, files, markdown_summary, "summary")
    else:
        write_figures(page, files, markdown_figures, "eval")


# Shared command-line helpers (`python -m benchmarks.NAME`).

END = "<!-- end of figures -->"


def write_figures(
    page: Path, files: Iterable[Path], markdown: Callable[[list[dict[str, Any]]], str], name: str = "results"
) -> None:
    """Writes what `markdown` makes of results files into a page, between the markers of that name.

    Raises `UserError` for files that cannot be read, and for a page without the markers.
    """
    results = [read_result(file) for file in sorted(files)]
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {page}: {error.strerror}; give the page that has the markers") from error
    page.write_text(insert_figures(text, markdown(results), name), encoding="utf-8")


def insert_figures(page: str, figures: str, name: str = "results") -> str:
    """`page` with the part between the two markers of that name replaced. Raises `UserError` when they are missing."""
    marker = f"<!-- figures: {name} -->"
    before, start, rest = page.partition(marker)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"the page has no {marker} and {END} to put figures between")
    return f"{before}{start}\n{figures}\n{end}{after}"


def read_result(file: Path) -> dict[str, Any]:
    """A results file. Raises `UserError` when it is none."""
    found = read_json(file)
    if not isinstance(found, dict) or "meta" not in found:
        raise UserError(f"{file} is no results file: it does not say how it was measured")
    return found


def run(app: Callable[[], None]) -> None:
    """The application of a module, for `python -m`. Bad input and a missing extra end it with one line."""
    try:
        app()
    except Exception as error:
        message = bad_input(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run_alone(work: Callable[..., None]) -> None:
    """As `run`, for a module with one command."""
    keep_quiet()
    run(lambda: typer.run(work))


if __name__ == "__main__":
    run_alone(main)
