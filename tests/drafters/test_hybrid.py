"""Copied drafts before a network's: when it is asked, what it knows then, and that output never changes."""

import pytest
import torch

from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.drafters.base import LONGEST_PENDING, Committed
from ctc_drafter.drafters.ctc_session import CTCSession
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.types import Candidates, UserError, padded
from helpers import tiny_drafter, tiny_target, without_copies

PROMPTS = [[3, 1, 4, 1, 5, 3, 1, 4], [2, 7, 2, 7, 2], [8]]
TRAINED = 50  # the token that the scripted network drafts


class Recorded(CTCSession):
    """Its network drafts one token, and keeps what it is told."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.asked = 0
        self.told: list[list[int]] = []

    def take_in(self, committed: Committed) -> None:
        rows = zip(committed.tokens.tolist(), committed.counts.tolist(), strict=True)
        self.told += [row[:count] for row, count in rows]

    def draft(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        self.asked += 1
        return padded([[(TRAINED, -0.1, -1, 1)]] * len(root), root.device)


def session_of(*texts: list[int]) -> Recorded:
    target = tiny_target()
    drafter = tiny_drafter(target)
    session = Recorded(drafter, drafter.prepared(target.embed, target.head), len(texts), False, 15)
    width = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    session.extend(tokens, None, torch.tensor([len(text) for text in texts]))
    return session


def test_a_text_that_repeats_itself_is_copied_without_the_network():
    text = list(range(10, 30))
    session = session_of([*text, *text[:8]])
    found = session.propose(torch.tensor([text[8]]), 15, 0.1)
    assert found.tokens[0, :11].tolist() == text[9:20]
    assert session.asked == 0
    assert session.told == []


def test_the_network_drafts_where_nothing_agrees_and_knows_all_that_was_copied_before():
    text = list(range(10, 30))
    session = session_of([*text, *text[:8]])
    session.propose(torch.tensor([text[8]]), 15, 0.1)
    session.extend(torch.tensor([text[8:12]]), None, torch.tensor([4]))
    found = session.propose(torch.tensor([5]), 15, 0.1)
    assert found.tokens.tolist() == [[TRAINED]]
    assert session.told == [[*text, *text[:12]]]


def test_a_weak_agreement_is_not_enough():
    session = session_of([1, 2, 3, 9, 1])
    assert session.propose(torch.tensor([2]), 15, 0.1).tokens.tolist() == [[TRAINED]]
    assert session.asked == 1


def test_every_row_must_be_sure():
    text = list(range(10, 30))
    session = session_of([*text, *text[:8]], [1, 2, 3])
    assert session.propose(torch.tensor([text[8], 4]), 15, 0.1).tokens.tolist() == [[TRAINED]] * 2
    session.select(torch.tensor([0]))
    assert session.propose(torch.tensor([text[8]]), 15, 0.1).tokens[0, 0] == text[9]
    assert session.asked == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_never_changes_and_drafts_grow_longer_than_the_frames(batch):
    """A target whose newest token decides nearly all writes in a cycle, which is copied."""
    target = tiny_target(initializer_range=0.02)
    plain = plain_generate(target, PROMPTS[:batch], max_new_tokens=60).tokens
    drafter = tiny_drafter(target, copies=4, lookup_length=12)
    found = generate(target, drafter, PROMPTS[:batch], max_new_tokens=60, nodes=16, min_probability=0.0)
    assert found.tokens == plain
    if batch == 1:
        assert max(found.accepted[0]) > drafter.config.draft_length


@torch.inference_mode()
def test_rows_that_join_and_leave_keep_their_own_text():
    """Rows 1 and 2 of three, one of which came later, draft what fresh sessions of their texts do."""
    target = tiny_target()
    drafter = tiny_drafter(target, copies=4, lookup_length=12)
    generator = torch.Generator().manual_seed(0)
    width = len(drafter.feature_layers) * target.hidden_size
    texts = [[3, 1, 4, 1, 5, 9, 2, 6] * 2, [2, 7, 1, 8] * 4, [6, 1, 8, 0, 3, 3, 9, 8] * 2]
    features = torch.randn(3, 16, width, generator=generator)

    def told(rows, session=None):
        given = torch.tensor([texts[row] for row in rows]), features[rows], torch.full((len(rows),), 16)
        if session is None:
            session = drafter.begin(target.embed, target.head, len(rows))
            session.extend(*given)
        else:
            session.join(*given)
        return session

    session = told([2], told([0, 1]))
    session.select(torch.tensor([1, 2]))
    for root in ([2, 6], [50, 51]):  # the text goes on as it began, or it does not and the network is asked
        found = session.propose(torch.tensor(root), 8, 0.0)
        for place, row in enumerate((1, 2)):
            (alone,) = (told([row]).propose(torch.tensor(root[place : place + 1]), 8, 0.0),)
            kept = found.depths[place] > 0
            assert found.tokens[place][kept].tolist() == alone.tokens[0][alone.depths[0] > 0].tolist()


def test_output_stays_when_rows_join_and_leave():
    target = tiny_target(initializer_range=0.02)
    prompts = [*PROMPTS, [5, 5, 5], [1, 2]]
    expected = plain_generate(target, prompts, max_new_tokens=24).tokens
    ends = {expected[0][9], expected[1][4]}  # rows end at different steps, so that others join them
    expected = plain_generate(target, prompts, max_new_tokens=24, eos=tuple(ends)).tokens
    assert len({len(row) for row in expected[:2]}) == 2
    drafter = tiny_drafter(target, lookup_length=12)
    found = generate_many(target, drafter, prompts, in_flight=2, max_new_tokens=24, eos=tuple(ends))
    assert dict(found) == dict(enumerate(expected))


@torch.inference_mode()
def test_waiting_text_of_ragged_rows_is_taken_in_at_once():
    """What waited is what an eager session was told bit by bit."""
    target = tiny_target()
    drafter = tiny_drafter(target, copies=4)
    generator = torch.Generator().manual_seed(0)
    width = len(drafter.feature_layers) * target.hidden_size
    lazy, eager = (drafter.begin(target.embed, target.head, 2) for _ in range(2))
    for counts in ([5, 3], [1, 4], [1, 1], [2, 1]):
        tokens = torch.randint(0, 60, (2, max(counts)), generator=generator)
        features = torch.randn(2, max(counts), width, generator=generator)
        for session in (lazy, eager):
            session.extend(tokens, features, torch.tensor(counts))
        eager.catch_up()
    first, second = (session.propose(torch.tensor([7, 9]), 6, 0.0) for session in (lazy, eager))
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.scores, second.scores)


def test_scores_of_copies_are_what_lookup_says():
    text = list(range(10, 30)) * 2
    session = session_of(text[:28])
    target = tiny_target()
    alone = PromptLookup().begin(target.embed, target.head, 1)
    alone.extend(torch.tensor([text[:28]]), None, torch.tensor([28]))
    mine, its = (each.propose(torch.tensor([text[28]]), 8, 0.1) for each in (session, alone))
    assert mine.free
    assert torch.equal(mine.tokens, its.tokens)
    assert torch.equal(mine.scores, its.scores)


@torch.inference_mode()
def test_what_waits_does_not_grow_without_bounds():
    target = tiny_target()
    drafter = tiny_drafter(target)
    lazy = drafter.begin(target.embed, target.head, 1)
    width = len(drafter.feature_layers) * target.hidden_size
    for _ in range(LONGEST_PENDING // 100 + 1):
        lazy.extend(torch.zeros(1, 100, dtype=torch.long), torch.zeros(1, 100, width), torch.tensor([100]))
    assert lazy.pending == []


def test_measurements_ask_the_network():
    """Made-up text and chains of a search say nothing of copies; without them the network is the same."""
    drafter = tiny_drafter(tiny_target(), copies=4, lookup_length=9)
    network = network_of(drafter)
    assert (network.config.lookup_length, drafter.config.lookup_length) == (0, 9)
    assert network.predictor is drafter.predictor
    assert network_of(PromptLookup()) == PromptLookup()
    assert without_copies(drafter).config.lookup_length == 0


def test_a_negative_length_is_named():
    with pytest.raises(UserError, match="lookup_length is -1"):
        tiny_drafter(tiny_target(), lookup_length=-1)
