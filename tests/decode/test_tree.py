import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctc_drafter.decode.tree import ancestor_matrix, best_chain, build_tree, build_tree_statically
from ctc_drafter.types import Candidates

T, F = True, False
ROOT = torch.tensor([9])


def candidates(*prefixes: tuple[str, float]) -> Candidates:
    """Prefixes as strings over a..z, parents before children."""
    names = [name for name, _ in prefixes]
    return Candidates(
        tokens=torch.tensor([[ord(name[-1]) - ord("a") for name in names]]),
        parents=torch.tensor([[names.index(name[:-1]) if len(name) > 1 else -1 for name in names]]),
        depths=torch.tensor([[len(name) for name in names]]),
        scores=torch.tensor([[score for _, score in prefixes]], dtype=torch.float64).log(),
    )


def stacked(first: Candidates, second: Candidates) -> Candidates:
    """Two rows of one batch."""
    parts = ("tokens", "parents", "depths", "scores")
    return Candidates(*(torch.cat([getattr(first, part), getattr(second, part)]) for part in parts))


EXAMPLE = candidates(("a", 0.6), ("b", 0.3), ("ab", 0.5), ("aba", 0.1))


def test_the_worked_example():
    tree = build_tree(ROOT, EXAMPLE, nodes=3)
    assert tree.tokens.tolist() == [[9, 0, 1, 1]]
    assert tree.parents.tolist() == [[0, 0, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2]]
    assert tree.ancestors.tolist() == [[[T, F, F, F], [T, T, F, F], [T, F, T, F], [T, T, F, T]]]
    assert tree.valid.all()


def test_a_tree_larger_than_its_candidates_holds_them_all():
    assert build_tree(ROOT, EXAMPLE, nodes=50).tokens.shape == (1, 5)


def test_impossible_prefixes_are_invalid_nodes():
    tree = build_tree(ROOT, candidates(("a", 0.6), ("b", 0.0)), nodes=2)
    assert tree.valid.tolist() == [[T, T, F]]


def test_a_floor_leaves_unlikely_nodes_out():
    tree = build_tree(ROOT, EXAMPLE, nodes=4, min_probability=0.4)
    assert tree.tokens.tolist() == [[9, 0, 1]]
    assert tree.valid.all()
    # In a batch the likeliest row sets the size, and the others are padded with nodes that are never accepted.
    unsure = candidates(("a", 0.3), ("b", 0.2), ("ab", 0.1), ("aba", 0.1))
    both = stacked(EXAMPLE, unsure)
    tree = build_tree(ROOT.repeat(2), both, nodes=4, min_probability=0.4)
    assert tree.valid.tolist() == [[T, T, T], [T, F, F]]
    alone = build_tree(ROOT, unsure, nodes=4, min_probability=0.9)
    assert alone.tokens.tolist() == [[9]]
    assert alone.ancestors.tolist() == [[[T]]]


def test_the_best_chain_maximises_the_sum_of_prefix_probabilities():
    chain = best_chain(candidates(("a", 0.5), ("b", 0.4), ("ac", 0.1), ("bc", 0.35), ("acd", 0.05), ("bcd", 0.3)))
    assert chain.tokens.tolist() == [[1, 2, 3]]
    assert chain.parents.tolist() == [[-1, 0, 1]]
    torch.testing.assert_close(chain.scores.exp(), torch.tensor([[0.4, 0.35, 0.3]], dtype=torch.float64))


def test_best_chains_of_different_lengths_are_padded():
    long = candidates(("a", 0.5), ("b", 0.4), ("ac", 0.1), ("bc", 0.35))
    short = candidates(("a", 0.9), ("b", 0.1), ("bc", 0.1), ("bd", 0.05))
    both = stacked(long, short)
    chain = best_chain(both)
    assert chain.tokens[0].tolist() == [1, 2]
    assert chain.tokens[1, 0].item() == 0
    assert chain.scores.exp().tolist() == [pytest.approx([0.4, 0.35]), [pytest.approx(0.9), 0.0]]


@st.composite
def random_candidates(draw):
    """Random prefixes whose scores never grow along a path, equal ones included."""
    size = draw(st.integers(1, 12))
    parents, depths, scores = [], [], []
    for i in range(size):
        parent = draw(st.integers(-1, i - 1)) if i else -1
        parents.append(parent)
        depths.append(1 if parent < 0 else depths[parent] + 1)
        scores.append((0.0 if parent < 0 else scores[parent]) - draw(st.sampled_from([0.0, 0.5, 1.0])))
    tokens = torch.arange(size)[None]
    return Candidates(tokens, torch.tensor([parents]), torch.tensor([depths]), torch.tensor([scores]))


@given(random_candidates(), st.integers(1, 14))
def test_trees_are_closed_and_best(drawn, nodes):
    tree = build_tree(ROOT, drawn, nodes)
    count = min(nodes, drawn.tokens.shape[1])
    best = drawn.scores.sort(descending=True).values[:, :count].sum()
    assert tree.tokens.shape == (1, count + 1)
    torch.testing.assert_close(tree.scores.sum(), best)
    for node in range(1, count + 1):
        parent = int(tree.parents[0, node])
        origin = int(tree.tokens[0, node])
        above = int(drawn.parents[0, origin])
        assert parent < node
        assert int(tree.tokens[0, parent]) == (9 if above < 0 else above)
        path = {node}
        while path.isdisjoint({0}):
            path.add(int(tree.parents[0, min(path)]))
        assert set(tree.ancestors[0, node].nonzero().flatten().tolist()) == path
        assert int(tree.depths[0, node]) == len(path) - 1


def test_long_chains_reach_the_root():
    parents = torch.tensor([[0, *range(20)]])
    assert torch.equal(ancestor_matrix(parents)[0], torch.ones(21, 21).tril().bool())


@given(random_candidates(), random_candidates(), st.integers(1, 14), st.sampled_from([0.0, 0.1, 0.4, 0.9]))
def test_the_compiled_tree_is_the_static_one(first, second, nodes, min_probability):
    """In a batch, with padding among the candidates and below the floor."""
    size = max(len(first.tokens[0]), len(second.tokens[0]))
    fillers = {"tokens": 0, "parents": -1, "depths": 1, "scores": float("-inf")}
    both = Candidates(
        *(
            torch.cat(
                [
                    torch.nn.functional.pad(vars(c)[name], (0, size - c.tokens.shape[1]), value=v)
                    for c in (first, second)
                ]
            )
            for name, v in fillers.items()
        )
    )
    roots = torch.tensor([9, 8])
    wanted = build_tree_statically(roots, both, nodes, math.log(min_probability) if min_probability else None)
    tree = build_tree(roots, both, nodes, min_probability)
    for name, value in vars(wanted).items():
        assert torch.equal(vars(tree)[name], value), name
