"""Best-first search over token frames, against the search of static shapes and a plain product of probabilities."""

import math

import pytest
import torch

from ctc_drafter.ctc.chain_search_cpu import best_chains
from ctc_drafter.drafters.baselines.chain_rule import expand_statically
from ctc_drafter.drafters.predictor import Predictor, low_rank_bias
from helpers import exact_in_tables

VOCABULARY, DEPTH, HIDDEN = 60, 4, 16


def parts(width: int, rows: int = 3):
    torch.manual_seed(width)
    embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
    predictor = Predictor(VOCABULARY, HIDDEN, 8, width)
    with torch.no_grad():
        for weight in predictor.parameters():
            weight.copy_(torch.randn_like(weight))
    logits = 2.0 * torch.randn(rows, DEPTH, VOCABULARY)
    return embed, predictor, logits, torch.randn(rows, HIDDEN), torch.tensor([5, 0, 59])[:rows]


def by_levels(predictor: Predictor, embed: torch.nn.Embedding, logits, root, states, nodes: int):
    """The search of static shapes, with the module itself for the bias."""

    def step(prefixes, _places):
        size, last = prefixes.shape[2], prefixes[:, :, -1]
        previous = prefixes[:, :, -2] if size > 1 else torch.full_like(last, -1)
        bias = predictor.output(predictor.state(previous, last, states, embed))
        return logits[:, size - 1].unsqueeze(1) + bias

    return expand_statically(step, root, nodes, DEPTH)


def found_in(candidates, row: int) -> dict[tuple[int, ...], float]:
    prefixes: list[tuple[int, ...]] = []
    for place, (token, parent) in enumerate(
        zip(candidates.tokens[row].tolist(), candidates.parents[row].tolist(), strict=True)
    ):
        assert parent < place
        prefixes.append((*(prefixes[parent] if parent >= 0 else ()), token))
        assert len(prefixes[-1]) == int(candidates.depths[row, place])
    assert len(set(prefixes)) == len(prefixes)
    return dict(zip(prefixes, candidates.scores[row].tolist(), strict=True))


@pytest.mark.parametrize("width", [0, 12])
@pytest.mark.parametrize("nodes", [1, 6, 40])
@torch.no_grad()
def test_the_best_prefixes_under_a_predictor(width: int, nodes: int) -> None:
    embed, predictor, logits, start, root = parts(width)
    exact_in_tables(predictor, embed)
    states = predictor.root_state(start)
    slow = by_levels(predictor, embed, logits, root, states, nodes)
    fast = best_chains(logits, root, low_rank_bias(predictor, embed), states, count=nodes)
    for row in range(3):
        theirs = found_in(slow, row)
        best = dict(sorted(theirs.items(), key=lambda item: -item[1])[:nodes])
        assert found_in(fast, row) == pytest.approx(best, abs=1e-4)


@torch.no_grad()
def test_frames_without_a_predictor() -> None:
    _, _, logits, start, root = parts(0)
    fast = best_chains(logits, root, low_rank_bias(None, torch.nn.Embedding(1, 1)), start[:, :0], count=30)
    slow = expand_statically(lambda prefixes, _: logits[:, prefixes.shape[2] - 1].unsqueeze(1), root, 30, DEPTH)
    for row in range(3):
        best = dict(sorted(found_in(slow, row).items(), key=lambda item: -item[1])[:30])
        assert found_in(fast, row) == pytest.approx(best, abs=1e-4)


@torch.no_grad()
def test_int8_moves_scores_a_little() -> None:
    embed, predictor, logits, start, root = parts(12)
    predictor.output.weight.mul_(0.1)
    states = predictor.root_state(start)
    exact = by_levels(predictor, embed, logits, root, states, 20)
    rough = best_chains(logits, root, low_rank_bias(predictor, embed), states, count=20)
    for row in range(3):
        mine, theirs = found_in(rough, row), found_in(exact, row)
        both = mine.keys() & theirs.keys()
        assert len(both) >= 15
        assert max(abs(mine[prefix] - theirs[prefix]) for prefix in both) < 0.2


@torch.no_grad()
def test_a_floor_leaves_out_and_rows_are_padded() -> None:
    _, _, logits, start, root = parts(0)
    logits[1] *= 8.0  # a row that is sure
    bias = low_rank_bias(None, torch.nn.Embedding(1, 1))
    whole = best_chains(logits, root, bias, start[:, :0], count=200)
    floored = best_chains(logits, root, bias, start[:, :0], count=200, min_probability=0.02)
    sizes = set()
    for row in range(3):
        likely = {prefix: score for prefix, score in found_in(whole, row).items() if score >= math.log(0.02)}
        kept = floored.scores[row] > -math.inf
        sizes.add(int(kept.sum()))
        assert floored.scores[row, kept].tolist() == pytest.approx(sorted(likely.values(), reverse=True), abs=1e-5)
    assert len(sizes) > 1
