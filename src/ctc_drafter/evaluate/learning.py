"""How a training went: loss and held-out β against its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctc_drafter.evaluate.plots import line, panels

LOSSES = {"eval_loss": "held out", "loss": "training"}  # the first is drawn on top
BETA = "eval_beta_"
MARKS = 12  # on a line


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
