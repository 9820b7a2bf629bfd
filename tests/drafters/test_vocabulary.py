"""A drafter that drafts only some tokens: the same as one whose other tokens have no probability."""

import pytest
import torch

from ctc_drafter.ctc.kernels_cpu import bfloat16_bits
from ctc_drafter.ctc.loss import prefix_log_probs
from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.ctc.search_cpu import LowRankBias, best_prefixes
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.lm_head import Columns, columns_of, drafted_part, most_frequent, narrow_head
from ctc_drafter.drafters.trainable import LossInputs, LossOptions
from ctc_drafter.types import UserError
from helpers import VOCABULARY, tiny_drafter, tiny_target

SOME = torch.tensor([1, 2, 4])
TOKENS, FRAMES, RANK, WIDTH = 6, 4, 2, 3


def drafter_of_some(target, tokens, seed=0):
    drafter = tiny_drafter(target, seed, draft_vocab_size=len(tokens))
    drafter.draft_only(tokens)
    return drafter


def test_the_most_frequent_tokens():
    assert most_frequent(torch.tensor([3, 9, 0, 3, 5]), 3).tolist() == [0, 1, 4]
    with pytest.raises(UserError, match="a draft vocabulary of 6 tokens cannot be; give 1 to 5"):
        most_frequent(torch.zeros(5), 6)


def test_columns_and_where_a_draft_ends():
    columns = columns_of(torch.tensor([[1, 4, 2], [4, 5, 1], [0, 2, 2]]), SOME)
    assert columns.tolist() == [[0, 2, 1], [2, -1, 0], [-1, 1, 1]]
    valid = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    assert drafted_part(columns, valid).tolist() == [[True, True, False], [True, False, False], [False] * 3]


@pytest.mark.parametrize("bias", [True, False])
def test_a_narrow_head_gives_the_columns(bias):
    head, states = torch.nn.Linear(5, TOKENS, bias=bias), torch.randn(2, 5)
    expected = head(states)[:, SOME]
    torch.testing.assert_close(narrow_head(head, SOME)(states), expected)
    torch.testing.assert_close(Columns(head, SOME)(states), expected)


@pytest.mark.parametrize("root", [0, 2])
def test_searches_find_what_they_find_where_the_others_are_impossible(root):
    generator = torch.Generator().manual_seed(root)
    frames, blanks = (torch.randn(1, FRAMES, *more, generator=generator) for more in ((TOKENS,), ()))
    shapes = (TOKENS, RANK), (TOKENS, WIDTH), (TOKENS, WIDTH), (RANK, WIDTH)
    tables = [torch.randn(*shape, generator=generator).bfloat16().float() for shape in shapes]
    output = torch.randint(-3, 4, (RANK, TOKENS), generator=generator, dtype=torch.int8)
    states = torch.randn(1, WIDTH, generator=generator)
    impossible = torch.full_like(frames, -1e9)
    impossible[..., SOME] = frames[..., SOME]

    def both(logits, columns, vocabulary):
        first, earlier, later, inner = tables
        more = inner.numpy(), torch.ones(RANK).numpy(), output[:, columns].contiguous().numpy()
        low_rank = LowRankBias(first.numpy(), bfloat16_bits(earlier), bfloat16_bits(later), *more)
        roots = torch.tensor([root])
        first = best_prefixes(
            logits, blanks, roots, low_rank, states, count=20, depth=3, min_probability=1e-9, vocabulary=vocabulary
        )

        def bias(recent):
            last, previous = recent[..., 0], recent[..., 1]
            mixed = (
                tables[2][last] + states.unsqueeze(1) + tables[1][previous.clamp(min=0)] * (previous >= 0)[..., None]
            )
            return (tables[0][last] + torch.nn.functional.silu(mixed) @ tables[3].t()) @ output[:, columns].float()

        levels = prefix_search(logits, blanks, roots, bias, width=3, depth=3, vocabulary=vocabulary)
        return first, levels

    every, some = both(impossible, slice(None), None), both(frames[..., SOME].contiguous(), SOME, SOME)
    for whole, narrow in zip(every, some, strict=True):
        assert whole.tokens.shape == narrow.tokens.shape
        assert set(narrow.tokens.flatten().tolist()) <= set(SOME.tolist())
        for name in ("tokens", "parents", "depths"):
            assert torch.equal(getattr(whole, name), getattr(narrow, name))
        torch.testing.assert_close(whole.scores, narrow.scores)


@torch.inference_mode()
def test_the_loss_knows_the_probabilities_that_the_search_finds():
    target, tokens = tiny_target(), torch.arange(3, VOCABULARY, 4)
    drafter = drafter_of_some(target, tokens)
    state = prefill(target, [[5, 9, 11, 60]], drafter.feature_layers)
    root = torch.tensor([8])  # not drafted, but known to the predictor
    session = drafter.begin(target.embed, target.head, 1)
    session.extend(state.tokens, state.features, state.lengths)
    found = session.propose(root, 12)
    blocks = drafter.draft_states(
        torch.cat([state.features, state.features[:, :1]], 1),
        torch.cat([state.tokens, root[None]], 1),
        torch.tensor([[4]]),
        target.embed,
    )[0]
    for place in range(found.tokens.shape[1]):
        path, at = [], place
        while at >= 0:
            path.insert(0, int(found.tokens[0, at]))
            at = int(found.parents[0, at])
        prefixes = torch.tensor([[8, *path]])
        labels, valid = drafter.labels(prefixes, torch.ones(1, len(path), dtype=torch.bool))
        assert valid.all()
        score = prefix_log_probs(drafter.lattice(blocks, prefixes, target.embed, target.head), labels)[0, -1]
        # W2 in int8 and the head in bfloat16 move the search's scores a little.
        assert float(found.scores[0, place]) == pytest.approx(float(score.detach()), abs=0.05)


def test_labels_that_cannot_be_drafted_do_not_count():
    target, tokens = tiny_target(), torch.arange(0, VOCABULARY, 2)
    drafter = drafter_of_some(target, tokens)
    blocks = torch.randn(2, 6, 64)

    def losses(last):
        prefixes = torch.tensor([[8, 2, 4, last, 6], [8, 2, 4, 10, 6]])
        inputs = LossInputs(blocks, prefixes, torch.ones(2, 4, dtype=torch.bool))
        return drafter.loss(inputs, target.embed, target.head, LossOptions("prefix", 0.8))

    assert torch.equal(losses(11), losses(13))
    assert torch.equal(losses(11)[1], losses(10)[1])
    assert losses(11)[0] != losses(10)[0]
    losses(11).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in drafter.parameters())


def test_output_is_the_targets_and_drafts_are_of_the_vocabulary(tmp_path):
    target, tokens = tiny_target(), torch.arange(1, VOCABULARY, 3)
    drafter_of_some(target, tokens).save_pretrained(tmp_path)
    drafter = CTCDrafter.from_pretrained(tmp_path)
    assert torch.equal(drafter.vocabulary, tokens)
    prompts = [[3, 1, 4, 1], [5, 9]]
    expected = plain_generate(target, prompts, max_new_tokens=20).tokens
    assert generate(target, drafter, prompts, max_new_tokens=20, nodes=6, min_probability=0.0).tokens == expected
    half = CTCDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.vocabulary, tokens)


def test_a_vocabulary_larger_than_the_targets_is_refused():
    with pytest.raises(UserError, match="draft_vocab_size 98 must lie between 0 and 97"):
        tiny_drafter(tiny_target(), draft_vocab_size=98)


def test_a_pruned_drafter_is_the_whole_one_with_fewer_tokens(tmp_path):
    target, tokens = tiny_target(), torch.arange(2, VOCABULARY, 5)
    whole = tiny_drafter(target)
    pruned = whole.pruned(tokens)
    state = prefill(target, [[5, 9, 11]], whole.feature_layers)
    drafts = []
    for drafter in (whole, pruned):
        session = drafter.begin(target.embed, target.head, 1)
        session.extend(state.tokens, state.features, state.lengths)
        with torch.inference_mode():
            drafts.append(session.propose(torch.tensor([7]), VOCABULARY))
    firsts = [candidates.tokens[0][candidates.depths[0] == 1].tolist() for candidates in drafts]
    kept = [token for token in firsts[0] if token in set(tokens.tolist())]
    assert [token for token in firsts[1] if token in set(kept)] == kept  # a frame ranks them as before
    again = pruned.pruned(tokens[::2])
    assert torch.equal(again.vocabulary, tokens[::2])
    assert torch.equal(again.predictor.output.weight, whole.predictor.output.weight[tokens[::2]])
    with pytest.raises(UserError, match="does not draft some of these tokens"):
        pruned.pruned(torch.tensor([1, 2]))
