"""How every figure of the report looks: readable without colour, by markers, hatches and direct labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
