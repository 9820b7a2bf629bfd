"""What a predictor starts from: the main directions of the target's LM head."""

import pytest
import torch

from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.drafters.registry import choose_vocabulary, fresh_drafter
from helpers import VOCABULARY, tiny_target

TOKENS, HIDDEN, RANK = 12, 6, 3


def nearest(rows, rank):
    """The nearest matrix of a rank, and what a token's bias is made of: products of rows along the main directions."""
    centred = rows - rows.mean(0)
    left, strengths, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = left[:, :rank] * strengths[:rank]
    return kept @ kept.T


def fitted(vectors, rows):
    """The affine map of vectors that is nearest to rows, at the vectors."""
    with_one = torch.cat([vectors, torch.ones(len(vectors), 1)], 1)
    return with_one @ torch.linalg.pinv(with_one) @ rows


@pytest.mark.parametrize("some", [None, [1, 2, 7, 8, 11]])
def test_the_output_matrix_is_the_nearest_of_its_rank(some):
    torch.manual_seed(0)
    head, vocabulary = torch.nn.Linear(HIDDEN, TOKENS), None if some is None else torch.tensor(some)
    rows = head.weight.detach()[some or slice(None)]
    predictor = Predictor(TOKENS, HIDDEN, RANK, 4, draft_vocab_size=len(rows))
    predictor.start_from(head, vocabulary)
    output = predictor.output.weight.detach()
    torch.testing.assert_close(output @ output.T, nearest(rows, RANK), atol=1e-5, rtol=1e-4)


def test_a_rank_above_the_hidden_size_leaves_the_rest_as_it_is():
    torch.manual_seed(0)
    head, predictor = torch.nn.Linear(HIDDEN, TOKENS), Predictor(TOKENS, HIDDEN, HIDDEN + 2, 4)
    before = predictor.output.weight.detach().clone()
    predictor.start_from(head)
    assert torch.equal(predictor.output.weight[:, HIDDEN:], before[:, HIDDEN:])
    output = predictor.output.weight.detach()[:, :HIDDEN]
    torch.testing.assert_close(output @ output.T, nearest(head.weight.detach(), HIDDEN), atol=1e-5, rtol=1e-4)


def test_a_quantised_head_changes_nothing():
    predictor = Predictor(TOKENS, HIDDEN, RANK, 4)
    before = predictor.output.weight.detach().clone()
    predictor.start_from(torch.nn.Identity())
    assert torch.equal(predictor.output.weight, before)


@torch.no_grad()
def test_fresh_drafters_start_so():
    target = tiny_target()
    rows, sizes = target.head.weight.detach().float(), {"predictor_rank": RANK, "predictor_tied": False}
    output = fresh_drafter(target, None, 0, **sizes).predictor.output.weight
    own = output
    torch.testing.assert_close(output @ output.T, nearest(rows, RANK), atol=1e-5, rtol=1e-3)

    narrow = fresh_drafter(target, None, 0, draft_vocab_size=9, **sizes)
    counts = torch.zeros(VOCABULARY, dtype=torch.long)
    counts[5:30:3] = 1
    choose_vocabulary(narrow, counts, target.head)
    output = narrow.predictor.output.weight
    torch.testing.assert_close(output @ output.T, nearest(rows[5:30:3], RANK), atol=1e-5, rtol=1e-3)

    tied = fresh_drafter(target, None, 0, predictor_rank=RANK).predictor
    assert tied.tied
    torch.testing.assert_close(tied.output_rows(target.embed), fitted(target.embed.weight, own), atol=1e-4, rtol=1e-3)

    sizes = {"predictor_rank": RANK}
    ours, theirs = (fresh_drafter(target, None, 0, "dspark", predictor_width=width, **sizes) for width in (8, 0))
    output = ours.predictor.output.weight
    torch.testing.assert_close(output @ output.T, nearest(rows, RANK), atol=1e-5, rtol=1e-3)
    output = theirs.predictor.output.weight
    assert not torch.allclose(output @ output.T, nearest(rows, RANK), atol=1e-2, rtol=1e-1)
