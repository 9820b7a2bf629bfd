"""Nobody copies or everybody does: which drafters run, two tables, what a draft costs, the best learning rate."""

import json
from pathlib import Path

import pytest
import torch

from ctc_drafter.cli import main
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.drafters.copying import Copying
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import method_of, trained_method
from ctc_drafter.evaluate import variants
from ctc_drafter.evaluate.bench import Entry, at_depths, shortened
from ctc_drafter.evaluate.costs import ACCEPTED, CONTEXT, draft_flops, draft_ms, own_text
from ctc_drafter.evaluate.report_page import page
from ctc_drafter.evaluate.results import apart, read_results
from ctc_drafter.evaluate.variants import best_of, parse_rates, recipes
from ctc_drafter.evaluate.who_copies import as_told, given_copies, parse_copies
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import tiny_drafter, tiny_target
from tiny_models import save_pair, tiny_llama
from train_helpers import written_rows


def medusa(target):
    return trained_method("medusa").drafter.for_target(target.config, draft_length=3).eval()


def test_modes() -> None:
    assert parse_copies("none, all,none") == ("none", "all")
    assert parse_copies("own") == ("own",)
    for bad in ("some", "", "own,all"):
        with pytest.raises(UserError, match="--copies"):
            parse_copies(bad)


def test_entries_of_both_modes() -> None:
    target = tiny_target()
    entries = {
        "ours": Entry(tiny_drafter(target, copies=4, lookup_length=9), {"method": "ctc"}),
        "medusa": Entry(medusa(target), {"method": "medusa"}),
        "prompt_lookup": Entry(PromptLookup(), {}),
    }
    found = given_copies(entries, ("none", "all"))
    assert list(found) == ["ours", "medusa", "ours, copies", "medusa, copies", "prompt_lookup"]
    assert [entry.facts["copies"] for entry in found.values()] == ["none", "none", "all", "all", "all"]
    assert found["ours"].drafter.config.copies == 0
    assert found["ours, copies"].drafter is entries["ours"].drafter
    assert isinstance(found["medusa, copies"].drafter, Copying)
    assert method_of(found["medusa, copies"].drafter) == "medusa"
    assert [entry.facts["draft_length"] for entry in found.values()] == [4, 3, 9, 15, 15]
    assert given_copies(entries, ("own",)) == entries
    with pytest.raises(UserError, match="nothing but copy"):
        given_copies({"prompt_lookup": Entry(PromptLookup(), {})}, ("none",))
    with pytest.raises(UserError, match="nothing but copy"):
        as_told(PromptLookup(), "none")
    deep = at_depths({name: found[name] for name in ("medusa", "medusa, copies")}, (2, 15))
    assert list(deep) == ["medusa, depth 2", "medusa, copies, depth 2"]


def test_a_copying_drafter_with_shorter_drafts() -> None:
    target = tiny_target()
    found = shortened(Copying(medusa(target), 3), 2)
    assert isinstance(found, Copying)
    assert (found.draft_length, found.lookup_length, found.inner.config.draft_length) == (2, 2, 2)


def test_results_apart() -> None:
    drafters = {"a": {"copies": "none"}, "a, copies": {"copies": "all"}}
    rows = [{"method": name, "n": i} for i, name in enumerate(("plain", "a", "a, copies", "hf"))]
    result = {"meta": {"drafters": drafters, "seed": 1}, "rows": rows, "records": rows}
    (none, first), (everyone, second) = apart(result)
    assert (none, everyone) == ("none", "all")
    assert [row["n"] for row in first["rows"]] == [0, 1, 3] == [row["n"] for row in first["records"]]
    assert [row["n"] for row in second["rows"]] == [0, 2, 3]
    assert list(second["meta"]["drafters"]) == ["a, copies"]
    old = {"meta": {"drafters": {"a": {}}}, "rows": rows}
    assert apart(old) == [("own", old)]


def test_operations_of_a_draft() -> None:
    """Medusa's, counted by hand: a residual layer and an output matrix for each head, one state each."""
    target = tiny_target()
    drafter = medusa(target)
    size, vocabulary = target.hidden_size, target.vocab_size
    with torch.no_grad():
        for own in drafter.own.parameters():
            own.mul_(1000)  # so sure that every head is asked
    text = own_text(target)
    assert len(text) == CONTEXT + ACCEPTED + 1
    assert draft_flops(target, drafter, text) == 2 * 3 * (size * size + size * vocabulary)
    assert draft_flops(target, Copying(drafter, 3), text) == draft_flops(target, drafter, text)
    assert draft_flops(target, PromptLookup(), text) is draft_flops(target, NoDrafter(), text) is None
    # Ours by hand: the block's layers and head, the context of the new tokens, and the search.
    ours = tiny_drafter(target)
    config = ours.config
    heads, kv, dim, frames = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.frames
    )  # fmt: skip
    block, seen = 1 + frames, CONTEXT + ACCEPTED + 1 + frames
    fused = 2 * ACCEPTED * size * size * len(config.target_layer_ids)
    context = 2 * ACCEPTED * size * 2 * kv * dim * config.num_hidden_layers
    projections = 2 * block * size * (2 * heads * dim + 2 * kv * dim)
    attention = 2 * 2 * block * seen * heads * dim
    mlp = 2 * block * 3 * size * config.intermediate_size
    logits = 2 * frames * size * (vocabulary + 1)
    rank, width = config.predictor_rank, config.predictor_width
    root = 2 * size * width
    search = 2 * 16 * (vocabulary * (rank + 2 * frames) + rank * width)
    layers = config.num_hidden_layers * (projections + attention + mlp)
    assert draft_flops(target, ours, text) == fused + context + layers + logits + root + search


def test_milliseconds_of_a_draft() -> None:
    rows = [
        {"method": "a", "nodes": nodes, "stages_ms": {"draft": ms}} for nodes, ms in ((8, 1.0), (16, 2.0), (16, 4.0))
    ]
    assert draft_ms({"rows": rows}, "a") == 3.0
    assert draft_ms({"rows": rows[:1]}, "a") == 1.0
    assert draft_ms({"rows": rows}, "b") is None


def test_command_and_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, drafter = save_pair(tmp_path)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "bench-both.json"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "mat"}\n')
    options = [
        "--target",
        str(target),
        "--drafter",
        f"ctc={drafter}",
        "--drafter",
        "prompt_lookup",
        "--tasks",
        str(prompts),
    ]
    options += ["--nodes", "4", "--max-new-tokens", "6", "--watched", "1", "--json", str(out)]
    assert main(["bench", *options]) == 0
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]] == ["plain", "ctc", "ctc, copies", "prompt_lookup"]
    assert all(row["identical"] == row["compared"] == 2 for row in result["rows"])
    assert result["meta"]["copies"] == ["none", "all"]
    facts = result["meta"]["drafters"]
    assert facts["ctc"]["draft_flops"] == facts["ctc, copies"]["draft_flops"] > 1000
    printed = capfd.readouterr().out
    assert printed.index("Nobody copies:") < printed.index("Everybody copies:") < printed.index("prompt_lookup")
    assert "FLOPs/draft" in printed
    nobody, everybody = read_results([out])
    assert (nobody.name, everybody.name) == ("bench-both-nobody-copies", "bench-both-everybody-copies")
    assert (nobody.methods, everybody.methods) == (["ctc"], ["ctc, copies", "prompt_lookup"])
    text = page([nobody, everybody])
    assert "## bench-both-nobody-copies\n\nFrom results/bench-both.json" in text
    assert "FLOPs of a draft" in text
    options[-1] = str(tmp_path / "own.json")
    assert main(["bench", *options, "--copies", "own"]) == 0
    rows = json.loads((tmp_path / "own.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["plain", "ctc", "prompt_lookup"]


def test_eval_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, drafter = save_pair(tmp_path)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "e.json"
    prompts.write_text('{"prompt": "the cat"}\n')
    options = ["eval", "--target", str(target), "--drafter", str(drafter), "--tasks", str(prompts)]
    options += ["--max-new-tokens", "6", "--json", str(out)]
    assert main([*options, "--copies", "all"]) == 0
    result = json.loads(out.read_text())
    assert result["meta"]["copies"] == "all"
    assert [row["method"] for row in result["rows"]] == ["plain", "ctc"]
    assert main([*options, "--copies", "none,all"]) == 2
    assert "one way" in capfd.readouterr().err


def test_rates() -> None:
    assert parse_rates("5e-4, 1e-3,5e-4") == (5e-4, 1e-3)
    assert parse_rates("") == ()
    for bad in ("x", "0", "2"):
        with pytest.raises(UserError, match=f"--learning-rates {bad}"):
            parse_rates(bad)


def test_the_best_learning_rate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    rows = written_rows(target, 40)
    known = {"medusa-0.001": 2.0, "medusa-0.002": 3.0}
    asked = {}

    def beta(_target: Target, drafter, held_out) -> float:
        asked[len(asked)] = len(held_out)
        return list(known.values())[len(asked) - 1]

    monkeypatch.setattr(variants, "held_out_beta", beta)
    entry = best_of((1e-3, 2e-3), target, None, recipes()["medusa"], rows, tmp_path / "medusa", steps=1)
    assert entry.facts["learning_rate"] == 2e-3
    assert entry.facts["sweep"] == {"0.001": 2.0, "0.002": 3.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(known)
    held = rows.split(variants.HELD_OUT)[1]
    assert set(asked.values()) == {len(held)}
    trained = json.loads((tmp_path / "medusa-0.002" / "train.json").read_text())
    assert trained["settings"]["learning_rate"] == 2e-3
    assert trained["rows"]["count"] == len(rows) - len(held)


@torch.inference_mode()
def test_held_out_beta_of_a_drafter_that_copies_the_target() -> None:
    """An untrained drafter accepts next to nothing, but always the bonus token."""
    target = Target.wrap(tiny_llama())
    drafter = trained_method("medusa").drafter.for_target(target.config, draft_length=2).eval()
    assert 1.0 <= variants.held_out_beta(target, drafter, written_rows(target, 3)) <= 3.0
