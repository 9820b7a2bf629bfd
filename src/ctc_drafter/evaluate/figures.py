"""Figures of reports and trainings, and 95% bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctc_drafter.evaluate.results import PLAIN_KEY, Key, Results

# The figures of the report. Each takes results and returns a matplotlib figure; None where nothing was measured.

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


# Style of all figures: readable without colour, by markers, hatches and direct labels.

# Okabe and Ito's palette, in an order whose greys differ; markers and dashes tell what colours cannot.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F", "#8B4513", "#4B0082")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "--")
GREYS = ("#303030", "#F2F2F2", "#9A9A9A", "#FFFFFF", "#C8C8C8", "#707070", "#E0E0E0", "#B0B0B0")
PANEL = (4.6, 3.6)  # inches


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


def line(axis: Axes, points: Sequence[tuple[float, float]], place: int, label: str) -> None:
    """A series in the style of its place among the methods; the first one is drawn thicker."""
    axis.plot(
        *zip(*points, strict=True),
        label=label,
        color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[place % len(MARKERS)],
        linestyle=DASHES[place % len(DASHES)],
        linewidth=2.2 if place == 0 else 1.3,
        markersize=6 if place == 0 else 5,
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
            color=COLOURS[place % len(COLOURS)],
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


# 95% intervals by bootstrap over prompts: all contenders are resampled together, so that ratios are paired.

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


class Bootstrap:
    """Bootstrap over the prompts of a task or category. The same seed gives the same intervals."""

    def __init__(self, results: Results, task: str, category: str | None = None, seed: int = 0):
        wanted = [
            record
            for record in results.records
            if record["task"] == task and not record["skipped"] and category in (None, record["category"])
        ]
        prompts = sorted({record["index"] for record in wanted})
        place = {index: i for i, index in enumerate(prompts)}
        self.sums: dict[Key, np.ndarray] = {}  # emitted by steps, steps, tokens, seconds of each prompt, [4, P]
        for record in wanted:
            key = (record["method"], record["nodes"])
            sums = self.sums.setdefault(key, np.zeros((4, len(prompts))))
            sums[:, place[record["index"]]] = numbers(record)
        rng = np.random.default_rng(seed)
        count = len(prompts)
        drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) if count else np.zeros((0, 0))
        self.weights = np.concatenate([np.ones((1, count)), drawn])  # the first is the sample itself

    def beta(self, key: Key) -> Estimate | None:
        return estimate(self._beta(key))

    def gamma(self, key: Key) -> Estimate | None:
        return estimate(ratio(self._speed(key), self._speed(PLAIN_KEY)))

    def beta_ratio(self, key: Key, other: Key) -> Estimate | None:
        return estimate(ratio(self._beta(key), self._beta(other)))

    def _beta(self, key: Key) -> np.ndarray | None:
        totals = self._totals(key)
        return None if totals is None else ratio(totals[0], totals[1])

    def _speed(self, key: Key) -> np.ndarray | None:
        totals = self._totals(key)
        return None if totals is None else ratio(totals[2], totals[3])

    def _totals(self, key: Key) -> np.ndarray | None:
        return self.sums[key] @ self.weights.T if key in self.sums else None


def numbers(record: dict[str, Any]) -> tuple[float, float, float, float]:
    return record["tokens"] - record["turns"], record["steps"], record["tokens"], record["seconds"]


def ratio(above: np.ndarray | None, below: np.ndarray | None) -> np.ndarray | None:
    """NaN where there is nothing below."""
    if above is None or below is None:
        return None
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def estimate(values: np.ndarray | None) -> Estimate | None:
    """The first value, and the middle 95% of the others."""
    if values is None or not len(values) or np.isnan(values[0]):
        return None
    low, high = np.nanpercentile(values[1:], [2.5, 97.5]) if len(values) > 1 else (values[0], values[0])
    return Estimate(float(values[0]), float(low), float(high))


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
        line(axis, points, place, name)
        axis.lines[-1].set_markevery(max(1, len(points) // MARKS))
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    axis.legend(frameon=False, fontsize=8, ncols=2)


def _label(size: str) -> str:
    return f"{size} nodes" if size.isdecimal() else size
