"""Copies given to any drafter: the rule by hand and by brute force, when the network is asked, unchanged output."""

import heapq
import math
import random

import pytest
import torch

from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.drafters.copying import BOOST, LONGEST, UNSEEN, Copying, drafting_alone, innermost, with_copies
from ctc_drafter.drafters.copying_cpu import with_copied
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import trained_method
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.types import Candidates, UserError, padded
from helpers import paths, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 3, 1, 4], [2, 7, 2, 7, 2], [8]]
METHODS = ("medusa", "hydra", "dflash", "dspark", "eagle", "ctc-paper")


def copy_of(text: list[int], prefix: tuple[int, ...]) -> tuple[int, int]:
    """What follows the longest earlier agreement, the newest one among equals, and its length; places in the text."""
    whole, found = [*text, *prefix], (-1, 0)
    for place in range(len(text) - 1):
        length = 0
        while length < LONGEST and length <= place and whole[place - length] == whole[len(whole) - 1 - length]:
            length += 1
        if length and length >= found[1]:
            found = (text[place + 1], length)
    return found


def children(network: dict[tuple[int, ...], float], text: list[int], prefix: tuple[int, ...]) -> dict[int, float]:
    """P(token | prefix) of the tokens that the network or the text proposes, by the rule."""
    own = network.get(prefix, 0.0) if prefix else 1.0
    shares = {p[-1]: chance / own for p, chance in network.items() if p[:-1] == prefix and own}
    token, length = copy_of(text, prefix)
    if not length:
        return shares
    known = shares.get(token, min(UNSEEN, 1 - sum(shares.values())))
    known = min(max(known, 1e-6), 1 - 1e-6)
    odds = known / (1 - known) * BOOST * length
    chance = odds / (1 + odds)
    return {each: share * (1 - chance) / (1 - known) for each, share in shares.items()} | {token: chance}


def brute_force(network, text, nodes, depth) -> dict[tuple[int, ...], float]:
    """The `nodes` best prefixes: everything is unfolded whose parent is unfolded, likeliest first."""
    waiting, found = [(-1.0, ())], {}
    while waiting and len(found) < nodes + 1:
        negative, prefix = heapq.heappop(waiting)
        found[prefix] = -negative
        if len(prefix) < depth:
            for token, share in children(network, text, prefix).items():
                heapq.heappush(waiting, (negative * share, (*prefix, token)))
    del found[()]
    return found


def proposed(rng: random.Random, depth: int) -> dict[tuple[int, ...], float]:
    """Prefixes over few tokens with probabilities that a network could give."""
    found: dict[tuple[int, ...], float] = {}
    level = {(): 1.0}
    for _ in range(depth):
        below = {}
        for prefix, chance in level.items():
            weights = [rng.random() ** 3 for _ in range(5)]
            tokens = rng.sample(range(5), rng.randint(0, 3))
            below |= {(*prefix, token): chance * weights[token] / sum(weights) for token in tokens}
        found, level = found | below, below
    return found


def as_candidates(*rows: dict[tuple[int, ...], float]) -> Candidates:
    lines = []
    for row in rows:
        order = sorted(row, key=lambda prefix: (len(prefix), prefix))
        place = {prefix: index for index, prefix in enumerate(order)}
        lines.append([(p[-1], math.log(row[p]), place.get(p[:-1], -1), len(p)) for p in order])
    return padded(lines, torch.device("cpu"))


def test_the_worked_example():
    text, network = [1, 2, 3, 1, 2], {(3,): 0.2, (4,): 0.6, (4, 4): 0.3}
    found = paths(with_copied(as_candidates(network), [torch.tensor(text).numpy()], 4, 2, 0.0))
    odds = 0.25 * BOOST * 2
    assert found[(3,)] == pytest.approx(odds / (1 + odds))
    assert found[(4,)] == pytest.approx(0.6 * (1 / (1 + odds)) / 0.8)
    assert found[(4, 4)] == pytest.approx(found[(4,)] / 2)
    after = UNSEEN / (1 - UNSEEN) * BOOST * 3  # 1 2 3 agrees, and nobody else said anything
    assert found[(3, 1)] == pytest.approx(found[(3,)] * after / (1 + after))


@pytest.mark.parametrize("seed", range(8))
def test_the_best_prefixes_are_those_of_the_rule(seed: int):
    rng = random.Random(seed)
    networks = [proposed(rng, 3) for _ in range(3)]
    texts = [[rng.randrange(5) for _ in range(rng.choice([1, 4, 30]))] for _ in networks]
    if not any(networks):
        networks[0] = {(1,): 0.5}
    found = with_copied(as_candidates(*networks), [torch.tensor(t).numpy() for t in texts], 12, 4, 0.0)
    for row, (network, text) in enumerate(zip(networks, texts, strict=True)):
        expected = brute_force(network, text, 12, 4)
        mine = paths(found, row)
        assert sorted(mine.values()) == pytest.approx(sorted(expected.values()), rel=1e-4)
        least = min(expected.values(), default=0)
        sure = {prefix for prefix, chance in expected.items() if chance > least * 1.001}
        assert sure <= mine.keys()
        for prefix in sure:
            assert mine[prefix] == pytest.approx(expected[prefix], rel=1e-4)
            assert mine.get(prefix[:-1], 1.0) >= mine[prefix] * (1 - 1e-6)


def test_prefixes_below_the_floor_are_left_out():
    network = {(1,): 0.5, (2,): 0.04, (1, 3): 0.2}
    found = paths(with_copied(as_candidates(network), [torch.tensor([9]).numpy()], 9, 3, 0.1))
    assert found == pytest.approx({(1,): 0.5, (1, 3): 0.2})


def fresh(target, name: str):
    torch.manual_seed(0)
    return trained_method(name).drafter.for_target(target.config, draft_length=3).eval()


@pytest.mark.parametrize(("name", "batch"), [("dspark", 1), *((name, 3) for name in METHODS)])
def test_the_output_never_changes(name: str, batch: int):
    target = tiny_target(initializer_range=0.02)  # which writes in a cycle
    plain = plain_generate(target, PROMPTS[:batch], max_new_tokens=40)
    drafter = with_copies(fresh(target, name))
    found = generate(target, drafter, PROMPTS[:batch], max_new_tokens=40, nodes=16, min_probability=0.0)
    assert found.tokens == plain.tokens
    if batch == 1:
        assert max(found.accepted[0]) > 3  # copied without the network
    kept = generate(target, network_of(drafter), PROMPTS[:batch], max_new_tokens=40, nodes=16, min_probability=0.0)
    assert kept.tokens == plain.tokens
    assert max(map(max, kept.accepted)) == 3


def test_rows_that_join_and_leave():
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=12).tokens
    drafter = with_copies(fresh(target, "dspark"))
    found = dict(generate_many(target, drafter, PROMPTS, in_flight=2, max_new_tokens=12, min_probability=0.0))
    assert found == dict(enumerate(expected))


@torch.inference_mode()
def test_copies_help_a_network_that_knows_nothing():
    """Its own likeliest tokens are wrong; with copies, the chain of the text's repetition comes first."""
    target = tiny_target()
    drafter = Copying(fresh(target, "dflash"), 3, lookup_length=0)
    session = drafter.begin(target.embed, target.head, 1)
    text = [11, 12, 13, 14, 15, 16, 11, 12, 13]
    features = target.hidden_features(torch.tensor([text]), drafter.feature_layers)
    session.extend(torch.tensor([text]), features, torch.tensor([len(text)]))
    assert session.free(torch.tensor([14]), 8) is None
    found = session.propose(torch.tensor([14]), 8)
    assert next(iter(paths(found))) == (15,)
    assert found.tokens.shape == (1, 8)


def test_who_copies_and_who_does_not():
    target = tiny_target()
    ours, silent, peer = tiny_drafter(target, copies=4), tiny_drafter(target), fresh(target, "medusa")
    assert drafting_alone(PromptLookup()) is None
    assert with_copies(PromptLookup()) == PromptLookup()
    own = with_copies(ours)
    assert (own.config.copies, own.config.lookup_length) == (4, 15)
    assert with_copies(tiny_drafter(target, copies=4, lookup_length=7)).config.lookup_length == 7
    alone = drafting_alone(own)
    assert (alone.config.copies, alone.config.lookup_length) == (0, 0)
    assert (ours.config.copies, ours.config.lookup_length) == (4, 0)
    for each in (silent, peer):
        given = with_copies(each)
        assert isinstance(given, Copying)
        assert given.draft_length == each.config.draft_length
        assert innermost(given) is each is drafting_alone(given)
        assert with_copies(given) is given
    with pytest.raises(UserError, match="NoDrafter has no longest draft"):
        with_copies(NoDrafter())
    with pytest.raises(UserError, match="lookup_length is -1"):
        Copying(peer, 3, -1)


@torch.inference_mode()
def test_a_drafter_without_its_copies_drafts_as_if_it_knew_no_text():
    target = tiny_target()
    drafter = tiny_drafter(target, copies=4, lookup_length=9)
    text = torch.tensor([[3, 1, 4, 1, 5, 3, 1, 4]])
    features = target.hidden_features(text, drafter.feature_layers)
    session = drafting_alone(drafter).begin(target.embed, target.head, 1)
    session.extend(text, features, torch.tensor([8]))
    found = session.propose(torch.tensor([1]), 8)
    states = drafter.draft_states(
        torch.cat([features, features[:, :1]], 1),
        torch.tensor([[*text[0].tolist(), 1]]),
        torch.tensor([[8]]),
        target.embed,
    )
    heads = drafter.prepared(target.embed, target.head)
    expected = drafter.candidates(states[:, 0], torch.tensor([1]), heads, 8)
    assert torch.equal(found.tokens, expected.tokens)
