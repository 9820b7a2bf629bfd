"""Best prefixes under the chain rule, against the probabilities of all of them."""

import itertools
import math

import pytest
import torch

from ctc_drafter.drafters.baselines.chain_rule import expand, expand_statically

VOCABULARY, DEPTH = 4, 3


def table(rows: int, sharpness: float = 1.0, seed: int = 0) -> dict[tuple[int, ...], torch.Tensor]:
    """Random next-token log-probabilities `[rows, V]` after every prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for size in range(DEPTH) for p in itertools.product(range(VOCABULARY), repeat=size)]
    return {p: (sharpness * torch.randn(rows, VOCABULARY, generator=generator)).log_softmax(-1) for p in prefixes}


def stepper(known, asked=None):
    def step(prefixes, places):
        if asked is not None:
            asked.append(prefixes.shape[1])
        rows = [
            torch.stack([known[tuple(path[1:])][row] for path in paths]) for row, paths in enumerate(prefixes.tolist())
        ]
        return torch.stack(rows) + 7.0  # logits, not log-probabilities

    return step


def all_scores(known, row: int) -> dict[tuple[int, ...], float]:
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for prefix, steps in known.items():
        for token in range(VOCABULARY):
            scores[(*prefix, token)] = scores[prefix] + float(steps[row, token])
    del scores[()]
    return scores


def found_in(candidates, row: int) -> dict[tuple[int, ...], float]:
    prefixes: list[tuple[int, ...]] = []
    for place, token in enumerate(candidates.tokens[row].tolist()):
        parent = int(candidates.parents[row, place])
        if candidates.scores[row, place] == -math.inf:  # padding, behind all others of its level
            prefixes.append(())
            continue
        assert parent < place
        prefixes.append((*(prefixes[parent] if parent >= 0 else ()), token))
        assert len(prefixes[-1]) == int(candidates.depths[row, place])
    found = [(prefix, score) for prefix, score in zip(prefixes, candidates.scores[row].tolist(), strict=True) if prefix]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("nodes", [1, 2, 5, 20, 200])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_best_prefixes_of_all(nodes: int, sharpness: float, compiled: bool) -> None:
    known = table(3, sharpness)
    roots, step = torch.tensor([9, 9, 9]), stepper(known)
    if compiled:
        candidates = expand(step, roots, nodes=nodes, depth=DEPTH)
    else:
        candidates = expand_statically(step, roots, nodes, DEPTH)
    for row in range(3):
        expected, found = all_scores(known, row), found_in(candidates, row)
        assert found == pytest.approx({prefix: expected[prefix] for prefix in found}, abs=1e-5)
        best = sorted(expected.values(), reverse=True)[:nodes]
        assert sorted(found.values(), reverse=True)[:nodes] == pytest.approx(best, abs=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    known = table(3)
    together = expand(stepper(known), torch.tensor([9, 9, 9]), nodes=6, depth=DEPTH)
    alone = {prefix: steps[1:2] for prefix, steps in known.items()}
    single = found_in(expand(stepper(alone), torch.tensor([9]), nodes=6, depth=DEPTH), 0)
    both = found_in(together, 1)
    assert sorted(both.values())[-6:] == sorted(single.values())[-6:]


def test_steps_that_ignore_the_prefix_may_answer_once() -> None:
    heads = torch.randn(DEPTH, 2, 1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    once = expand(lambda prefixes, _: heads[prefixes.shape[2] - 1], torch.tensor([0, 0]), nodes=9, depth=DEPTH)
    for row in range(2):
        probabilities = heads[:, row, 0].softmax(-1)
        for prefix, score in found_in(once, row).items():
            product = math.prod(float(probabilities[i, token]) for i, token in enumerate(prefix))
            assert math.exp(score) == pytest.approx(product, rel=1e-5)
        best = sorted(
            (
                math.prod(float(probabilities[i, token]) for i, token in enumerate(prefix))
                for size in range(1, DEPTH + 1)
                for prefix in itertools.product(range(VOCABULARY), repeat=size)
            ),
            reverse=True,
        )[:9]
        assert sorted(found_in(once, row).values(), reverse=True)[:9] == pytest.approx(list(map(math.log, best)))


def test_what_cannot_pay_is_not_expanded() -> None:
    known = table(1, sharpness=6.0)
    asked: list[int] = []
    expand(stepper(known, asked), torch.tensor([9]), nodes=3, depth=DEPTH)
    assert asked[0] == 1
    assert sum(asked) < 1 + 3 + 3
    floored: list[int] = []
    candidates = expand(stepper(known, floored), torch.tensor([9]), nodes=100, depth=DEPTH, min_probability=0.9)
    expected = {prefix for prefix, score in all_scores(known, 0).items() if score >= math.log(0.9)}
    assert expected == found_in(candidates, 0).keys()
    assert sum(floored) < 6


def test_each_place_is_where_the_level_above_asked() -> None:
    """The state that a step keeps by place is that of the prefix's parent, in rows of unequal trees too."""
    known = {prefix: steps * torch.tensor([[0.1], [5.0], [1.0]]) for prefix, steps in table(3).items()}
    above: list[list[tuple[int, ...]]] = [[]]
    answer = stepper(known)

    def step(prefixes, places):
        asked = [[tuple(path) for path in row] for row in prefixes.tolist()]
        if places is not None:
            for row, (paths, wheres) in enumerate(zip(asked, places.tolist(), strict=True)):
                for path, where in zip(paths, wheres, strict=True):
                    if path[0] == 9:  # zeros are padding
                        assert above[0][row][where] == path[:-1]
        above[0] = asked
        safe = prefixes.clone()
        safe[:, :, 0] = 9
        return answer(safe, places)

    candidates = expand(step, torch.tensor([9, 9, 9]), nodes=7, depth=DEPTH)
    for row in range(3):
        best = sorted(all_scores(known_row(known), row).values(), reverse=True)[:7]
        assert sorted(found_in(candidates, row).values(), reverse=True)[:7] == pytest.approx(best, abs=1e-5)


def test_nothing_likely_leaves_no_prefix() -> None:
    candidates = expand(stepper(table(2, 0.1)), torch.tensor([9, 9]), nodes=5, depth=DEPTH, min_probability=0.9)
    assert candidates.tokens.shape == candidates.scores.shape == (2, 0)


def known_row(known):
    return {prefix: steps.log_softmax(-1) for prefix, steps in known.items()}


def test_a_large_vocabulary_against_tensor_operations() -> None:
    generator = torch.Generator().manual_seed(1)
    heads = 3.0 * torch.randn(4, 2, 500, generator=generator)
    mixed = torch.randn(500, 500, generator=generator)

    def step(prefixes, _places):
        return heads[prefixes.shape[2] - 1].unsqueeze(1) + mixed[prefixes[:, :, -1]]

    roots = torch.tensor([3, 400])
    fast, slow = expand(step, roots, nodes=32, depth=4), expand_statically(step, roots, 32, 4)
    for row in range(2):
        mine, theirs = found_in(fast, row), found_in(slow, row)
        best = dict(sorted(theirs.items(), key=lambda item: -item[1])[:32])
        assert {prefix: mine[prefix] for prefix in best} == pytest.approx(best, abs=1e-5)
