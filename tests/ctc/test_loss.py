import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.ctc.loss import FLOOR, ctc_loss, next_log_probs, prefix_log_probs, prefix_loss, teacher_loss
from ctc_oracle import prefix_probs, sequence_probs

F, V = 4, 3
ERRORS = [(torch.float32, 1e-6), (torch.float64, 1e-12)]


def logits(dtype=torch.float64, frames=F, scale=1.5, seed=0):
    """Frame logits [F, V], blank logits [F], and a bias for every prefix up to F tokens."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for length in range(frames + 1) for p in itertools.product(range(V), repeat=length)]
    table = {prefix: scale * torch.randn(V, generator=generator, dtype=dtype) for prefix in prefixes}
    tokens = scale * torch.randn(frames, V, generator=generator, dtype=dtype)
    return tokens, scale * torch.randn(frames, generator=generator, dtype=dtype), table


def oracle(tokens, blanks, table):
    bias = None if table is None else {prefix: row.tolist() for prefix, row in table.items()}.__getitem__
    return sequence_probs(tokens.tolist(), blanks.tolist(), bias)


def lattice_of(labels, tokens, blanks, table):
    """The lattice of every row of labels, over one block of frames."""
    count, length = labels.shape
    rows = [[table[tuple(y[:u])] for u in range(length + 1)] for y in labels.tolist()] if table else None
    bias = torch.stack([torch.stack(row) for row in rows]) if rows else None
    return lattice(tokens.expand(count, -1, -1), blanks.expand(count, -1), labels, bias)


def all_labels(length, vocab=V):
    labels = list(itertools.product(range(vocab), repeat=length))
    return torch.tensor(labels, dtype=torch.int64).reshape(vocab**length, length)


def test_worked_example():
    """Two frames over tokens a, b and the blank, by hand.

    frame 1: P(a), P(b), P(blank) = .5, .2, .3        frame 2: .1, .6, .3

    prefix(a)   = a in frame 1, or blank then a                    = .5 + .3 * .1      = .53
    prefix(ab)  = a then b                                         = .5 * .6           = .30
    prefix(aa)  = none: a repeat needs a blank in between          = 0
    exactly a   = aa, a blank, blank a                             = .05 + .15 + .03   = .23
    loss of ab with decay .8 = -(ln .53 + .8 ln .30) / 1.8
    """
    tokens = torch.tensor([[0.5, 0.2], [0.1, 0.6]], dtype=torch.float64).log().expand(2, -1, -1)
    blanks = torch.tensor([0.3, 0.3], dtype=torch.float64).log().expand(2, -1)
    labels = torch.tensor([[0, 1], [0, 0]])
    found = lattice(tokens, blanks, labels, None)
    prefixes = prefix_log_probs(found, labels)
    torch.testing.assert_close(prefixes.exp(), torch.tensor([[0.53, 0.30], [0.53, 0.0]], dtype=torch.float64))
    valid = torch.ones_like(labels, dtype=torch.bool)
    expected = [-(math.log(0.53) + 0.8 * math.log(0.30)) / 1.8, -math.log(0.53)]
    torch.testing.assert_close(prefix_loss(found, labels, valid).tolist(), expected)
    torch.testing.assert_close(ctc_loss(found, labels, torch.tensor([1, 0])).exp().tolist(), [1 / 0.23, 1 / 0.09])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), ERRORS)
def test_every_prefix_equals_brute_force(dtype, error, with_bias):
    """All labels, so repeats and every first token, the root's own too, are among them."""
    tokens, blanks, table = logits(dtype)
    table = table if with_bias else None
    expected = prefix_probs(oracle(tokens, blanks, table))
    labels = all_labels(F)
    found = prefix_log_probs(lattice_of(labels, tokens, blanks, table), labels)
    assert found.dtype == dtype
    for y, row in zip(labels.tolist(), found.double().exp().tolist(), strict=True):
        reference = [expected.get(tuple(y[: u + 1]), 0.0) for u in range(F)]
        assert row == pytest.approx(reference, rel=0, abs=error)
        assert row == pytest.approx(reference, rel=10 * error, abs=1e-30)  # small ones too


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), ERRORS)
def test_every_full_sequence_equals_brute_force(dtype, error, with_bias):
    tokens, blanks, table = logits(dtype, seed=1)
    table = table if with_bias else None
    expected = oracle(tokens, blanks, table)
    labels = all_labels(F)
    found = lattice_of(labels, tokens, blanks, table)
    for length in range(F + 1):
        losses = ctc_loss(found, labels, torch.full((len(labels),), length))
        for y, loss in zip(labels.tolist(), losses.double().tolist(), strict=True):
            if tuple(y[:length]) in expected:
                assert math.exp(-loss) == pytest.approx(expected[tuple(y[:length])], rel=0, abs=error)
                assert math.exp(-loss) == pytest.approx(expected[tuple(y[:length])], rel=10 * error, abs=0)
            else:
                assert loss == 0


@pytest.mark.parametrize("with_bias", [True, False])
def test_sequences_sum_to_one(with_bias):
    tokens, blanks, table = logits(seed=2)
    total = 0.0
    for length in range(F + 1):
        labels = all_labels(length)
        found = lattice_of(labels, tokens, blanks, table if with_bias else None)
        losses = ctc_loss(found, labels, torch.full((len(labels),), length))
        total += (-losses).exp()[losses > 0].sum().item()
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_ctc_loss_and_its_gradients_equal_torch(dtype, error):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(16, 8, 6, generator=generator, dtype=dtype, requires_grad=True)
    blanks = torch.randn(16, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(6, (16, 5), generator=generator)
    labels[:4, 1] = labels[:4, 0]
    labels[0] = 2  # five equal labels need nine frames
    lengths = torch.randint(6, (16,), generator=generator)
    lengths[0] = 5
    found = ctc_loss(lattice(tokens, blanks, labels, None), labels, lengths)
    log_probs = torch.cat([tokens, blanks[..., None]], -1).log_softmax(-1).transpose(0, 1)
    expected = torch.nn.functional.ctc_loss(
        log_probs, labels, torch.full((16,), 8), lengths, blank=6, reduction="none", zero_infinity=True
    )
    torch.testing.assert_close(found, expected, rtol=error, atol=error)
    weights = torch.rand(16, generator=generator, dtype=dtype)
    ours = torch.autograd.grad(found @ weights, [tokens, blanks])
    theirs = torch.autograd.grad(expected @ weights, [tokens, blanks])
    torch.testing.assert_close(ours, theirs, rtol=error, atol=error)


def loss_inputs(dtype=torch.float64, seed=4):
    """Repeats, an unreachable end, padding, and -inf logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([[0, 0, 0], [1, 2, 2], [2, 1, -100], [1, 0, 2]])
    tokens = torch.randn(4, F, V, generator=generator, dtype=dtype)
    blanks = torch.randn(4, F, generator=generator, dtype=dtype)
    bias = torch.randn(4, 4, V, generator=generator, dtype=dtype)
    return labels, tokens, blanks, bias


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias):
    labels, tokens, blanks, bias = loss_inputs()
    inputs = [tensor.requires_grad_() for tensor in ([tokens, blanks, bias] if with_bias else [tokens, blanks])]

    def losses(tokens, blanks, bias=None):
        found = lattice(tokens, blanks, labels, bias)
        lengths = (labels >= 0).sum(1)
        prefixes = prefix_log_probs(found, labels)
        return prefix_loss(found, labels, labels >= 0), ctc_loss(found, labels, lengths), prefixes[prefixes > FLOOR]

    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unreachable_prefixes_give_no_gradient_and_no_nan(dtype):
    labels, tokens, blanks, bias = loss_inputs(dtype)
    tokens[3, :, 0] = -math.inf  # y2 of the last row cannot be
    tokens[1, 2] = torch.finfo(dtype).min
    blanks[2, 1] = -math.inf
    inputs = [tensor.requires_grad_() for tensor in (tokens, blanks, bias)]
    found = lattice(tokens, blanks, labels, bias)
    scores = prefix_log_probs(found, labels)
    reachable = [[True, True, False], [True, True, True], [True, True, True], [True, False, False]]
    assert (scores > FLOOR).tolist() == reachable
    grads = torch.autograd.grad(scores[0, 2] + scores[3, 1:].sum(), inputs, retain_graph=True)
    assert all((grad == 0).all() for grad in grads)
    valid = labels >= 0
    loss = prefix_loss(found, labels, valid) + ctc_loss(found, labels, valid.sum(1))
    assert loss.isfinite().all()
    grads = torch.autograd.grad(loss.sum(), inputs)
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads)


def test_no_valid_label_costs_nothing():
    labels, tokens, blanks, bias = loss_inputs()
    tokens.requires_grad_()
    loss = prefix_loss(lattice(tokens, blanks, labels, bias), labels, torch.zeros_like(labels, dtype=torch.bool))
    assert (loss == 0).all()
    loss.sum().backward()
    assert (tokens.grad == 0).all()


def test_decay_and_valid_choose_the_weights():
    labels, tokens, blanks, bias = loss_inputs()
    found = lattice(tokens, blanks, labels, bias)
    scores = prefix_log_probs(found, labels)
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    loss = prefix_loss(found, labels, valid, decay=0.5)
    expected = torch.stack(
        [
            -(scores[0, 0] + 0.5 * scores[0, 1]) / 1.5,  # y3 is out of reach
            -(scores[1, 0] + 0.25 * scores[1, 2]) / 1.25,
            -(scores[2, 0] + 0.5 * scores[2, 1]) / 1.5,
            -scores[3, 2],
        ]
    )
    torch.testing.assert_close(loss, expected)


def test_more_labels_than_frames_and_none():
    tokens, blanks, _ = logits()
    labels = torch.tensor([[0, 1, 2, 1, 0, 2]])
    scores = prefix_log_probs(lattice(tokens[None], blanks[None], labels, None), labels)
    assert (scores > FLOOR).tolist() == [[True] * 4 + [False] * 2]
    empty = labels[:, :0]
    found = lattice(tokens[None], blanks[None], empty, None)
    assert prefix_log_probs(found, empty).shape == (1, 0)
    assert prefix_loss(found, empty, empty.bool()).tolist() == [0.0]
    torch.testing.assert_close(ctc_loss(found, empty, torch.tensor([0])), -found.blank[:, 0].sum(1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 6),
    scale=st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    with_bias=st.booleans(),
)
def test_prefix_probabilities_are_probabilities(seed, frames, scale, with_bias):
    """They never grow with u, the children of a prefix never exceed it, and level 1 and all-blank sum to 1."""
    tokens, blanks, table = logits(frames=frames, scale=scale, seed=seed)
    table = table if with_bias else None
    labels = all_labels(min(frames, 3))
    scores = prefix_log_probs(lattice_of(labels, tokens, blanks, table), labels)
    assert (scores <= 1e-12).all()
    assert (scores[:, 1:] <= scores[:, :-1] + 1e-12).all()
    if scores.shape[1] > 1:
        children = scores[:, 1].exp().reshape(V, V, -1)[..., 0].sum(1)
        assert (children <= scores[:, 0].exp().reshape(V, -1)[:, 0] + 1e-12).all()
    found = lattice_of(all_labels(1), tokens, blanks, table)
    first = prefix_log_probs(found, all_labels(1)).exp().sum()
    assert (first + found.blank[0, 0].sum().exp()).item() == pytest.approx(1, abs=1e-12)


def test_nothing_waits_for_the_host():
    """Fake tensors have shapes and no values, so reading one would raise."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        labels, tokens, blanks, bias = loss_inputs()
        inputs = [tensor.requires_grad_() for tensor in (tokens, blanks, bias)]
        found = lattice(*inputs[:2], labels, bias)
        loss = prefix_loss(found, labels, labels >= 0) + ctc_loss(found, labels, (labels >= 0).sum(1))
        loss.sum().backward()
        assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


# The target's distribution in the label's place.


def every_token(labels):
    return torch.arange(V).expand(*labels.shape, V)


@pytest.mark.parametrize("biased", [False, True])
def test_probabilities_of_the_next_token_by_brute_force(biased):
    """prefix(y1..yu v) / prefix(y1..yu) for every token v, the repeat of yu too."""
    tokens, blanks, table = logits()
    table = table if biased else None
    labels = all_labels(3)
    others = every_token(labels)
    bias = (
        torch.stack([torch.stack([table[tuple(y[:u])] for u in range(4)]) for y in labels.tolist()]) if table else None
    )
    count = len(labels)
    found = lattice(tokens.expand(count, -1, -1), blanks.expand(count, -1), labels, bias, others)
    ours, prefixes = next_log_probs(found, labels, others)
    torch.testing.assert_close(prefixes, prefix_log_probs(found, labels))
    known = prefix_probs(oracle(tokens, blanks, table)) | {(): 1.0}
    for row, y in enumerate(labels.tolist()):
        for u in range(3):
            before = known.get(tuple(y[:u]), 0.0)
            for v in range(V) if before else ():
                expected = known.get((*y[:u], v), 0.0) / before
                assert math.exp(float(ours[row, u, v])) == pytest.approx(expected, abs=1e-9)


def test_a_sure_teacher_is_the_label():
    tokens, blanks, table = logits()
    labels = all_labels(3)[4:20]
    bias = torch.stack([torch.stack([table[tuple(y[:u])] for u in range(4)]) for y in labels.tolist()])
    valid = torch.tensor([[True, True, True], [True, False, False]] * 8)
    leaves = [tokens.clone().requires_grad_(), bias.clone().requires_grad_()]
    given = leaves[0].expand(16, -1, -1), blanks.expand(16, -1), labels, leaves[1]
    sure = torch.zeros(16, 3, V, dtype=torch.float64).scatter_(2, labels.unsqueeze(-1), 1.0)
    taught = teacher_loss(lattice(*given, every_token(labels)), labels, valid, every_token(labels), sure)
    plain = prefix_loss(lattice(*given), labels, valid)
    torch.testing.assert_close(taught, plain)
    for ours, theirs in zip(
        torch.autograd.grad(taught.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_a_doubting_teacher():
    tokens, blanks, table = logits(frames=3)
    labels = torch.tensor([[0, 0], [1, 2]])
    bias = torch.stack([torch.stack([table[tuple(y[:u])] for u in range(3)]) for y in labels.tolist()])
    valid, others = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[[0, 2], [1, 0]], [[2, 1], [0, 2]]])
    doubt = torch.tensor([0.7, 0.3], dtype=torch.float64).expand(2, 2, 2)

    def loss(tokens, blanks, bias):
        found = lattice(tokens.expand(2, -1, -1), blanks.expand(2, -1), labels, bias, others)
        return teacher_loss(found, labels, valid, others, doubt)

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in (tokens, blanks, bias)))
