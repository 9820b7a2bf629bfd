"""The page of results: intervals against known answers, figures that can be read, a page that is up to date."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench_results import made_up
from ctc_drafter.cli import main
from ctc_drafter.evaluate.figures import COLOURS, MARKERS, by_category, by_size, spread, styles_of
from ctc_drafter.evaluate.intervals import Bootstrap
from ctc_drafter.evaluate.methods import Calibration
from ctc_drafter.evaluate.report_page import draw, page
from ctc_drafter.evaluate.results import Results, read_results
from ctc_drafter.types import UserError

ROOT = Path(__file__).parents[2]
METHODS = {"medusa": 2.5, "ctc": 3.4, "prompt_lookup": 1.6}


def results(**options) -> Results:
    made = made_up(**{"methods": METHODS, "prompts": 12, **options})
    return Results("bench-x", made["meta"], made["rows"], made["records"])


@pytest.fixture(scope="module")
def some() -> Results:
    return results()


def test_prompts_are_counted_by_category():
    def record(task, category, method="plain", skipped=False):
        return {"task": task, "category": category, "method": method, "skipped": skipped}

    rows = [{"task": "a"}, {"task": "b"}]
    records = [record("a", "x"), record("a", "y"), record("a", "x"), record("a", "x", skipped=True)]
    records += [record("a", "x", "ctc"), record("b", "b")]
    assert Results("name", {}, rows, records).prompts == "a 3 (x 2, y 1); b 1"


def test_estimates_are_the_rows_figures(some: Results) -> None:
    boot = Bootstrap(some, "mt_bench")
    for row in (row for row in some.rows if row["task"] == "mt_bench"):
        key = (row["method"], row["nodes"])
        beta, gamma = boot.beta(key), boot.gamma(key)
        assert beta
        assert gamma
        assert (beta.value, gamma.value) == pytest.approx((row["beta"], row["gamma"]))
        assert beta.interval
        assert beta.interval[0] <= beta.value <= beta.interval[1]
    assert boot.beta(("nobody", 8)) is None


def test_intervals_cover_as_often_as_they_say() -> None:
    """200 samples of 40 prompts whose true β is known: about 95% of the intervals hold it."""
    rng = np.random.default_rng(1)
    steps, hits = 10, 0
    for _ in range(200):
        betas = rng.normal(3.0, 0.5, 40)
        records = [
            {"task": "t", "index": i, "category": "c", "method": "m", "nodes": 8, "skipped": False, "turns": 1}
            | {"tokens": beta * steps + 1, "steps": steps, "seconds": 1.0}
            for i, beta in enumerate(betas)
        ]
        found = Bootstrap(Results("x", {}, [], records), "t").beta(("m", 8))
        assert found
        assert found.interval
        hits += found.interval[0] <= 3.0 <= found.interval[1]
    assert 178 <= hits <= 199


def test_ratios_are_paired() -> None:
    """Prompts differ much, methods by a constant factor: the ratio is certain, though each β is not."""
    records = [
        {"task": "t", "index": i, "category": "c", "method": method, "nodes": 8, "skipped": False, "turns": 0}
        | {"tokens": tokens, "steps": tokens / beta, "seconds": 1.0}
        for i, tokens in enumerate((10, 50, 200, 400, 1000, 30, 70, 300))
        for method, beta in (("a", 1.0 + i), ("b", 1.5 * (1.0 + i)))
    ]
    boot = Bootstrap(Results("x", {}, [], records), "t")
    ratio, beta = boot.beta_ratio(("b", 8), ("a", 8)), boot.beta(("a", 8))
    assert ratio
    assert beta
    assert ratio.interval
    assert beta.interval
    assert (ratio.value, *ratio.interval) == pytest.approx((1.5, 1.5, 1.5))
    assert beta.interval[1] - beta.interval[0] > 0.5


@pytest.mark.parametrize(("prompts", "shown"), [(7, False), (8, True)])
def test_fewer_than_8_prompts_have_no_interval(prompts: int, shown: bool) -> None:
    few = results(prompts=prompts)
    beta = Bootstrap(few, "gsm8k").beta(("medusa", 16))
    assert beta
    assert (beta.interval is not None) == shown
    assert ("(" in str(beta)) == shown
    assert any("–" in line for line in page([few]).splitlines() if line.startswith("| medusa")) == shown
    assert by_category(few, "gsm8k") is None, "one category alone"
    figure = by_category(results(prompts=prompts * 5), "mt_bench")  # five categories
    assert figure
    bars = [line for line in figure.axes[0].get_lines() if line.get_linewidth() == 1.0 and len(line.get_xdata()) == 2]
    assert len(bars) == (5 * len(METHODS) if shown else 0)


def test_the_page_says_what_was_measured(some: Results) -> None:
    text = page([some])
    medusa, ours = (some.row("gsm8k", (name, 16)) for name in ("medusa", "ctc"))
    assert medusa
    assert ours
    (line,) = [line for line in text.splitlines() if line.startswith("| medusa |") and "of 12 | " in line][:1]
    assert f" {medusa['beta']:.2f} (" in line
    ratios = next(line for line in text.split("gsm8k: ctc over")[1].splitlines() if line.startswith("| medusa"))
    assert f"| {ours['beta'] / medusa['beta']:.2f} (" in ratios
    assert "commit 012345678" in text
    assert "not measured here" in text
    assert "2.78 / 3.56" in text
    assert "1,234,567" in text


def test_calibration_errors_stand_below_their_figure(some: Results) -> None:
    """8 nodes of probability .5, of which 3 were accepted, and 2 of .1, none of which was: (|4 - 3| + .2) / 10."""
    rows = json.loads(json.dumps(some.rows))
    (row,) = [row for row in rows if (row["task"], row["method"], row["nodes"]) == ("gsm8k", "ctc", some.sizes[-1])]
    row["calibration"] = asdict(Calibration(*([two, *[0.0] * 9, eight] for two, eight in ((2, 8), (0.2, 4), (0, 3)))))
    text = page([replace(some, rows=rows)]).split("### Are the probabilities right?")[1]
    (line,) = [line for line in text.splitlines() if line.startswith("| ctc |") and "0.120" in line]
    assert line.count(" - ") + line.count("0.") == len(some.tasks) * len(some.sizes)


@pytest.mark.slow
def test_every_figure_is_drawn_named_and_captioned(some: Results, tmp_path: Path) -> None:
    names = draw([some], tmp_path)
    text = page([some])
    assert len(names) >= 7
    for name in names:
        assert f"](figures/{name})\n\n*" in text
        assert (tmp_path / name).read_text().startswith("<?xml")
        assert (tmp_path / name.replace(".svg", ".png")).read_bytes().startswith(b"\x89PNG")
    assert text.count("](figures/") == len(names)


def named(results: Results, *names: str, **methods: str) -> dict[str, int]:
    facts = {"drafters": {name: {"method": method} for name, method in methods.items()}}
    rows = [{"method": name, "nodes": 8} for name in (*names, *methods)]
    return styles_of(Results("x", facts, rows, []))


def test_a_method_has_one_colour_and_marker_everywhere(some: Results) -> None:
    """Whatever else a file has, and in whatever order."""
    everywhere = styles_of(
        results(methods={"prompt_lookup": 1.6, "eagle": 3.0, "hydra": 3.0, "ctc": 3.4, "medusa": 2.5})
    )
    assert {name: everywhere[name] for name in METHODS} == styles_of(some)
    assert everywhere["ctc"] == 0
    assert len(set(everywhere.values())) == 5
    many = named(some, *METHODS, **{f"own{i}": "medusa" for i in range(len(COLOURS) - len(METHODS))})
    assert sorted(many.values()) == list(range(len(COLOURS)))
    assert named(some, mine="medusa") == {"mine": everywhere["medusa"]}
    assert named(some, "medusa", mine="medusa")["mine"] not in everywhere.values()
    named(some, *map(str, range(40)))  # more than there are: some are alike
    assert len(COLOURS) == len(MARKERS) == len(set(COLOURS)) == len(set(MARKERS))
    figure = by_size(some, "beta", "β")
    assert figure
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert drawn == {name: COLOURS[place] for name, place in styles_of(some).items()}


def test_speedups_have_a_line_at_1(some: Results) -> None:
    figure = by_size(some, "gamma", "γ", even=1.0)
    assert figure
    for axis in figure.axes:
        assert [list(line.get_ydata()) for line in axis.get_lines()].count([1.0, 1.0]) == 1
        assert "plain decoding" in {text.get_text() for text in axis.texts}
        low, high = axis.get_ylim()
        assert low < 1.0 < high


def test_runs_without_timing_say_so_and_show_no_speedup(some: Results, tmp_path: Path) -> None:
    """Of another target than the tiny one, which the page names."""
    meta = {**some.meta, "tokens_only": True, "target": "someone/model"}
    counted = replace(some, meta=meta)
    text = page([counted])
    assert "Target: someone/model. Prompts:" in text
    assert "counted along plain decoding's answers" in text
    assert "gamma-by-size" not in text
    draw([counted], tmp_path)
    assert not list(tmp_path.rglob("*gamma-by-size*"))
    assert "gamma-by-size" in page([some])


def test_our_own_eagle_is_not_called_eagle() -> None:
    made = results(methods={"ctc": 3.4, "eagle": 3.0})
    text = page([made])
    assert "| eagle |" not in text.replace("| EAGLE-style | eagle |", "")  # its method in the table of costs
    assert text.count("| EAGLE-style |") > 4
    figure = by_size(made, "beta", "β")
    assert figure
    assert {text.get_text() for text in figure.axes[0].texts} == {"ctc", "EAGLE-style"}


def test_lines_are_told_apart_without_colour(some: Results) -> None:
    figure = by_size(some, "beta", "β")
    assert figure
    for axis in figure.axes:
        lines = axis.get_lines()
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines) == 3
        assert {text.get_text() for text in axis.texts} == METHODS.keys()


def test_labels_do_not_overlap() -> None:
    found = spread([1.0, 1.01, 1.02, 3.0, 3.0], 0.2, 3.1)
    assert all(b - a >= 0.2 - 1e-9 for a, b in pairwise(found))
    assert found[-1] <= 3.1


def test_one_size_one_method_one_task(tmp_path: Path) -> None:
    few = results(methods={"medusa": 2.5}, sizes=("chain",))
    assert "By tree size" not in page([few])
    assert "chains" in page([few])


@pytest.mark.slow
def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made, out = made_up(6, methods={"ctc": 3.0}, sizes=("chain", 8)), tmp_path / "docs" / "results.md"
    (tmp_path / "bench-a.json").write_text(json.dumps(made))
    (tmp_path / "eval.json").write_text(json.dumps({"meta": {}, "rows": []}))
    files = [str(tmp_path / name) for name in ("bench-a.json", "eval.json")]
    assert main(["report", *files, "--out", str(out)]) == 0
    assert out.read_text() == page(read_results([tmp_path / "bench-a.json"]))
    assert main(["report", files[1], "--out", str(out)]) == 2
    assert "none of these files is a bench's" in capfd.readouterr().err


def test_places_where_no_page_can_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(made_up(6, methods={"ctc": 3.0}, sizes=("chain", 8))))
    for place, message in (("bench.json/a/b.md", "cannot make the folder"), (".", "give a file in a folder")):
        assert main(["report", str(tmp_path / "bench.json"), "--out", str(tmp_path / place)]) == 2
        assert message in " ".join(capfd.readouterr().err.split())


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name, part in (("a.json", "is not JSON"), ("none.json", "cannot read")):
        with pytest.raises(UserError, match=part):
            read_results([tmp_path / name])


@pytest.mark.slow  # it draws every figure of every results file
def test_the_page_is_up_to_date() -> None:
    files, written = sorted((ROOT / "results").glob("bench-*.json")), ROOT / "docs" / "results.md"
    if not files:
        assert not written.exists(), "docs/results.md has no results file"
        pytest.skip("no results yet")
    assert written.read_text(encoding="utf-8") == page(read_results(files)), "run ctc-drafter report results/*.json"
