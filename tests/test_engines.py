"""The bench of other engines: what it counts, by hand, and its table in docs/serving.md."""

import json
from pathlib import Path

import pytest

from ctc_drafter.evaluate import engines
from ctc_drafter.evaluate.clients import Reply
from ctc_drafter.evaluate.engines import counters, markdown_engines, row_of, ways_of
from ctc_drafter.evaluate.report import insert_figures
from ctc_drafter.types import UserError

ROOT = Path(__file__).parents[1]
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0"} 20.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e9
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 50.0
"""


def test_a_row_by_hand():
    plain = [Reply("a", 60, 1.0), Reply("b", 40, 1.0)]
    row = row_of("t", "CTC", [Reply("a", 60, 1.0), Reply("x", 40, 1.0)], plain, drafts=20, accepted=50)
    assert row["acceptance_length"] == 1 + 50 / 20
    assert row["tokens_per_step"] == 100 / 50
    assert (row["identical"], row["answers"]) == (1, 2)
    assert row_of("t", "plain", plain, plain, 0, 0)["acceptance_length"] is None


def test_vllms_counters_are_read(tmp_path):
    (tmp_path / "metrics").write_text(METRICS)
    assert counters(f"file://{tmp_path}") == (20.0, 50.0)
    (tmp_path / "metrics").write_text("")
    assert counters(f"file://{tmp_path}") == (0.0, 0.0)


def test_both_kinds_of_drafts_have_the_same_length(tmp_path):
    config = {"verifier": {"name_or_path": "T"}, "proposal_methods": [{"speculative_tokens": 5}]}
    (tmp_path / "config.json").write_text(json.dumps({"speculators_config": config}))
    length, ways = ways_of(tmp_path)
    assert length == 5
    assert ways["plain"] == ["T"]
    assert json.loads(ways["vLLM n-gram"][2])["num_speculative_tokens"] == 5
    assert ways["CTC"] == [str(tmp_path)]
    with pytest.raises(UserError, match="no exported drafter"):
        ways_of(tmp_path / "nothing")


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="vLLM is not installed"), engines.vllm_served(["E"], 1):
        pass


def test_the_pages_table_is_that_of_the_results():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    results = [json.loads(file.read_text()) for file in sorted((ROOT / "results").glob("vllm-*.json"))]
    assert insert_figures(page, markdown_engines(results), "vllm") == page
