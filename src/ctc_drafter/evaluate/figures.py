"""Figures of reports and trainings: one style for each method, and what is drawn of a results file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctc_drafter.evaluate.intervals import Bootstrap
from ctc_drafter.evaluate.results import PLAIN_KEY, Key, Results, title_of

# The figures of the report. Each takes results and returns a matplotlib figure; None where nothing was measured.

STAGES = ("verify", "draft", "tree", "accept", "compact")
ENOUGH = 20  # nodes of a bin whose share is worth a point


def ordered(results: Results) -> list[str]:
    """Ours first, so that it looks the same everywhere."""
    return sorted(results.methods, key=lambda name: name != results.ours)


def by_size(results: Results, value: str, title: str, even: float | None = None) -> Figure | None:
    """`value` of the rows (beta, gamma) against tree size, a plot for each task. even: plain decoding's, as a line."""
    if len(results.sizes) < 2:
        return None
    figure, axes = panels(len(results.tasks), size=(5.2, 4.0))
    places, styles = range(len(results.sizes)), styles_of(results)
    for axis, task in zip(axes, results.tasks, strict=True):
        ends = []
        if even is not None:
            axis.axhline(even, color="#777777", linewidth=1.0, zorder=1)
            axis.annotate(
                "plain decoding", (-0.15, even), (0, 2), textcoords="offset points", fontsize=7, color="#777777"
            )
        for method in ordered(results):
            rows = [results.row(task, (method, size)) for size in results.sizes]
            points = [(x, row[value]) for x, row in zip(places, rows, strict=True) if row and row[value] is not None]
            if points:
                line(axis, points, styles[method], title_of(method), thick=method == results.ours)
                ends.append((points[-1][1], title_of(method), styles[method]))
        axis.set_xticks(list(places), [str(size) for size in results.sizes])
        axis.set_xlim(-0.2, len(results.sizes) - 1 + 1.5)
        axis.set_xlabel("nodes of the tree")
        axis.set_ylabel(title)
        axis.set_title(task)
        label_ends(axis, len(results.sizes) - 1, ends)
    return figure


def by_category(results: Results, task: str) -> Figure | None:
    """Tokens per step of every method in every category of a task, at the usual size; bars are 95% intervals."""
    categories = list(dict.fromkeys(r["category"] for r in results.records if r["task"] == task))
    if len(categories) < 2:
        return None
    methods, styles = ordered(results), styles_of(results)
    figure, (axis,) = panels(1, size=(7.0, 0.75 + len(categories) * (0.35 + 0.12 * len(methods))))
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.grid(visible=False, axis="y")
    for place, category in enumerate(categories):
        drawn = Bootstrap(results, task, category)
        for turn, method in enumerate(methods):
            found, style = drawn.beta((method, results.size)), styles[method]
            if found is None:
                continue
            y = place + (turn - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 1)
            if found.interval is not None:
                axis.plot(found.interval, [y, y], color=COLOURS[style], linewidth=1, zorder=2)
            axis.plot(
                found.value,
                y,
                MARKERS[style],
                color=COLOURS[style],
                label=title_of(method) if place == 0 else None,
                markersize=6,
                zorder=3,
            )
        if place:
            axis.axhline(place - 0.5, color="#DDDDDD", linewidth=0.6)
    axis.set_yticks(range(len(categories)), categories)
    axis.set_ylim(len(categories) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"tokens per step (β), {name_of(results.size)}")
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
        axis.set_yticks(range(len(known)), [title_of(method) for (method, _), _ in known])
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
        axis.set_title(f"{title_of(method)}, β {row['beta']:.2f}", fontsize=9)
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


# Style of all figures: readable without colour, by markers, hatches and direct labels.

# Okabe and Ito's palette, in an order whose greys differ; markers and dashes tell what colours cannot.
COLOURS = (
    *("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F", "#8B4513", "#4B0082"),
    *("#B22222", "#556B2F", "#008B8B", "#C71585", "#BDB76B"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h", "d", "H", "8")
# The place of a method in both, the same in every figure of every file; the places after them are for other names.
PLACES = {
    method: place
    for place, method in enumerate(
        (
            "ctc",
            "medusa",
            "hydra",
            "eagle",
            "dspark",
            "ctc-paper",
            "dflash",
            "prompt_lookup",
            "hydra++",
            "ctc-linear",
            "eagle3",
        )
    )
}
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "--")
GREYS = ("#303030", "#F2F2F2", "#9A9A9A", "#FFFFFF", "#C8C8C8", "#707070", "#E0E0E0", "#B0B0B0")
PANEL = (4.6, 3.6)  # inches


def styles_of(results: Results) -> dict[str, int]:
    """Name of each method in a file -> its place in `COLOURS` and `MARKERS`.

    A method has its own everywhere; so has the first drafter of a method under another name, and further ones have the
    places that are left, in the order of their names.
    """
    found = {name: PLACES[name] for name in results.methods if name in PLACES}
    known = results.meta.get("drafters", {})
    for name in sorted(set(results.methods) - found.keys()):
        own = PLACES.get(known.get(name, {}).get("method", ""))
        left = [*range(len(PLACES), len(COLOURS)), *range(len(PLACES))]
        free = [place for place in left if place not in found.values()] or left
        found[name] = own if own is not None and own not in found.values() else free[0]
    return found


def panels(count: int, *, across: int | None = None, size: tuple[float, float] = PANEL) -> tuple[Figure, list[Axes]]:
    """A figure with so many plots in rows of `across`; what is left over stays empty."""
    wide = across or count
    high = -(-count // wide)
    figure = Figure(figsize=(size[0] * wide, size[1] * high), layout="constrained")
    axes = [figure.add_subplot(high, wide, place + 1) for place in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def line(axis: Axes, points: Sequence[tuple[float, float]], place: int, label: str, thick: bool = False) -> None:
    """A series in the style of a place."""
    axis.plot(
        *zip(*points, strict=True),
        label=label,
        color=COLOURS[place],
        marker=MARKERS[place],
        linestyle=DASHES[place % len(DASHES)],
        linewidth=2.2 if thick else 1.3,
        markersize=6 if thick else 5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        zorder=10 - place / 10,
    )


def label_ends(axis: Axes, x: float, ends: Sequence[tuple[float, str, int]]) -> None:
    """Names lines at their right end (y, label, place), pushed apart where they would overlap."""
    low, high = axis.get_ylim()
    heights = spread([y for y, _, _ in sorted(ends)], (high - low) * 0.055, high)
    for (y, label, place), height in zip(sorted(ends), heights, strict=True):
        axis.annotate(
            label,
            (x, y),
            xytext=(x + 0.18, height),
            fontsize=8,
            va="center",
            color=COLOURS[place],
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Sorted heights moved as little as need be to lie `gap` apart and, the highest, not above `top`."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    for place in range(len(found) - 1, -1, -1):
        ceiling = found[place + 1] - gap if place + 1 < len(found) else top
        found[place] = min(found[place], ceiling)
    return found


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes NAME.svg and NAME.png; the same figure gives the same bytes. Returns the SVG's name."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "ctc-drafter"}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
    return f"{name}.svg"


# Learning curves: loss and held-out β by step.

LOSSES = {"eval_loss": "held out", "loss": "training"}  # the first is drawn on top
BETA = "eval_beta_"
MARKS = 12  # on a line


def save_learning_curves(history: Sequence[Mapping[str, float]], folder: Path) -> str | None:
    """Writes `training.svg` and `training.png` of a trainer's log; returns the PNG's name, None without entries."""
    figure = learning_curves(history)
    if figure is None:
        return None
    save(figure, folder, "training")
    return "training.png"


def learning_curves(history: Sequence[Mapping[str, float]]) -> Figure | None:
    """A plot of the losses, and one of β by nodes of the tree where it was measured; None without entries.

    history: the trainer's log, entries with `step` and `loss`, `eval_loss`, `eval_beta_chain`, `eval_beta_8` and so on.
    """
    beta = dict.fromkeys(key for entry in history for key in entry if key.startswith(BETA))
    names = {key: _label(key.removeprefix(BETA)) for key in beta}
    plots = [(LOSSES, "loss, nats an anchor"), (names, "β on held-out text")]
    drawn = [(_series(history, keys), title) for keys, title in plots]
    drawn = [(series, title) for series, title in drawn if series]
    if not drawn:
        return None
    figure, axes = panels(len(drawn), size=(5.2, 3.6))
    for axis, (series, title) in zip(axes, drawn, strict=True):
        _draw(axis, series, title)
    if drawn[0][1] == plots[0][1]:
        axes[0].set_yscale("log")  # the first steps' is tens of times the last ones'
    return figure


def _series(history: Sequence[Mapping[str, float]], keys: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value), of those that have any."""
    found = {name: [(entry["step"], entry[key]) for entry in history if key in entry] for key, name in keys.items()}
    return {name: points for name, points in found.items() if points}


def _draw(axis: Axes, series: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    for place, (name, points) in enumerate(series.items()):
        line(axis, points, place, name, thick=place == 0)
        axis.lines[-1].set_markevery(max(1, len(points) // MARKS))
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    axis.legend(frameon=False, fontsize=8, ncols=2)


def _label(size: str) -> str:
    return f"{size} nodes" if size.isdecimal() else size
