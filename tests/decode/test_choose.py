"""Choices along a tree, against asking the stock processors about every node's own history."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_accept import tree_of
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from ctc_drafter.decode.sampling import ARGMAX, Greedy, Sampled, gumbel
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.verify import follow

WORDS = 6
PROCESSORS = LogitsProcessorList(
    [
        RepetitionPenaltyLogitsProcessor(1.7),
        NoRepeatNGramLogitsProcessor(2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(4),
    ]
)


def history(tokens: list[int], parents: list[int], node: int) -> list[int]:
    return [] if node == 0 else [*history(tokens, parents, parents[node]), tokens[node]]


@st.composite
def trees(draw):
    """Tokens and parents of a random tree without twins."""
    size = draw(st.integers(1, 12))
    parents, tokens = [0], [draw(st.integers(0, WORDS - 1))]
    for node in range(1, size):
        parent = draw(st.integers(0, node - 1))
        siblings = {tokens[i] for i in range(1, node) if parents[i] == parent}
        free = [word for word in range(WORDS) if word not in siblings]
        if free:
            tokens.append(draw(st.sampled_from(free)))
            parents.append(parent)
        else:
            tokens.append(tokens[-1])
            parents.append(parents[-1])
    return tokens, parents


@settings(deadline=None, max_examples=75)
@given(
    trees(),
    st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=5),
    st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=4),
    st.sampled_from([None, 3, -8, 1 << 62]),
    st.integers(0, 10_000),
)
def test_every_node_on_the_way_has_its_own_history(drawn, prompt, emitted, seed, noise):
    tokens, parents = drawn
    tokens = [emitted[-1], *tokens[1:]]
    tree = tree_of(tokens, parents)
    logits = torch.randn(1, len(tokens), WORDS, generator=torch.Generator().manual_seed(noise)) * 2
    sampler = Greedy(PROCESSORS) if seed is None else Sampled([seed], PROCESSORS)
    target_tokens = sampler.sample_tree(tree, logits, [SequenceState(0, prompt, 99, tokens=list(emitted))])

    expected = []
    for node in range(len(tokens)):
        below = history(tokens, parents, node)
        scores = PROCESSORS(torch.tensor([prompt + emitted + below]), logits[:, node].clone())
        if seed is not None:
            place = torch.tensor([len(emitted) + len(below)])
            scores = scores + gumbel(torch.tensor([seed]), place, torch.arange(WORDS))
        expected.append(int(scores.argmax()))
    whole, walked = follow(tree, torch.tensor([expected])), follow(tree, target_tokens)
    count = int(whole.counts)
    assert walked.tokens[0, : count + 1].tolist() == whole.tokens[0, : count + 1].tolist()
    assert walked.counts.tolist() == [count]
    assert all(choice in (-1, right) for choice, right in zip(target_tokens[0].tolist(), expected, strict=True))


def test_nobody_is_asked_beyond_the_end_of_a_row():
    tree = tree_of([9, 1, 2, 3], [0, 0, 1, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]]), 10).float()
    asked = []

    def watch(text, scores):
        asked.append(text.tolist()[0])
        return scores

    for row in (SequenceState(0, [7], 3, tokens=[9]), SequenceState(0, [7], 99, frozenset({2}), tokens=[9])):
        asked.clear()
        assert Greedy(LogitsProcessorList([watch])).sample_tree(tree, logits, [row]).tolist() == [[1, 2, -1, -1]]
        assert asked == [[7, 9], [7, 9, 1]]
        assert row.tokens == [9]


def test_processors_see_the_padding_that_generate_gives():
    asked = []

    def watch(text, scores):
        asked.append(text.tolist())
        return scores

    rows = [SequenceState(0, [7], 9, given=[0, 0, 7], tokens=[5]), SequenceState(1, [7, 8], 9)]
    Greedy(LogitsProcessorList([watch])).sample(torch.zeros(2, 4), rows)
    assert asked == [[[0, 0, 7, 5]], [[7, 8]]]


def test_bare_argmax_is_the_logits_argmax():
    logits = torch.randn(2, 5, 7)
    tree = tree_of([1, 2, 3, 4, 5], [0] * 5)
    assert torch.equal(ARGMAX.sample_tree(tree, logits, []), logits.argmax(-1))
