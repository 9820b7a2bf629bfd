import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ctc_drafter.ctc.search import prefix_search
from ctc_oracle import prefix_probs, sequence_probs

B, F, V = 3, 4, 3
EVERYTHING = V**F
ERRORS = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
ROOTS = torch.tensor([2, 0, 1])


def logits(dtype=torch.float64, batch=B, frames=F, scale=1.5, seed=0):
    """Frame logits [B, F, V], blank logits [B, F], and the predictor's biases [1+V, V, V] by the last two tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, frames, V), (batch, frames), (1 + V, V, V)
    return [scale * torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def predictor(table):
    """A bias that depends on the two last tokens; row 0 of the table is for no token before the root."""

    return lambda recent: table[recent[..., 1] + 1, recent[..., 0]]


def expected(frame_logits, blank_logits, root, table):
    """Brute-force prefix probabilities of one row."""

    def bias(prefix):
        history = (-1, root, *prefix)
        return table[history[-2] + 1, history[-1]].tolist()

    known = None if table is None else cache(bias)
    return prefix_probs(sequence_probs(frame_logits.tolist(), blank_logits.tolist(), known))


def search(frame_logits, blank_logits, roots, table, **options):
    bias = None if table is None else predictor(table)
    return prefix_search(frame_logits, blank_logits, roots, bias, **options)


def found(candidates, row):
    """{prefix: log score} of a row's candidates; checks that the tree they spell out is well-formed."""
    tokens, parents, depths, scores = (
        getattr(candidates, name)[row].tolist() for name in ("tokens", "parents", "depths", "scores")
    )
    prefixes, result = [], {}
    for index, (token, parent, depth, score) in enumerate(zip(tokens, parents, depths, scores, strict=True)):
        assert -1 <= parent < index
        assert 0 <= token < V
        prefixes.append((*(prefixes[parent] if parent >= 0 else ()), token))
        assert not math.isnan(score)
        assert score <= (scores[parent] if parent >= 0 else 0.0)
        if score == -math.inf:
            continue
        assert depth == len(prefixes[index])
        assert prefixes[index] not in result
        result[prefixes[index]] = score
    return result


def assert_scores(result, reference, error):
    for prefix, score in result.items():
        assert math.exp(score) == pytest.approx(reference[prefix], rel=0, abs=error)
        assert score == pytest.approx(math.log(reference[prefix]), rel=0, abs=100 * error)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), ERRORS)
def test_unbounded_search_finds_every_prefix(dtype, error, with_bias):
    """Repeats and children equal to the root included; what cannot be aligned is padding."""
    frame_logits, blank_logits, table = logits(dtype)
    table = table if with_bias else None
    candidates = search(frame_logits, blank_logits, ROOTS, table, width=EVERYTHING, depth=F)
    assert candidates.scores.dtype == dtype
    assert candidates.tokens.dtype == candidates.parents.dtype == candidates.depths.dtype == torch.int64
    for row in range(B):
        reference = expected(frame_logits[row], blank_logits[row], ROOTS[row].item(), table)
        result = found(candidates, row)
        assert result.keys() == reference.keys()
        assert (ROOTS[row].item(),) in result
        assert_scores(result, reference, error)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_bounds_the_prefixes(depth):
    frame_logits, blank_logits, table = logits(seed=1)
    result = found(search(frame_logits, blank_logits, ROOTS, table, width=EVERYTHING, depth=depth), 0)
    reference = expected(frame_logits[0], blank_logits[0], ROOTS[0].item(), table)
    assert result.keys() == {prefix for prefix in reference if len(prefix) <= depth}
    assert_scores(result, reference, 1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), ERRORS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_narrow_search_keeps_exact_scores(width, dtype, error, with_bias):
    """A beam loses prefixes, never part of a prefix's probability, and keeps the best children of its parents."""
    frame_logits, blank_logits, table = logits(dtype, seed=2)
    table = table if with_bias else None
    candidates = search(frame_logits, blank_logits, ROOTS, table, width=width, depth=F)
    for row in range(B):
        reference = expected(frame_logits[row], blank_logits[row], ROOTS[row].item(), table)
        result = found(candidates, row)
        assert_scores(result, reference, error)
        beam = [()]
        for depth in range(1, F + 1):
            children = [(*prefix, token) for prefix in beam for token in range(V)]
            children = sorted((c for c in children if c in reference), key=reference.__getitem__, reverse=True)
            beam = children[:width]
            assert {prefix for prefix in result if len(prefix) == depth} == set(beam)


@pytest.mark.parametrize("width", [2, EVERYTHING])
def test_rows_are_independent(width):
    frame_logits, blank_logits, table = logits(seed=3)
    batch = search(frame_logits, blank_logits, ROOTS, table, width=width, depth=F)
    for row in range(B):
        one = slice(row, row + 1)
        alone = search(frame_logits[one], blank_logits[one], ROOTS[one], table, width=width, depth=F)
        assert found(batch, row) == pytest.approx(found(alone, 0), rel=1e-12, abs=1e-12)


def test_first_level_and_all_blank_sum_to_one():
    frame_logits, blank_logits, table = logits(seed=4)
    candidates = search(frame_logits, blank_logits, ROOTS, table, width=V, depth=1)
    biased = torch.cat([frame_logits + table[0, ROOTS][:, None], blank_logits[..., None]], -1)
    all_blank = biased.log_softmax(-1)[..., -1].sum(1).exp()
    torch.testing.assert_close(candidates.scores.exp().sum(1) + all_blank, torch.ones(B, dtype=torch.float64))


def test_repeats_need_a_blank_between():
    """One frame per token and no blanks: only alternating prefixes exist. Then with blanks, only repeats."""
    frame_logits = torch.zeros(1, 3, V, dtype=torch.float64)
    blank_logits = torch.full((1, 3), -math.inf, dtype=torch.float64)
    result = found(search(frame_logits, blank_logits, ROOTS[:1], None, width=EVERYTHING, depth=3), 0)
    alternating = [p for p in itertools.product(range(V), repeat=3) if p[0] != p[1] != p[2]]
    assert {prefix for prefix in result if len(prefix) == 3} == set(alternating)
    assert math.exp(result[0, 1, 0]) == pytest.approx(1 / 27)
    frame_logits[..., 1:] = -math.inf
    blank_logits[0, 1], frame_logits[0, 1] = 0.0, -math.inf
    result = found(search(frame_logits, blank_logits, ROOTS[:1], None, width=EVERYTHING, depth=3), 0)
    assert result == pytest.approx({(0,): 0.0, (0, 0): 0.0}, abs=1e-12)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_huge_logits_give_no_nan(scale):
    frame_logits, blank_logits, _ = logits(torch.float32, scale=scale, seed=7)
    for table in (None, logits(torch.float32, scale=scale, seed=8)[2]):
        candidates = search(frame_logits, blank_logits, ROOTS, table, width=8, depth=F)
        for row in range(B):
            found(candidates, row)


@pytest.mark.parametrize("gap", [40.0, 80.0, 90.0, 120.0])
def test_frames_and_predictor_that_rule_each_other_out(gap):
    """The best token's sum lies far below the best logit plus the best bias: underflow must not make mass."""
    frame_logits = torch.tensor([[[0.0, -gap, -3 * gap]] * 2])
    values = torch.tensor([-gap, 0.0, -3 * gap])
    candidates = prefix_search(
        frame_logits,
        torch.full((1, 2), -3 * gap),
        ROOTS[:1],
        lambda recent: values.expand(1, recent.shape[1], -1),
        width=3,
        depth=2,
    )
    result = found(candidates, 0)
    assert sum(math.exp(score) for prefix, score in result.items() if len(prefix) == 1) <= 1 + 1e-6
    if gap == 40:
        assert math.exp(result[0, 1]) == pytest.approx(0.25)


def test_nothing_waits_for_the_host():
    """Fake tensors have shapes and no values, so reading one would raise."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        frame_logits, blank_logits, table = logits()
        candidates = search(frame_logits, blank_logits, ROOTS, table, width=4, depth=F)
        assert candidates.scores.shape == candidates.tokens.shape == (B, 3 + 4 + 4 + 4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 4),
    width=st.integers(1, 30),
    depth=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    with_bias=st.booleans(),
)
def test_every_search_is_well_formed_and_exact(seed, frames, width, depth, scale, with_bias):
    """Depths beyond the frames and widths beyond the prefixes there are end in padding."""
    frame_logits, blank_logits, table = logits(batch=1, frames=frames, scale=scale, seed=seed)
    table = table if with_bias else None
    result = found(search(frame_logits, blank_logits, ROOTS[:1], table, width=width, depth=depth), 0)
    assert result
    assert_scores(result, expected(frame_logits[0], blank_logits[0], ROOTS[0].item(), table), 1e-12)
