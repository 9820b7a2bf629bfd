"""The chart of the README: a bar for each drafter, and plain decoding as a line at 1."""

import pytest

from benchmarks.speed_chart import speed_chart
from ctc_drafter.types import UserError


def result(dtype: str, budget: float | None = None, **gammas: float):
    """budget: speedup of trees chosen by step times, where they were measured."""
    rows = [{"task": "mt_bench", "method": name, "nodes": 16, "gamma": value} for name, value in gammas.items()]
    if budget is not None:
        rows.insert(0, {"task": "mt_bench", "method": "ctc", "nodes": "budget", "gamma": budget})
    return {"meta": {"dtype": dtype}, "rows": rows}


def test_bars_and_the_line_at_1():
    """Trees chosen by step times are drawn in place of those of a fixed size."""
    figure = speed_chart([result("float32", plain=1.0, ctc=1.5, prompt_lookup=1.25), result("bfloat16", 0.9, ctc=0.8)])
    (axis,) = figure.axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axis.containers}
    assert heights == {"CTC drafter": [1.5, 0.9], "prompt lookup": [1.25]}
    assert [list(line.get_ydata()) for line in axis.get_lines()] == [[1.0, 1.0]]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["MT-bench\nfloat32", "MT-bench\nbfloat16"]
    assert {"1.50x", "1.25x", "0.90x", "plain\ndecoding"} <= {text.get_text() for text in axis.texts}
    assert axis.get_ylim()[0] == 0.0


def test_results_without_drafters_are_refused():
    with pytest.raises(UserError, match="no drafter"):
        speed_chart([result("float32", plain=1.0) | {"rows": []}])
