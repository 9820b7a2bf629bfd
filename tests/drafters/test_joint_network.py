"""Joint terms and tied tables in a drafter: the same candidates by every search, and decoding as plain."""

import math

import pytest
import torch

from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.ctc.loss import prefix_log_probs
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.ctc_session import best_first, level_by_level
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.drafters.registry import fresh_drafter
from ctc_drafter.types import UserError
from helpers import VOCABULARY, paths, tiny_drafter, tiny_target

SIZES = {"joint_tokens": 5, "joint_rank": 3}
SOME = torch.arange(1, 90, 4)


def shaken(target, **sizes):
    """A drafter whose weights all matter."""
    drafter = tiny_drafter(target, **SIZES | sizes)
    if drafter.config.draft_vocab_size:
        drafter.draft_only(SOME)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return drafter.eval()


def drafted(drafter, target, nodes, search):
    """Candidates of two anchors with random block outputs."""
    torch.manual_seed(5)
    states, root = torch.randn(2, 1 + drafter.config.frames, drafter.config.hidden_size), torch.tensor([7, 33])
    given = drafter.predictor, drafter.joint, drafter.config.draft_length, target.embed, drafter.vocabulary
    made = search(*given, drafter.config.score_temperature)
    with torch.no_grad():
        return (
            made(*drafter.frame_logits(states, drafter.narrowed(target.head)), root, states, None, nodes, 0.0),
            states,
            root,
        )


@pytest.mark.parametrize(
    "sizes", [{}, {"predictor_tied": True}, {"draft_vocab_size": len(SOME), "predictor_tied": True}]
)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_searches_and_loss_agree(sizes, temperature):
    """Scores of the best-first search on a CPU are those of the other search and of the training lattice."""
    target = tiny_target()
    drafter = shaken(target, **sizes)
    drafter.config.score_temperature = temperature
    best, states, root = drafted(drafter, target, 12, best_first)
    levels, *_ = drafted(drafter, target, 40, level_by_level)
    for row in range(2):
        known = {prefix: math.log(probability) for prefix, probability in paths(levels, row).items()}
        for prefix, probability in paths(best, row).items():
            assert math.log(probability) == pytest.approx(known[prefix], abs=0.02)  # int8 in one of them
            tokens = torch.tensor([[root[row].item(), *prefix]])
            with torch.no_grad():
                scores = drafter.scores(states[row : row + 1], tokens, target.embed, target.head)
            frames, blanks, bias = (each / temperature for each in scores[:3])
            labels = drafter.columns(tokens[:, 1:])
            made = lattice(frames, blanks, labels, bias, None, scores[3].divided(temperature))
            assert prefix_log_probs(made, labels)[0, -1].item() == pytest.approx(known[prefix], abs=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_stays_plain_decodings(tied):
    target = tiny_target()
    drafter = shaken(target, predictor_tied=tied)
    for prompt in ([5, 9, 2], [8] * 12):
        expected = plain_generate(target, [prompt], max_new_tokens=24, eos=()).tokens
        assert generate(target, drafter, [prompt], max_new_tokens=24, eos=(), nodes=8).tokens == expected


def test_fresh_terms_change_nothing():
    """E starts at 0: so a drafter goes on as it was."""
    target = tiny_target()
    plain, joint = tiny_drafter(target), tiny_drafter(target, **SIZES)
    joint.load_state_dict(plain.state_dict(), strict=False)
    assert not joint.joint.token.weight.any()
    (first, *_), (second, *_) = (drafted(each, target, 12, best_first) for each in (plain, joint))
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.scores, second.scores)


@pytest.mark.parametrize("some", [None, [1, 2, 7, 8, 11]])
def test_tied_tables_are_maps_of_the_embedding(some):
    """A tied predictor is one with tables of its own that hold the maps' products; it starts as the other does."""
    torch.manual_seed(0)
    embed, head, vocabulary = torch.nn.Embedding(12, 6), torch.nn.Linear(6, 12, bias=False), None
    if some is not None:
        vocabulary = torch.tensor(some)
    head.weight = embed.weight
    tied, own = Predictor(12, 6, 3, 4, len(some or []), tied=True), Predictor(12, 6, 3, 4, len(some or []))
    for each in (tied, own):
        each.start_from(head, vocabulary)
    torch.testing.assert_close(tied.output_rows(embed, vocabulary), own.output.weight)
    with torch.no_grad():
        own.table.weight.copy_(embed.weight @ tied.table.weight.T)
        for name in ("previous", "last", "root", "inner"):
            own.get_submodule(name).load_state_dict(tied.get_submodule(name).state_dict())
        recent = torch.tensor([[[3, -1], [5, 3], [11, 5]]])
        start = torch.randn(1, 6)
        rows = tied.output_rows(embed, vocabulary)
        found = tied.search_bias(start, embed, rows=rows)(recent)
        torch.testing.assert_close(found, own.search_bias(start, embed, rows=own.output_rows(embed))(recent))
        for ours, theirs in zip(tied.tables(embed, vocabulary), own.tables(embed, vocabulary), strict=True):
            least = 1 if ours.dtype == torch.int8 else 1e-5  # one step of rounding
            torch.testing.assert_close(ours.float(), theirs.float(), atol=least, rtol=0)


def test_sizes_that_cannot_be():
    target = tiny_target()
    for sizes, why in (
        ({"joint_tokens": -1}, "give tokens from 0"),
        ({"joint_tokens": 4, "joint_rank": 0}, "a rank from 1"),
        ({"joint_tokens": 4, "predictor_rank": 0}, "joint terms need the predictor"),
        ({"joint_tokens": 4, "predictor_width": 0}, "joint terms need the predictor"),
    ):
        with pytest.raises(UserError, match=why):
            CTCDrafter.for_target(target.model.config, **sizes)


def test_a_frame_of_fewer_tokens_than_terms():
    target = tiny_target()
    drafter = fresh_drafter(target, None, 0, frames=3, draft_length=2, joint_tokens=2 * VOCABULARY, copies=0)
    found, *_ = drafted(drafter, target, 6, best_first)
    assert found.scores.isfinite().all()
