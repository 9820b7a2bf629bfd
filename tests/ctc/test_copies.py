import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.ctc.copies import Text, copies_at, find_copies, newest_tokens
from ctc_drafter.ctc.loss import prefix_log_probs
from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.ctc.search_cpu import best_prefixes
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.predictor import Predictor, low_rank_bias
from ctc_drafter.drafters.trainable import LossInputs, LossOptions
from ctc_drafter.train.objective import anchor_copies, dropped
from ctc_drafter.types import UserError
from ctc_oracle import prefix_probs, sequence_probs
from helpers import VOCABULARY, exact_in_tables, tiny_config, tiny_target, without_copies

A, B_, C, D = range(4)
V = 4


def copy_of(text, prefix, longest):
    """(token, length) by trying every place; text ends with the root."""
    whole, best = [*text, *prefix], (-1, 0)
    for place in range(len(text) - 1):
        length = 0
        while length < min(longest, place + 1) and whole[place - length] == whole[-1 - length]:
            length += 1
        if length and length >= best[1]:
            best = (text[place + 1], length)
    return best


def found(text, prefixes, longest):
    """What `find_copies` says of prefixes of one row, after `newest_tokens`."""
    depth = 1 + max(map(len, prefixes))
    recent = torch.tensor([[[*reversed(p), text[-1], *[-1] * (depth - 1 - len(p))] for p in prefixes]])
    row = Text(torch.tensor([[*text, 0, 0]]), torch.tensor([len(text) - 1]))
    newest = newest_tokens(row, recent, longest)
    copies = find_copies(row.tokens, row.ends.unsqueeze(1).expand(-1, len(prefixes)), newest)
    return list(zip(copies.tokens[0].tolist(), copies.lengths[0].tolist(), strict=True))


def test_the_example_of_the_docstring():
    text = [A, B_, C, A, B_]
    assert found(text, [[], [C], [B_, C], [B_, D]], 3) == [(C, 2), (A, 3), (A, 2), (-1, 0)]


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    prefixes=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=3),
    longest=st.integers(1, 5),
)
def test_every_place_was_tried(text, prefixes, longest):
    assert found(text, prefixes, longest) == [copy_of(text, prefix, longest) for prefix in prefixes]


@pytest.mark.parametrize("at_a_time", [1, 2**25])
def test_copies_of_a_text_for_training(at_a_time, monkeypatch):
    monkeypatch.setattr("ctc_drafter.ctc.copies.PLACES_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (2, 20), generator=generator)
    positions = torch.tensor([[0, 3, 12], [5, 11, 16]])
    copies = copies_at(tokens, positions, 3, 4)
    for row in range(2):
        for i, place in enumerate(positions[row].tolist()):
            for u in range(4):
                text, prefix = tokens[row, : place + 1].tolist(), tokens[row, place + 1 : place + 1 + u].tolist()
                assert tuple(copies[row, i, u].tolist()) == copy_of(text, prefix, 4)


LONGEST, WIDTH, RANK = 3, 5, 2


def problem(seed):
    """Frames of one row, blanks, a predictor that copies, its embedding, the root's block output, and a text."""
    torch.manual_seed(seed)
    predictor = Predictor(V, 6, RANK, WIDTH, copies=LONGEST)
    with torch.no_grad():
        for weight in predictor.parameters():
            weight.normal_()
    embed = torch.nn.Embedding(V, 6)
    exact_in_tables(predictor, embed)
    text = torch.randint(V, (1, 9))
    return 1.5 * torch.randn(1, 4, V), torch.randn(1, 4), predictor, embed, torch.randn(1, 6), text


def expected(frames, blanks, predictor, embed, start, text, keep=lambda token: True):
    """{prefix: probability} by brute force over alignments; the bias as the docstrings have it."""

    def bias(prefix):
        history = [int(text[0, -1]), *prefix]
        last = torch.tensor([[history[-1]]])
        previous = torch.tensor([[history[-2] if len(history) > 1 else -1]])
        state = predictor.root_state(start)
        values = predictor.output(predictor.state(previous, last, state, embed))[0, 0].clone()
        token, length = copy_of(text[0].tolist(), prefix, LONGEST)
        if length and keep(token):
            values[token] += predictor.copying(predictor.hidden(previous, last, state, embed))[0, 0, length - 1]
        return values.tolist()

    with torch.no_grad():
        return prefix_probs(sequence_probs(frames[0].tolist(), blanks[0].tolist(), bias))


def probabilities(candidates):
    paths, result = [], {}
    columns = (getattr(candidates, name)[0].tolist() for name in ("tokens", "parents", "scores"))
    for token, parent, score in zip(*columns, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
        result[paths[-1]] = math.exp(score)
    return result


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_both_searches_find_what_brute_force_finds(seed):
    frames, blanks, predictor, embed, start, text = given_ = problem(seed)
    whole, ends = Text(text, torch.tensor([8])), torch.tensor([text[0, -1]])
    reference = expected(*given_)
    bias = predictor.search_bias(start, embed, lambda tokens: tokens, whole)
    levels = probabilities(prefix_search(frames, blanks, ends, bias, width=64, depth=3))
    options = {"count": 9, "depth": 3, "min_probability": 1e-7, "text": whole}
    tables = low_rank_bias(predictor, embed)
    first = best_prefixes(frames, blanks, ends, tables, predictor.root_state(start), **options)
    for prefix, probability in levels.items():
        assert probability == pytest.approx(reference.get(prefix, 0), abs=2e-6)
    best = sorted((p for prefix, p in reference.items() if len(prefix) <= 3), reverse=True)
    assert list(probabilities(first).values()) == pytest.approx(best[: first.tokens.shape[1]], abs=2e-6)
    for prefix, probability in probabilities(first).items():
        assert probability == pytest.approx(reference.get(prefix, 0), abs=2e-6)


def copying_drafter(target, **sizes):
    torch.manual_seed(3)
    drafter = CTCDrafter.for_target(target.model.config, frames=5, draft_length=4, copies=4, **sizes)
    with torch.no_grad():
        drafter.predictor.copying.weight.normal_(std=0.3)
        drafter.predictor.copying.bias.fill_(8.0)
    return drafter.eval()


@torch.inference_mode()
@pytest.mark.parametrize("some", [False, True])
def test_the_loss_knows_the_probabilities_that_a_session_finds(some):
    target = tiny_target()
    drafter = copying_drafter(target, draft_vocab_size=VOCABULARY // 2 if some else 0)
    if some:
        drafter.draft_only(torch.arange(1, VOCABULARY, 2)[: VOCABULARY // 2])
    prompt = [5, 9, 11, 21, 7, 9, 11, 21, 3, 5]
    state = prefill(target, [prompt], drafter.feature_layers)
    session = drafter.begin(target.embed, target.head, 1)
    session.extend(state.tokens, state.features, state.lengths)
    root = torch.tensor([9])
    candidates = session.propose(root, 12)
    tokens = torch.cat([state.tokens, root[None]], 1)
    features = torch.cat([state.features, state.features[:, :1]], 1)
    blocks = drafter.draft_states(features, tokens, torch.tensor([[len(prompt)]]), target.embed)[0]
    copied = 0
    for path, probability in probabilities(candidates).items():
        text = torch.tensor([[*prompt, 9, *path, *[0] * (4 - len(path))]])
        copies = anchor_copies(drafter.config, text, torch.tensor([[len(prompt)]]))[0]
        copied += path[-1] == int(copies[0, len(path) - 1, 0])
        prefixes = torch.tensor([[9, *path]])
        lattice = drafter.lattice(blocks, prefixes, target.embed, target.head, copies[:, : 1 + len(path)])
        labels, _ = drafter.labels(prefixes, torch.ones(1, len(path), dtype=torch.bool))
        assert math.log(probability) == pytest.approx(float(prefix_log_probs(lattice, labels)[0, -1]), abs=0.05)
    assert copied >= (2 if some else 4)  # else this test would not notice


@torch.inference_mode()
def test_rows_that_come_and_go_keep_their_texts():
    target = tiny_target()
    drafter = copying_drafter(target)
    session = drafter.begin(target.embed, target.head, 2)

    def features(tokens):
        return torch.randn(*tokens.shape, target.hidden_size * len(drafter.feature_layers))

    for take, tokens, counts in (
        (session.extend, torch.tensor([[1, 2, 3], [4, 5, 0]]), [3, 2]),
        (session.join, torch.arange(300).unsqueeze(0), [300]),
        (session.extend, torch.tensor([[6], [7], [8]]), [1, 1, 0]),
    ):
        take(tokens, features(tokens), torch.tensor(counts))
    session.select(torch.tensor([2, 1]))
    root = torch.tensor([9, 10])
    session.propose(root, 4)
    text = session.text_up_to(root)
    rows = [row[: end + 1].tolist() for row, end in zip(text.tokens, text.ends.tolist(), strict=True)]
    assert rows == [[*range(300), 9], [4, 5, 7, 10]]


def test_the_loss_teaches_when_to_trust_copies():
    """Its gradient is what the loss changes by, for each length of agreement."""
    target = tiny_target()
    drafter = copying_drafter(target)
    tokens = torch.tensor([[5, 9, 11, 21, 7, 9, 11, 21, 3, 5, 9, 11]])
    blocks, copies = torch.randn(1, 6, 64), anchor_copies(drafter.config, tokens, torch.tensor([[5]]))[0]
    prefixes, valid = tokens[:, 5:10], torch.ones(1, 4, dtype=torch.bool)
    inputs = LossInputs(blocks, prefixes, valid, copies=copies)
    arguments = (inputs, target.embed, target.head, LossOptions("prefix", 0.8))
    drafter.loss(*arguments).sum().backward()
    trust, step = drafter.predictor.copying.bias, 0.05
    assert set(copies[0, :4, 1].tolist()) >= {1, 2, 3}
    for length in range(4):
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                trust[length] += sign * step
                around.append(float(drafter.loss(*arguments)))
                trust[length] -= sign * step
        assert float(trust.grad[length]) == pytest.approx((around[0] - around[1]) / (2 * step), rel=0.02, abs=1e-4)
    assert (trust.grad[:3].abs() > 1e-3).any()


def test_dropped_copies_are_none_at_all():
    """The loss of an anchor without its copies is that of a drafter that cannot copy; the share is kept."""
    target = tiny_target()
    drafter = copying_drafter(target)
    tokens = torch.tensor([[5, 9, 11, 21, 7, 9, 11, 21, 3, 5, 9, 11]])
    blocks, positions = torch.randn(1, 6, 64), torch.tensor([5])
    copies = anchor_copies(drafter.config, tokens, positions[None])[0]
    prefixes, valid = tokens[:, 5:10], torch.ones(1, 4, dtype=torch.bool)
    found = [
        each.loss(
            LossInputs(blocks, prefixes, valid, copies=mine), target.embed, target.head, LossOptions("prefix", 0.8)
        )
        for each, mine in ((drafter, dropped(copies, positions, 1.0)), (without_copies(drafter), None))
    ]
    torch.testing.assert_close(*found)
    assert torch.equal(dropped(copies, positions, 0.0), copies)
    many = dropped(torch.ones(4000, 5, 2, dtype=torch.long), torch.arange(4000), 0.25)
    assert float((many[:, 0, 1] == 0).double().mean()) == pytest.approx(0.25, abs=0.02)


def test_copies_need_the_predictor():
    for sizes in ({"predictor_width": 0}, {"predictor_rank": 0}, {"copies": -1}):
        with pytest.raises(UserError, match="copies"):
            CTCDrafter.for_target(tiny_config(), **({"copies": 4} | sizes))


@torch.inference_mode()
def test_without_copies_frames_are_the_same():
    target = tiny_target()
    whole = copying_drafter(target)
    plain, root, blocks = without_copies(whole), torch.tensor([9]), torch.randn(1, 6, 64)
    found = [each.candidates(blocks, root, each.prepared(target.embed, target.head), 8) for each in (whole, plain)]
    assert torch.equal(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0].scores, found[1].scores)
