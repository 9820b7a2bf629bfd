import math

import pytest
import torch

from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.types import UserError

N, F, U, V = 3, 4, 3, 5


def example(dtype=torch.float64, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    labels = torch.tensor([[1, 1, 4], [0, 3, 3], [2, 0, 2]])
    return normal(N, F, V), normal(N, F), labels, normal(N, U + 1, V)


def dense(frame_logits, blank_logits, labels, bias):
    """The same from the [N, U+1, F, V+1] tensor that the lattice never makes."""
    if bias is None:
        bias = frame_logits.new_zeros(N, U + 1, V)
    tokens = frame_logits[:, None] + bias[:, :, None]
    blanks = blank_logits[:, None, :, None].expand(-1, U + 1, -1, -1)
    log_probs = torch.cat([tokens, blanks], -1).double().log_softmax(-1)
    at = labels[:, :, None, None].expand(-1, -1, F, 1)
    return log_probs[:, :-1].gather(3, at)[..., 0], log_probs[:, 1:].gather(3, at)[..., 0], log_probs[..., -1]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_dense_softmax(dtype, error, with_bias):
    frame_logits, blank_logits, labels, bias = example(dtype)
    bias = bias if with_bias else None
    found = lattice(frame_logits, blank_logits, labels, bias)
    emit, stay, blank = dense(frame_logits, blank_logits, labels, bias)
    assert found.emit.shape == (N, U, F)
    assert found.stay.shape == found.blank.shape == (N, U + 1, F)
    assert found.emit.dtype == found.stay.dtype == found.blank.dtype == dtype
    for ours, reference in ((found.emit, emit), (found.stay[:, 1:], stay), (found.blank, blank)):
        torch.testing.assert_close(ours.double().exp(), reference.exp(), rtol=0, atol=error)
        torch.testing.assert_close(ours.double(), reference, rtol=error, atol=error)
    assert (found.stay[:, 0] == -math.inf).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias):
    frame_logits, blank_logits, labels, bias = example()
    inputs = [frame_logits, blank_logits] + ([bias] if with_bias else [])

    def parts(frame_logits, blank_logits, bias=None):
        found = lattice(frame_logits, blank_logits, labels, bias)
        return found.emit, found.stay[:, 1:], found.blank

    assert torch.autograd.gradcheck(parts, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits_without_bias(scale):
    frame_logits, blank_logits, labels, _ = example(scale=scale)
    found = lattice(frame_logits, blank_logits, labels, None)
    emit, _, blank = dense(frame_logits, blank_logits, labels, None)
    torch.testing.assert_close(found.emit, emit)
    torch.testing.assert_close(found.blank, blank)


def test_far_apart_maxima_never_give_more_than_one_and_finite_gradients():
    """Frames and bias each rule out what the other wants: no shift by maxima can hold their product."""
    for gap in (20.0, 60.0, 90.0, 500.0):
        frame_logits = torch.full((1, 2, 3), -gap, requires_grad=True)
        bias = torch.full((1, 2, 3), -gap, requires_grad=True)
        with torch.no_grad():
            frame_logits[..., 0], bias[..., 1] = 0.0, 0.0
        blank_logits = torch.full((1, 2), -3 * gap, requires_grad=True)
        found = lattice(frame_logits, blank_logits, torch.tensor([[0]]), bias)
        assert (found.emit <= 1e-6).all()
        if gap <= 60:
            torch.testing.assert_close(found.emit, torch.full_like(found.emit, math.log(0.5)))
        (found.emit.sum() + found.blank.sum()).backward()
        for tensor in (frame_logits, bias, blank_logits):
            assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_impossible_tokens_and_frames(with_bias):
    frame_logits, blank_logits, labels, bias = example()
    frame_logits[0, 1, 1] = frame_logits[1, 2] = blank_logits[2, 0] = -math.inf
    inputs = [frame_logits.requires_grad_(), blank_logits.requires_grad_(), bias.requires_grad_()]
    found = lattice(inputs[0], inputs[1], labels, inputs[2] if with_bias else None)
    assert (found.emit[0, 0, 1], found.blank[2, 0, 0]) == (-math.inf, -math.inf)
    torch.testing.assert_close(found.blank[1, :, 2], torch.zeros(U + 1, dtype=torch.float64))
    sum(part[part.isfinite()].sum() for part in (found.emit, found.stay, found.blank)).backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in inputs)
    assert frame_logits.grad[0, 1, 1] == 0


def test_half_precision_and_autocast_are_raised_to_float32():
    frame_logits, blank_logits, labels, bias = (
        tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in example()
    )
    plain = lattice(frame_logits.float(), blank_logits.float(), labels, bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = lattice(frame_logits.requires_grad_(), blank_logits, labels, bias)
        found.emit.sum().backward()
    assert torch.equal(found.emit, plain.emit)
    assert torch.equal(found.blank, plain.blank)
    assert frame_logits.grad.dtype == torch.bfloat16


def test_negative_labels_are_padding():
    frame_logits, blank_logits, labels, bias = example()
    whole = lattice(frame_logits, blank_logits, labels, bias)
    labels[:, 2] = -100
    padded = lattice(frame_logits, blank_logits, labels, bias)
    assert torch.equal(padded.emit[:, :2], whole.emit[:, :2])
    assert torch.equal(padded.blank, whole.blank)
    assert padded.emit.isfinite().all()


def test_unlike_shapes_are_refused():
    frame_logits, blank_logits, labels, bias = example()
    with pytest.raises(UserError, match=r"bias has shape \[3, 3, 5\]; give it \[3, 4, 5\]"):
        lattice(frame_logits, blank_logits, labels, bias[:, 1:])
    with pytest.raises(UserError, match="blank_logits"):
        lattice(frame_logits, blank_logits[:, 1:], labels, None)
    with pytest.raises(UserError, match="labels"):
        lattice(frame_logits, blank_logits, labels[1:], None)
