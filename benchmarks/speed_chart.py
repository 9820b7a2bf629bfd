"""Bar chart of the README: speedup over plain decoding, from results of eval.

python -m benchmarks.speed_chart docs/figures results/eval-smollm2-*.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from benchmarks.pages import TASK_NAMES, read_result, run_alone
from ctc_drafter.evaluate.figures import COLOURS, PLACES, panels, save
from ctc_drafter.evaluate.results import BUDGET, computed_in
from ctc_drafter.types import UserError

NAMES = {"ctc": "CTC drafter", "prompt_lookup": "prompt lookup"}


def speed_chart(results: Sequence[dict[str, Any]]) -> Figure:
    """A group of bars for each task and dtype, with plain decoding as the line at 1. Raises `UserError` for none.

    Trees chosen by step times, where they were measured, come before those of a fixed size.
    """
    groups: list[tuple[str, dict[str, float]]] = []
    for result in results:
        rows = [row for row in result["rows"] if row["method"] in NAMES]
        rows = sorted(rows, key=lambda row: row["nodes"] == BUDGET)  # the later of two counts
        for task in dict.fromkeys(row["task"] for row in rows):
            title = f"{TASK_NAMES.get(task, task)}\n{computed_in(result['meta'])}"
            groups.append((title, {row["method"]: row["gamma"] for row in rows if row["task"] == task}))
    if not groups:
        raise UserError("these results have no drafter; write them with ctc-drafter eval --json FILE")
    figure, (axis,) = panels(1, size=(1.6 * len(groups) + 1.0, 3.2))
    for turn, (method, name) in enumerate(NAMES.items()):
        known = [(place, found[method]) for place, (_, found) in enumerate(groups) if method in found]
        at = [place + (turn - 0.5) * 0.36 for place, _ in known]
        axis.bar(at, [value for _, value in known], width=0.34, color=COLOURS[PLACES[method]], label=name, zorder=2)
        for x, (_, value) in zip(at, known, strict=True):
            axis.annotate(f"{value:.2f}x", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axis.axhline(1.0, color="#777777", linewidth=1.0, zorder=3)
    axis.annotate(
        "plain\ndecoding", (len(groups) - 0.42, 1.0), (0, 3), textcoords="offset points", fontsize=7, color="#555555"
    )
    axis.set_xticks(range(len(groups)), [title for title, _ in groups])
    axis.set_xlim(-0.6, len(groups) + 0.15)
    axis.set_ylim(0, 1.25 * max(value for _, found in groups for value in found.values()))
    axis.set_ylabel("times as fast")
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    return figure


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the pictures.")],
    files: Annotated[list[Path], typer.Argument(help="Results files of eval.")],
) -> None:
    """Draws speed.svg and speed.png."""
    save(speed_chart([read_result(file) for file in sorted(files)]), folder, "speed")


if __name__ == "__main__":
    run_alone(main)
