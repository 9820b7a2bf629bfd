"""The offline β is what decoding gets: checked step by step against `generate`."""

import pytest
import torch

from ctc_drafter.decode.generate import generate
from ctc_drafter.decode.tree import build_tree
from ctc_drafter.train.data import DistilledDataset, collate
from ctc_drafter.train.objective import label_anchors
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.train.validate import UNRANKED, accepted_lengths, agreement, draft_positions, offline_beta, true_ranks
from ctc_drafter.types import Candidates, UserError
from train_helpers import pair, settings, written_rows

NODES = (1, 3, 8, 16)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory):
    """A target, its text, and a drafter that knows some of it."""
    target, drafter = pair()
    rows = written_rows(target, count=6, answer=40)
    out = tmp_path_factory.mktemp("learnt")
    train_drafter(target, drafter, rows, None, out, settings(steps=40, batch_size=3, save_every=100))
    return target, drafter, rows


def test_agreement_is_the_longest_right_path() -> None:
    # root 9 -> 1 -> (2 -> 4, 3); root -> 5 -> 2
    candidates = Candidates(
        tokens=torch.tensor([[1, 5, 2, 3, 2, 4]]),
        parents=torch.tensor([[-1, -1, 0, 0, 1, 2]]),
        depths=torch.tensor([[1, 1, 2, 2, 2, 3]]),
        scores=torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]]),
    )
    expected = {(1, 2, 4): 3, (1, 2, 7): 2, (1, 3, 4): 2, (5, 2, 4): 2, (5, 3, 4): 1, (2, 2, 4): 0}
    for truth, length in expected.items():
        whole = torch.tensor([[9, *truth]])
        assert agreement(build_tree(whole[:, 0], candidates, 6), whole).tolist() == [length]
    assert agreement(build_tree(torch.tensor([9]), candidates, 3), torch.tensor([[9, 1, 2, 4]])).tolist() == [2]


def test_padding_never_agrees() -> None:
    scores = torch.tensor([[-0.1, float("-inf")]])
    one = torch.tensor([[1, 2]])
    candidates = Candidates(one, torch.tensor([[-1, 0]]), one, scores)
    assert agreement(build_tree(torch.tensor([9]), candidates, 2), torch.tensor([[9, 1, 2]])).tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", NODES)
def test_steps_of_generate_are_the_offline_lengths(learnt, nodes: int) -> None:
    target, drafter, rows = learnt
    row = rows.rows[0]
    prompt, text = row.ids[: row.answer_start].tolist(), row.ids
    emitted: list[int] = []
    answer = len(text) - len(prompt)
    found = generate(
        target,
        drafter,
        [prompt],
        max_new_tokens=answer,
        nodes=nodes,
        min_probability=0.0,
        eos=(),
        on_tokens=lambda _row, tokens: emitted.append(len(tokens)),
    )
    assert found.tokens == [text[len(prompt) :].tolist()]

    positions = torch.arange(len(prompt), len(text)).unsqueeze(0)
    used = torch.ones_like(positions, dtype=torch.bool)
    anchors = label_anchors(text.long().unsqueeze(0), torch.tensor([len(text)]), positions, used, 4)
    features = target.hidden_features(text.long().unsqueeze(0), drafter.feature_layers)
    with torch.inference_mode():
        blocks = drafter.draft_states(features, text.long().unsqueeze(0), positions, target.embed)[0]
        heads = drafter.prepared(target.embed, target.head)
        candidates = drafter.candidates(blocks, anchors.prefixes[0, :, 0], heads, max(NODES))
    lengths = accepted_lengths(candidates, anchors.prefixes[0], NODES)[str(nodes)].tolist()

    steps, at = [], 0
    while at + 4 < answer:  # later drafts run into the end of the text
        steps.append(lengths[at] + 1)
        at += steps[-1]
    assert len(steps) > 3
    assert emitted[1 : 1 + len(steps)] == steps  # the first token came from the prefill


def test_beta_is_the_mean_over_positions(learnt) -> None:
    target, drafter, rows = learnt
    figures = offline_beta(target, drafter, rows, nodes=NODES, max_positions=10**6)
    beta = {name.removeprefix("beta_"): value for name, value in figures.items() if name.startswith("beta_")}
    assert 0 < figures["top_1"] < figures["top_5"] <= figures["top_10"] <= 1
    assert list(beta) == ["chain", *map(str, NODES)]
    assert 1.1 < beta["1"] < beta["3"] < beta["8"] < beta["16"]
    assert beta["1"] <= beta["chain"] <= beta["16"]
    pairs = draft_positions(rows, drafter, 10**6, 100, seed=0)
    assert len(pairs) == sum(len(row.ids) - row.answer_start - 4 for row in rows.rows)
    totals = dict.fromkeys(beta, 0)
    for index, position in pairs:
        batch = collate([rows[index]])
        place = torch.tensor([[position]])
        tokens = batch["input_ids"]
        features = target.hidden_features(tokens, drafter.feature_layers)
        with torch.inference_mode():
            block = drafter.draft_states(features, tokens, place, target.embed)[0]
            truth = tokens[:, position : position + 5]
            found = drafter.candidates(block, truth[:, 0], drafter.prepared(target.embed, target.head), max(NODES))
        for name, length in accepted_lengths(found, truth, NODES).items():
            totals[name] += int(length) + 1
    assert beta == pytest.approx({name: total / len(pairs) for name, total in totals.items()})


def test_ranks_of_the_true_tokens() -> None:
    """By hand: root -> a .5, b .3, c .2; a -> d .3, e .1; b -> f .25; nothing is known behind c and d."""
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.3, 0.1, 0.25, 0.0]]).log().expand(4, -1)
    shape = (torch.tensor([each]).expand(4, -1) for each in ([1, 2, 3, 4, 5, 6, 3], [-1, -1, -1, 0, 0, 1, 0]))
    candidates = Candidates(*shape, torch.tensor([[1, 1, 1, 2, 2, 2, 2]]).expand(4, -1), scores)
    truth = torch.tensor([[9, 1, 5, 1], [9, 2, 6, 1], [9, 3, 1, 1], [9, 7, 1, 1]])
    ranks = true_ranks(candidates, truth).tolist()
    assert sorted(ranks) == sorted([0, 1, 1, 0, 2, UNRANKED])
    assert true_ranks(candidates, torch.tensor([[9, 1, 3, 1]] * 4)).tolist() == [0] * 4 + [UNRANKED] * 4


def test_positions_are_capped_and_fixed_by_the_seed(learnt) -> None:
    target, drafter, rows = learnt
    first = draft_positions(rows, drafter, 20, 3, seed=0)
    assert len(first) == 20
    assert len({index for index, _ in first}) <= 3
    assert first == draft_positions(rows, drafter, 20, 3, seed=0) != draft_positions(rows, drafter, 20, 3, seed=1)
    drafter.train()
    offline_beta(target, drafter, rows, max_positions=5)
    assert drafter.training
    drafter.eval()


def test_answers_shorter_than_a_draft_are_refused(learnt) -> None:
    target, drafter, rows = learnt
    short = [type(row)(row.ids[: row.answer_start + 4], row.answer_start, row.key) for row in rows.rows]
    with pytest.raises(UserError, match="no held-out answer is longer than the 4 tokens"):
        offline_beta(target, drafter, DistilledDataset(short))
