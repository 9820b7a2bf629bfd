"""The bench of other engines: what it counts, by hand, and its table in docs/serving.md."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import vllm_acceptance
from benchmarks.pages import insert_figures
from benchmarks.serving import Reply
from benchmarks.vllm_acceptance import Counts, counters, markdown_engines, row_of, ways_of
from ctc_drafter.types import UserError

ROOT = Path(__file__).parents[2]
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0"} 20.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e9
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 50.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 5.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 33.0
vllm:iteration_tokens_total_count{engine="0"} 33.0
vllm:iteration_tokens_total_sum{engine="0"} 900.0
"""


def test_a_row_by_hand():
    plain = [Reply("a", 60, 1.0), Reply("b", 40, 1.0)]
    # Two prefills gave a token each, 38 steps the other 98, and 20 of them verified a draft.
    counts = Counts(drafts=20, accepted=50, iterations=40)
    row = row_of("t", "CTC", [Reply("a", 60, 1.0), Reply("x", 40, 1.0)], plain, counts)
    assert row["acceptance_length"] == 1 + 50 / 20
    assert row["tokens_per_step"] == 98 / 38
    assert (row["identical"], row["answers"]) == (1, 2)
    assert row_of("t", "plain", plain, plain, Counts(0, 0, 100))["tokens_per_step"] == 1
    assert row_of("t", "plain", plain, plain, Counts(0, 0, 100))["acceptance_length"] is None


def test_counts_that_cannot_be_are_refused():
    plain = [Reply("a", 60, 1.0)]
    with pytest.raises(UserError, match="19 steps and 20 drafts"):
        row_of("t", "CTC", plain, plain, Counts(drafts=20, accepted=50, iterations=20))


def test_vllms_counters_are_read(tmp_path):
    (tmp_path / "metrics").write_text(METRICS)
    assert counters(f"file://{tmp_path}") == Counts(20.0, 50.0, 33.0)
    (tmp_path / "metrics").write_text("")
    assert counters(f"file://{tmp_path}") == Counts(0.0, 0.0, 0.0)
    assert Counts(5, 4, 3).since(Counts(1, 1, 1)) == Counts(4, 3, 2)


def test_a_run_that_ends_early_keeps_what_it_has(tmp_path, monkeypatch):
    """The third server fails: the rows of the first two are there, and the file says that it is not all."""
    (tmp_path / "t.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')

    @contextmanager
    def served(arguments, port):
        if arguments[0] == "E":
            raise UserError("vLLM did not start")
        yield "url"

    seen = iter(range(0, 1000, 40))
    monkeypatch.setattr(vllm_acceptance, "ways_of", lambda _: (5, {"plain": ["T"], "vLLM n-gram": ["T"], "CTC": ["E"]}))
    monkeypatch.setattr(vllm_acceptance, "vllm_version", lambda: "0")
    monkeypatch.setattr(vllm_acceptance, "vllm_served", served)
    monkeypatch.setattr(vllm_acceptance, "counters", lambda _: Counts(0, 0, next(seen)))
    monkeypatch.setattr(
        vllm_acceptance, "ask_all", lambda url, bodies, clients: ([Reply("a", 20, 1.0) for _ in bodies], 1.0)
    )
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match="did not start"):
        vllm_acceptance.measure(Path("E"), str(tmp_path / "t.jsonl"), out, None, 16, 20, 18764, None)
    found = json.loads(out.read_text())
    assert not found["meta"]["complete"]
    assert [row["method"] for row in found["rows"]] == ["plain", "vLLM n-gram"]
    assert found["rows"][0]["tokens_per_step"] == 1


def test_a_port_that_is_taken_is_refused(monkeypatch):
    monkeypatch.setattr(vllm_acceptance, "find_spec", lambda _: True)
    monkeypatch.setattr(vllm_acceptance, "answers", lambda _: True)
    with pytest.raises(UserError, match="another server answers"), vllm_acceptance.vllm_served(["E"], 1):
        pass


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
    monkeypatch.setattr(vllm_acceptance, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="vLLM is not installed"), vllm_acceptance.vllm_served(["E"], 1):
        pass


def test_the_pages_table_is_that_of_the_results():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    results = [json.loads(file.read_text()) for file in sorted((ROOT / "results").glob("vllm-*.json"))]
    assert insert_figures(page, markdown_engines(results), "vllm") == page
