import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctc_drafter.decode.tree import ancestor_matrix
from ctc_drafter.decode.verify import follow, follow_statically
from ctc_drafter.types import TokenTree


def tree_of(tokens: list[int], parents: list[int]) -> TokenTree:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    up = torch.tensor([parents])
    return TokenTree(
        tokens=torch.tensor([tokens]),
        parents=up,
        depths=torch.tensor([depths]),
        ancestors=ancestor_matrix(up),
        valid=torch.ones(1, len(tokens), dtype=torch.bool),
        scores=torch.zeros(1, len(tokens)),
    )


# root 9 -> 0 -> 1, root -> 1
EXAMPLE = tree_of([9, 0, 1, 1], [0, 0, 0, 1])


@pytest.mark.parametrize("walk", [follow, follow_statically])
def test_the_worked_example(walk):
    result = walk(EXAMPLE, torch.tensor([[0, 1, 5, 2]]))
    assert result.counts.tolist() == [2]
    assert result.path[:, :3].tolist() == [[0, 1, 3]]
    assert result.tokens[:, :3].tolist() == [[0, 1, 2]]
    assert result.bonus.tolist() == [2]


@pytest.mark.parametrize("walk", [follow, follow_statically])
def test_nothing_agrees(walk):
    result = walk(EXAMPLE, torch.tensor([[7, 1, 5, 2]]))
    assert result.counts.tolist() == [0]
    assert result.path.tolist() == [[0, 0, 0, 0]]
    assert result.tokens.tolist() == [[7, 7, 7, 7]]


@pytest.mark.parametrize("walk", [follow, follow_statically])
def test_a_node_below_a_wrong_one_is_not_accepted(walk):
    assert walk(EXAMPLE, torch.tensor([[1, 1, 6, 2]])).path[:, :2].tolist() == [[0, 2]]


@pytest.mark.parametrize("walk", [follow, follow_statically])
def test_invalid_nodes_are_never_accepted(walk):
    tree = TokenTree(**{**vars(EXAMPLE), "valid": torch.tensor([[True, True, True, False]])})
    assert walk(tree, torch.tensor([[0, 1, 5, 2]])).counts.tolist() == [1]


@pytest.mark.parametrize("walk", [follow, follow_statically])
def test_nodes_that_nobody_asked_about_are_off_the_path(walk):
    result = walk(EXAMPLE, torch.tensor([[0, 1, -1, 2]]))
    assert result.tokens[:, :3].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("walk", [follow, follow_statically])
@given(data=st.data())
def test_agrees_with_a_walk(walk, data):
    size = data.draw(st.integers(1, 10))
    parents, tokens = [0], [9]
    for node in range(1, size):
        parents.append(data.draw(st.integers(0, node - 1)))
        siblings = {tokens[i] for i in range(1, node) if parents[i] == parents[node]}
        tokens.append(data.draw(st.sampled_from([t for t in range(12) if t not in siblings])))
    target_tokens = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    path, emitted = [0], []
    while True:
        emitted.append(target_tokens[path[-1]])
        below = [i for i in range(1, size) if parents[i] == path[-1] and tokens[i] == emitted[-1]]
        if not below:
            break
        path.append(below[0])
    result = walk(tree_of(tokens, parents), torch.tensor([target_tokens]))
    count = int(result.counts)
    assert result.path[0, : count + 1].tolist() == path
    assert result.tokens[0, : count + 1].tolist() == emitted
    assert result.bonus.tolist() == emitted[-1:]
