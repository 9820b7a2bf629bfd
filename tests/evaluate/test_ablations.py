"""Variants: linear heads, the static twin, typical acceptance by brute force, and a table of which all can be made."""

import json
from pathlib import Path

import pytest
import torch

from ctc_drafter.cli import main
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.tree import ancestor_matrix
from ctc_drafter.decode.verify import follow
from ctc_drafter.drafters.baselines.ctc_variants import LinearCTCDrafter, PaperDrafter
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import method_of, open_drafter, trained_method
from ctc_drafter.evaluate.report_page import page
from ctc_drafter.evaluate.results import read_results
from ctc_drafter.evaluate.typical import Typical
from ctc_drafter.evaluate.variants import SIZES, Recipe, chosen_variants, static_twin, variants
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import TokenTree, UserError
from helpers import tiny_drafter, tiny_target
from train_helpers import settings, written_rows

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]


def linear(target, **overrides) -> LinearCTCDrafter:
    torch.manual_seed(0)
    sizes = {"frames": 4, "draft_length": 3, "predictor_rank": 8, "predictor_width": 16}
    drafter = LinearCTCDrafter.for_target(target.config, **sizes | overrides)
    drafter.start_from(target.norm_scale, target.head)
    return drafter.eval()


def test_linear_frames_start_as_the_targets_last_state() -> None:
    target = tiny_target()
    drafter, tokens = linear(target), torch.tensor(PROMPTS[:1])
    features = target.hidden_features(tokens, drafter.feature_layers)
    blocks = drafter.filled(drafter.draft_states(features, tokens, torch.tensor([[4]]), target.embed)[0])
    expected = target.model(tokens).logits[0, 3]  # of the token before the anchor
    torch.testing.assert_close(target.head(blocks[0, 2]), expected)


def test_linear_drafters_are_lossless_learn_and_come_back(tmp_path: Path) -> None:
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=16).tokens
    drafter, rows = linear(target), written_rows(target, 6)
    done = train_drafter(target, drafter, rows, rows, tmp_path, settings(steps=30, eval_every=30, eval_positions=40))
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    found = generate(target, drafter, PROMPTS, max_new_tokens=16, nodes=8, min_probability=0.0)
    assert found.tokens == expected
    loaded = open_drafter(str(tmp_path))
    assert method_of(loaded) == "ctc-linear"
    again = generate(target, loaded, PROMPTS, max_new_tokens=16, nodes=8, min_probability=0.0)
    assert (again.tokens, again.stats.steps) == (expected, found.stats.steps)


def test_the_static_twin_is_the_papers_drafter() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, predictor_rank=0)
    twin = static_twin(drafter).eval()
    assert isinstance(twin, PaperDrafter)
    features = torch.randn(1, 6, drafter.config.hidden_size * len(drafter.feature_layers))
    tokens, anchors = torch.tensor([[5, 6, 7, 8, 9, 3]]), torch.tensor([[3]])
    ours, theirs = (each.draft_states(features, tokens, anchors, target.embed) for each in (drafter, twin))
    assert torch.equal(ours, theirs)
    expected = plain_generate(target, PROMPTS, max_new_tokens=12).tokens
    assert generate(target, twin, PROMPTS, max_new_tokens=12, nodes=16, min_probability=0.0).tokens == expected
    with pytest.raises(UserError, match="cannot ask a predictor"):
        static_twin(tiny_drafter(target))


@pytest.mark.parametrize("seed", range(20))
def test_typical_acceptance_by_brute_force(seed: int) -> None:
    torch.manual_seed(seed)
    parents, vocabulary = [0, 0, 0, 1, 1, 2, 3, 4], 12
    depths = [0, 1, 1, 2, 2, 2, 3, 3]
    logits = 2 * torch.randn(1, 8, vocabulary)
    best = logits[0].topk(3).indices.tolist()
    ranks = torch.randint(0, 3, (8,)).tolist()
    ranks[2], ranks[4] = (ranks[1] + 1) % 3, (ranks[3] + 1) % 3  # siblings differ
    tokens = [0, *(best[parent][ranks[i]] for i, parent in enumerate(parents) if i)]
    whole = torch.tensor([parents])
    tree = TokenTree(
        torch.tensor([tokens]), whole, torch.tensor([depths]), ancestor_matrix(whole),
        torch.tensor([[True] * 7 + [False]]), torch.zeros(1, 8),
    )  # fmt: skip
    rule = Typical(epsilon=0.2, delta=0.3, temperature=0.7)
    found = follow(tree, rule.sample_tree(tree, logits, []))

    def likelihood(node: int) -> float:
        """Of the path to the node; 0 if it does not pass."""
        if node == 0:
            return 1.0
        probabilities = (logits[0, parents[node]] / 0.7).softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum()
        own = float(probabilities[tokens[node]])
        return likelihood(parents[node]) * own if own > min(0.2, float(0.3 * (-entropy).exp())) else 0.0

    passing = [node for node in range(7) if likelihood(node)]
    best_node = max(passing, key=lambda node: (depths[node], likelihood(node)))
    assert int(found.counts) == depths[best_node]
    assert int(found.bonus) == int(logits[0, best_node].argmax())
    path = []
    while best_node:
        path.insert(0, tokens[best_node])
        best_node = parents[best_node]
    assert found.tokens[0, : len(path)].tolist() == path


def test_typical_acceptance_can_change_the_output() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    loose = Typical(epsilon=1e-6, delta=1e-6)
    options = {"max_new_tokens": 16, "nodes": 16, "min_probability": 0.0}
    found = generate(target, drafter, PROMPTS, sampler=loose, **options)
    assert found.tokens != generate(target, drafter, PROMPTS, **options).tokens
    with pytest.raises(UserError, match="epsilon is 0"):
        Typical(epsilon=0)


def test_every_variant_can_be_made() -> None:
    target, labels = tiny_target(), [variant.label for variant in variants()]
    assert len(set(labels)) == len(labels) > 25
    shared: dict[str, Recipe] = {}
    for variant in variants():
        assert shared.setdefault(variant.name, variant.recipe) == variant.recipe
        method = trained_method(variant.recipe.method)
        known = method.drafter.config_class.__dataclass_fields__
        sizes = {key: size for key, size in SIZES.items() if key in known} | dict(variant.recipe.sizes)
        drafter = method.drafter.for_target(target.config, **method.with_usual(sizes))
        drafter.check_loss(TrainSettings.parse(dict(variant.recipe.training)).loss)
        if variant.static:
            assert isinstance(drafter, CTCDrafter)
            static_twin(drafter)
    with pytest.raises(UserError, match="'rank 3' is no variant"):
        chosen_variants(("rank 3",))


@pytest.mark.slow
def test_command(tiny_quick: list[str], tmp_path: Path) -> None:
    out = tmp_path / "bench-ablations.json"
    options = ["bench", "--ablations", *tiny_quick, "--json", str(out), "--work", str(tmp_path / "work")]
    for label in ("prefix", "prefix, static tree", "linear, CE", "linear, CE, typical"):
        options += ["--only", label]
    assert main([*options, "--nodes", "4"]) == 0
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]] == [
        "plain", "prefix", "prefix, static tree", "linear, CE", "linear, CE, typical"
    ]  # fmt: skip
    assert all(row["identical"] == row["compared"] for row in result["rows"][:-1])
    text = page(read_results([out]))
    assert "| prefix, static tree | " in text
    assert "Typical acceptance changes the output" in text


@pytest.mark.slow
def test_targets_of_several_sizes(tiny_quick: list[str], tmp_path: Path) -> None:
    """A target that is named with its own text: one table of all of them."""
    options = ["bench", "--ablations", *tiny_quick, "--only", "prefix", "--nodes", "chain,4", "--data"]
    options += [str(tmp_path / "answers"), "--target", str(tmp_path / "target")]
    outs = [tmp_path / f"bench-{name}.json" for name in ("a", "b")]
    for out in outs:
        assert main([*options, "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    larger = json.loads(outs[1].read_text())
    size, larger["meta"]["target_parameters"] = larger["meta"]["target_parameters"], 7_000_000
    outs[1].write_text(json.dumps(larger))
    text = page(read_results(outs[::-1]))
    assert f"{size / 1e6:.1f} M, chain | {size / 1e6:.1f} M, 4 | 7.0 M, chain | 7.0 M, 4 | identical" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| prefix |") and line.endswith("| 4 of 4 |")]
    assert line.count(" | ") == 5
    assert "### Drafters for 7.0 M" in text
    assert "## bench-a" not in text
    larger["meta"]["max_new_tokens"] += 1
    outs[1].write_text(json.dumps(larger))
    with pytest.raises(UserError, match="bench-a and bench-b differ"):
        page(read_results(outs))
