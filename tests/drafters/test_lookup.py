"""Drafts copied from the text itself: what is found, how it is scored, and that output never changes."""

import itertools
import math
import random

import pytest
import torch

from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.drafters.prompt_lookup import PromptLookup, Text
from ctc_drafter.types import UserError
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 3, 1, 4], [2, 7, 2, 7, 2], [8]]


def drafted(
    text: list[int], root: int, nodes: int = 64, min_probability: float = 0.0, **options
) -> dict[tuple[int, ...], float]:
    """Prefix -> probability, in the order of the candidates."""
    target = tiny_target()
    session = PromptLookup(**options).begin(target.embed, target.head, 1)
    session.extend(torch.tensor([text]), None, torch.tensor([len(text)]))
    found = session.propose(torch.tensor([root]), nodes, min_probability)
    prefixes: list[tuple[int, ...]] = []
    for token, parent in zip(found.tokens[0].tolist(), found.parents[0].tolist(), strict=True):
        prefixes.append((*(prefixes[parent] if parent >= 0 else ()), token))
    assert found.depths[0].tolist() == [len(prefix) for prefix in prefixes]
    return dict(zip(prefixes, found.scores[0].exp().tolist(), strict=True))


def test_the_worked_example() -> None:
    a, b, c, d = range(4)
    found = drafted([a, b, c, a, b, d], a, longest=2)
    assert found[(b,)] == pytest.approx(1.8 / 3.8)
    assert found[(b, d)] == pytest.approx(1.8 / 3.8 * 1 / 2.8)
    assert found[(b, c)] == pytest.approx(1.8 / 3.8 * 0.8 / 2.8)
    assert list(found)[:2] == [(b,), (b, d)]


def test_the_longest_match_comes_first_and_shorter_ones_branch() -> None:
    found = drafted([1, 2, 3, 9, 2, 5, 1], 2)
    assert next(iter(found)) == (3,)
    assert found[(3,)] > found[(5,)] > 0


def test_a_whole_n_gram_must_agree() -> None:
    assert (9,) not in drafted([1, 2, 9, 3, 2], 4)
    assert drafted([1, 2, 3], 4) == {}


def brute_force(text: list[int], root: int, longest: int) -> dict[int, int]:
    """End of each earlier n-gram like the newest one -> how many tokens agree."""
    whole, found = [*text, root], {}
    for end in range(1, len(text) + 1):
        sizes = [n for n in range(1, min(longest, end) + 1) if whole[end - n : end] == whole[len(whole) - n :]]
        if sizes:
            found[end] = max(sizes)
    return found


@pytest.mark.parametrize("longest", [1, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 6, 7, 40])
def test_the_agreements_are_those_that_brute_force_finds(longest: int, size: int) -> None:
    generator = random.Random(size)
    text = [generator.randrange(2) for _ in range(size)]
    row = Text(longest)
    for token in text:
        row.extend([token])
    found, best = row.matches(1)
    wanted = brute_force(text, 1, longest)
    assert best == max(wanted.values(), default=0)
    assert {end for end, _ in found} <= wanted.keys()
    newest = [end for end in sorted(wanted, reverse=True) if wanted[end] == best][:16]
    assert [dict(found)[end] for end in newest] == pytest.approx([0.8**age for age in range(len(newest))])


def test_a_text_grows_beyond_its_room() -> None:
    text = [token for _ in range(9) for token in range(100)]
    assert next(iter(drafted(text, 0))) == (1,)


def test_copies_run_into_the_root_and_no_further() -> None:
    assert max(drafted([5, 6, 7], 5), key=len) == (6, 7, 5)
    assert max(drafted(list(range(20)), 3, draft_length=4), key=len) == (4, 5, 6, 7)


def test_the_longer_the_agreement_the_surer() -> None:
    scores = list(drafted(list(range(20)), 3).values())
    steps = [after / before for before, after in itertools.pairwise(scores)]
    assert steps == sorted(steps)
    assert drafted([1, 2, 3, 4, 5, 1, 2], 3)[(4,)] > drafted([1, 2, 3, 4, 5, 1, 7], 3)[(4,)]


def test_scores_are_a_distribution_that_leaves_something_to_other_tokens() -> None:
    torch.manual_seed(0)
    found = drafted(torch.randint(0, 3, (60,)).tolist(), 1, nodes=10**6, draft_length=4)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for prefix, score in found.items():
        below = sum(found[other] for other in found if len(other) == len(prefix) + 1 and other[: len(prefix)] == prefix)
        assert below < score
    assert sum(score for prefix, score in found.items() if len(prefix) == 1) < 1


def test_nodes_and_floor_keep_the_best() -> None:
    text = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    everything = drafted(text, 1, nodes=10**6)
    assert list(drafted(text, 1, nodes=5).items()) == list(everything.items())[:5]
    assert drafted(text, 1, min_probability=0.1) == {
        prefix: score for prefix, score in everything.items() if score >= 0.1
    }


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_prompt_lookup_never_changes_the_output(nodes: int, batch: int) -> None:
    target = tiny_target()
    expected = plain_generate(target, PROMPTS[:batch], max_new_tokens=24).tokens
    assert generate(target, PromptLookup(), PROMPTS[:batch], max_new_tokens=24, nodes=nodes).tokens == expected


def test_rows_that_join_and_leave_keep_their_own_text() -> None:
    target, drafter = tiny_target(), PromptLookup()
    expected = plain_generate(target, PROMPTS, max_new_tokens=24).tokens
    assert dict(generate_many(target, drafter, PROMPTS, in_flight=2, max_new_tokens=24)) == dict(enumerate(expected))
    session = drafter.begin(target.embed, target.head, 1)
    session.extend(torch.tensor([[1, 2]]), None, torch.tensor([2]))
    session.join(torch.tensor([[5, 6, 7], [5, 9, 0]]), None, torch.tensor([3, 2]))
    session.select(torch.tensor([2, 1, 0]))
    found = session.propose(torch.tensor([5, 5, 5]), 4)
    assert found.tokens[:, 0].tolist()[:2] == [9, 6]
    assert (found.scores[2] == -math.inf).all()


def test_repeated_text_is_accepted() -> None:
    """A target whose newest token decides nearly all writes in a cycle, which lookup must then follow."""
    target = tiny_target(initializer_range=0.02)
    text = plain_generate(target, PROMPTS[:1], max_new_tokens=60).tokens[0]
    assert len(set(itertools.pairwise(text))) < 12, "this target has no cycle; take another seed"
    assert (
        generate(target, PromptLookup(), PROMPTS[:1], max_new_tokens=60, nodes=10, min_probability=0.0).stats.beta > 3
    )


def test_bad_sizes_are_named() -> None:
    with pytest.raises(UserError, match="longest is 0; give at least 1"):
        PromptLookup(longest=0)
    with pytest.raises(UserError, match="draft_length is 0"):
        PromptLookup(draft_length=0)
