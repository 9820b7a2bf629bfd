"""The figures of the report. Each takes results and returns a matplotlib figure; None where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from ctc_drafter.evaluate.bootstrap import Bootstrap
from ctc_drafter.evaluate.plots import COLOURS, GREYS, HATCHES, MARKERS, label_ends, line, panels
from ctc_drafter.evaluate.records import Key
from ctc_drafter.evaluate.results import PLAIN_KEY, Results

STAGES = ("verify", "draft", "tree", "accept", "compact")
ENOUGH = 20  # nodes of a bin whose share is worth a point


def ordered(results: Results) -> list[str]:
    """Ours first, so that it looks the same everywhere."""
    return sorted(results.methods, key=lambda name: name != results.ours)


def by_size(results: Results, value: str, title: str) -> Figure | None:
    """`value` of the rows (beta, gamma) against tree size, a plot for each task."""
    if len(results.sizes) < 2:
        return None
    figure, axes = panels(len(results.tasks), size=(5.2, 4.0))
    places = range(len(results.sizes))
    for axis, task in zip(axes, results.tasks, strict=True):
        ends = []
        for style, method in enumerate(ordered(results)):
            rows = [results.row(task, (method, size)) for size in results.sizes]
            points = [(x, row[value]) for x, row in zip(places, rows, strict=True) if row and row[value] is not None]
            if points:
                line(axis, points, style, method)
                ends.append((points[-1][1], method, style))
        axis.set_xticks(list(places), [str(size) for size in results.sizes])
        axis.set_xlim(-0.2, len(results.sizes) - 1 + 1.5)
        axis.set_xlabel("nodes of the tree")
        axis.set_ylabel(title)
        axis.set_title(task)
        label_ends(axis, len(results.sizes) - 1, ends)
    return figure


def by_category(results: Results, task: str) -> Figure | None:
    """β of every method in every category of a task, at the usual size; bars are 95% intervals."""
    categories = list(dict.fromkeys(r["category"] for r in results.records if r["task"] == task))
    if len(categories) < 2:
        return None
    methods = ordered(results)
    figure, (axis,) = panels(1, size=(7.0, 0.75 + len(categories) * (0.35 + 0.12 * len(methods))))
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.grid(visible=False, axis="y")
    for place, category in enumerate(categories):
        drawn = Bootstrap(results, task, category)
        for style, method in enumerate(methods):
            found = drawn.beta((method, results.size))
            if found is None:
                continue
            y = place + (style - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 1)
            axis.plot([found.low, found.high], [y, y], color=COLOURS[style % len(COLOURS)], linewidth=1, zorder=2)
            axis.plot(
                found.value,
                y,
                MARKERS[style % len(MARKERS)],
                color=COLOURS[style % len(COLOURS)],
                label=method if place == 0 else None,
                markersize=6,
                zorder=3,
            )
        if place:
            axis.axhline(place - 0.5, color="#DDDDDD", linewidth=0.6)
    axis.set_yticks(range(len(categories)), categories)
    axis.set_ylim(len(categories) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"β, {name_of(results.size)}")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


def time_by_stage(results: Results) -> Figure | None:
    """Milliseconds of a step by stage, plain decoding's beside them, a plot for each task."""
    keys: list[Key] = [(method, results.size) for method in ordered(results)]
    keys = [*keys, PLAIN_KEY]
    figure, axes = panels(len(results.tasks), size=(5.6, 0.9 + 0.36 * len(keys)))
    drawn = False
    for axis, task in zip(axes, results.tasks, strict=True):
        axis.grid(visible=False, axis="y")
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        known = [(key, row) for key in keys if (row := results.row(task, key)) and row["stages_ms"]]
        starts = [0.0] * len(known)
        for style, stage in enumerate(STAGES):
            widths = [row["stages_ms"].get(stage, 0.0) for _, row in known]
            axis.barh(
                range(len(known)), widths, left=starts, label=stage, color=GREYS[style], hatch=HATCHES[style],
                edgecolor="black", linewidth=0.6, height=0.7,
            )  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
            drawn = drawn or any(widths)
        for y, total in enumerate(starts):
            axis.text(total, y, f" {total:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(known)), [method for (method, _), _ in known])
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel(f"ms a step, {name_of(results.size)}")
        axis.set_title(task)
    if not drawn:
        return None
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STAGES), frameon=False)
    return figure


def accepted(results: Results, task: str) -> Figure | None:
    """How many drafted tokens a verification accepted: a small plot for each method."""
    rows = [(method, results.row(task, (method, results.size))) for method in ordered(results)]
    known = [(method, row) for method, row in rows if row and row["steps"]]
    longest = max((len(row["accept_histogram"]) for _, row in known), default=0)

    def draw(axis: Any, row: dict[str, Any]) -> None:
        shares = [count / row["steps"] for count in row["accept_histogram"]]
        axis.bar(range(len(shares)), shares, color="#9A9A9A", edgecolor="black", linewidth=0.6)
        axis.set_xlim(-0.6, longest - 0.4)
        axis.set_xticks(range(0, longest, 1 if longest <= 9 else 2))

    return small_multiples(known, draw, "accepted tokens", "share of steps")


def calibration(results: Results, task: str) -> Figure | None:
    """What a node's probability promised against how often it was accepted: a small plot for each method."""
    rows = [(method, results.row(task, (method, results.sizes[-1]))) for method in ordered(results)]
    known = [(method, row) for method, row in rows if row and "calibration" in row]

    def draw(axis: Any, row: dict[str, Any]) -> None:
        sums = row["calibration"]
        bins = [
            bin_ for bin_ in zip(sums["nodes"], sums["predicted"], sums["accepted"], strict=True) if bin_[0] >= ENOUGH
        ]
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (4, 2)))
        points = [(predicted / nodes, hits / nodes) for nodes, predicted, hits in bins]
        if points:
            axis.plot(*zip(*points, strict=True), color="black", marker="o", markersize=4, linewidth=1.2)
        for limit, ticks in ((axis.set_xlim, axis.set_xticks), (axis.set_ylim, axis.set_yticks)):
            limit(0, 1)
            ticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])

    return small_multiples(known, draw, "probability promised", "share accepted")


def small_multiples(
    known: Sequence[tuple[str, dict[str, Any]]], draw: Callable[[Any, dict[str, Any]], None], across: str, up: str
) -> Figure | None:
    """A small plot for each method and its row, with the same axes."""
    if not known:
        return None
    wide = min(4, len(known))
    figure, axes = panels(len(known), across=wide, size=(2.3, 2.1))
    for place, (axis, (method, row)) in enumerate(zip(axes, known, strict=True)):
        draw(axis, row)
        axis.set_title(f"{method}, β {row['beta']:.2f}", fontsize=9)
        if place % wide == 0:
            axis.set_ylabel(up)
        if place + wide >= len(known):
            axis.set_xlabel(across)
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    return figure


def name_of(size: int | str) -> str:
    return "chains" if isinstance(size, str) else f"trees of {size} nodes"
