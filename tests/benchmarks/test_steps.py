"""The step benchmarks: small ones end to end, what they count, and the page."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import steps
from benchmarks.pages import insert_figures
from benchmarks.step_tables import markdown_steps, shares
from benchmarks.steps import SHAPES, Cell, named_shape, step_bytes
from ctc_drafter.decode.profile import median_of
from ctc_drafter.types import UserError
from helpers import tiny_target

ROOT = Path(__file__).parents[2]


def parameters(name):
    """Of a Llama, counted by hand."""
    s = SHAPES[name]
    per_layer = 2 * s.hidden**2 + 2 * s.hidden * s.hidden // s.heads * s.kv_heads + 3 * s.hidden * s.inner
    return (1 if s.tied else 2) * s.vocab * s.hidden + s.layers * per_layer


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-60m", 0.06), ("llama-300m", 0.3), ("llama-1b", 1.0), ("vicuna-7b", 6.7), ("vicuna-13b", 13.0)],
)
def test_shapes_are_as_large_as_they_say(name, billions):
    assert parameters(name) / 1e9 == pytest.approx(billions, rel=0.15)


def test_bytes_of_a_plain_step():
    target = tiny_target()
    model, config = target.model, target.config
    every = sum(p.numel() for p in model.parameters())
    embedding = 97 * 64
    cached = 2 * 3 * config.num_key_value_heads * config.head_dim
    assert step_bytes(target, 2, 10) == 4 * (every - embedding + 2 * 64 + 2 * 10 * cached)
    tied = tiny_target(tie_word_embeddings=True)
    assert step_bytes(tied, 1, 0) == 4 * sum(p.numel() for p in tied.model.parameters())


def test_medians():
    taken = [{"whole": w, "draft": w / 2, "tree": 0, "verify": 1, "accept": 0, "compact": 0} for w in (9.0, 1.0, 3.0)]
    found = median_of(taken)
    assert (found.ms, found.rounds, found.stages["draft"]) == (3.0, (9.0, 1.0, 3.0), 1.5)


def test_shares_add_up():
    step = {"ms": 10.0, "stages_ms": {"verify": 6.0, "draft": 2.0, "tree": 0.5, "accept": 0.5}}
    assert shares(step) == pytest.approx([0.6, 0.2, 0.05, 0.15])


def test_suites_share_models_between_neighbours():
    for make in steps.SUITES.values():
        cells = make(("tiny", "llama-60m"), "float32", 512)
        keys = [(cell.model, cell.vocab) for cell in cells]
        assert len(dict.fromkeys(keys)) == 1 + sum(a != b for a, b in pairwise(keys))
        assert len(set(cells)) == len(cells)
    assert Cell("tiny", "float32", rows=32, context=512) in steps.gpu_suite(("tiny",), "float32", 512)
    assert Cell("tiny", "float32", context=16384) in steps.gpu_suite(("tiny",), "float32", 512)


@pytest.mark.parametrize("suite", ["cpu", "gpu", "growth"])
def test_a_suite_from_end_to_end(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "SAMPLE", {"cpu": 1 << 16})
    monkeypatch.setattr(steps, "CONTEXTS", (8, 16))
    monkeypatch.setattr(steps, "BATCHES", (1, 2))
    monkeypatch.setattr(steps, "VOCABULARIES", (100,))
    out, page = tmp_path / "steps.json", tmp_path / "page.md"
    options = ["--models", "tiny", "--context", "8", "--nodes", "2,4", "--rounds", "2", "--device", "cpu"]
    steps.app(["measure", suite, "--json", str(out), *options], standalone_mode=False)
    result = json.loads(out.read_text())
    assert result["meta"]["suite"] == suite
    assert {"command", "commit", "versions", "hardware", "threads"} <= result["meta"].keys()
    for cell in result["cells"]:
        assert [step["nodes"] for step in cell["steps"]] == [0, 2, 4]
        assert cell["steps"][0]["ratio"] == 1
        assert all(len(step["ms_rounds"]) == 2 for step in cell["steps"])
        assert cell["steps"][2]["stages_ms"]["draft"] > 0
        assert cell["roofline"] > 0
    page.write_text("<!-- figures: results -->\n<!-- end of figures -->\n")
    steps.app(["report", str(page), str(out)], standalone_mode=False)
    assert "| tiny | 1 | 8 |" in page.read_text()
    assert "β 3.53 (paper)" in capsys.readouterr().out


def test_names_that_are_none():
    with pytest.raises(UserError, match="no shape llama-2b"):
        named_shape("llama-2b")


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "results").glob("steps-*.json"))]
    assert insert_figures(page, markdown_steps(results)) == page


def test_out_of_memory_is_a_result(monkeypatch):
    from benchmarks import steps

    def none(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(steps, "pair_for", none)
    monkeypatch.setattr(steps, "read_bandwidth", lambda _: 1.0)
    (found,) = steps.measured([Cell("tiny", "float32")], "cpu", False, 1)
    assert found["failed"] == "out of memory"
    assert found["model"] in markdown_steps([{"meta": META, "cells": [found]}])


META = {
    "suite": "cpu",
    "compiled": False,
    "command": "c",
    "commit": None,
    "device": "cpu",
    "threads": 1,
    "rounds": 1,
    "hardware": {"cpu": "a", "gpu": None},
    "versions": {"torch": "1", "transformers": "2"},
}
