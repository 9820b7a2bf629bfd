"""The static tree of alignments, against a collapse of every path by itself."""

import math

import pytest
import torch

from ctc_drafter.drafters.baselines.ctc_variants import collapsed, static_tree
from ctc_drafter.types import padded
from ctc_oracle import collapse

BLANK, FRAMES, RANKS = 3, 5, 4


def frames(seed: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ranked symbols, the blank among them, and their log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    scores, symbols = torch.randn(FRAMES, BLANK + 1, generator=generator).log_softmax(-1).topk(RANKS, -1)
    return symbols.tolist(), scores.tolist()


def path_to(tree, node: int) -> list[tuple[int, int]]:
    above, frame, rank = tree[node]
    return [*(path_to(tree, above) if above >= 0 else []), (frame, rank)]


def collapsed_path(symbols, path) -> tuple[int, ...]:
    line = torch.tensor([symbols[frame][rank] for frame, rank in path])
    tokens, length = collapse(line, BLANK)
    return tuple(tokens[: int(length)].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_alignments_add_up_to_prefixes(seed: int) -> None:
    symbols, scores = frames(seed)
    tree = static_tree(40, FRAMES, RANKS)
    expected: dict[tuple[int, ...], float] = {}
    for node in range(len(tree)):
        path = path_to(tree, node)
        prefix, before = collapsed_path(symbols, path), collapsed_path(symbols, path[:-1]) if len(path) > 1 else ()
        if prefix != before:
            expected[prefix] = expected.get(prefix, 0.0) + math.exp(sum(scores[f][r] for f, r in path))
    found: dict[tuple[int, ...], float] = {}
    order: list[tuple[int, ...]] = []
    for token, score, parent, depth in collapsed(tree, symbols, scores, BLANK, FRAMES):
        order.append((*(order[parent] if parent >= 0 else ()), token))
        assert len(order[-1]) == depth
        assert parent < 0 or score <= math.log(found[order[parent]]) + 1e-9
        found[order[-1]] = math.exp(score)
    assert len(set(order)) == len(order)
    assert found == pytest.approx(expected)


def test_with_every_alignment_the_scores_are_the_searchs() -> None:
    from ctc_drafter.ctc.search import prefix_search

    generator = torch.Generator().manual_seed(1)
    tokens, blanks = torch.randn(1, 3, BLANK, generator=generator), torch.randn(1, 3, generator=generator)
    logits = torch.cat([tokens, blanks.unsqueeze(-1)], -1).log_softmax(-1)
    scores, symbols = logits[0].topk(RANKS, -1)
    tree = static_tree(RANKS + RANKS**2 + RANKS**3, 3, RANKS)
    found = padded([collapsed(tree, symbols.tolist(), scores.tolist(), BLANK, 3)], torch.device("cpu"))
    expected = prefix_search(tokens, blanks, torch.tensor([0]), None, width=100, depth=3)
    real = expected.scores[expected.scores > float("-inf")]
    torch.testing.assert_close(found.scores[0].sort().values, real.sort().values, atol=1e-5, rtol=0)


def test_deeper_prefixes_than_allowed_are_left_out() -> None:
    symbols, scores = frames(0)
    for _, score, _, depth in collapsed(static_tree(40, FRAMES, RANKS), symbols, scores, BLANK, 2):
        assert depth <= 2
        assert score > -math.inf


def test_the_static_tree_prefers_low_ranks() -> None:
    tree = static_tree(64, 8, 10)
    assert len(tree) == 64
    assert all(above < place for place, (above, _, _) in enumerate(tree))
    assert all(tree[above][1] == frame - 1 if above >= 0 else frame == 0 for above, frame, _ in tree)
    assert tree[0] == (-1, 0, 0)
    for above, frame, rank in tree:
        assert rank == 0 or (above, frame, rank - 1) in tree
