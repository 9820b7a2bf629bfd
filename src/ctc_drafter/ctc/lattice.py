"""CTC lattice: log-probabilities of blank and labels from frame logits and predictor bias.

Shape letters: N anchors, F frames, V vocabulary, U labels, P prefixes (U+1 along one label sequence).
A frame holds one of V tokens or a blank, and what it holds depends on the prefix emitted before it:

    P(v | t, p)     = exp(a[t, v] + m[p, v]) / Z(t, p)
    P(blank | t, p) = exp(blank[t]) / Z(t, p)
    Z(t, p)         = exp(blank[t]) + sum_v exp(a[t, v]) exp(m[p, v])

The sum is one matrix product for all (t, p), so [N, P, F, V] never exists. This is CTC (Graves et al.,
2006) with a prediction network that knows the prefix, as in transducers (Graves, 2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ctc_drafter.ctc.joint import JointTerms, joint_logits, value_at
from ctc_drafter.types import UserError


@dataclass(frozen=True)
class Lattice:
    """Log-probabilities along one label sequence y1..yU per anchor, float32 or float64.

    emit:  [N, U, F], log P(y_{u+1} | frame t, prefix y1..yu), u = 0..U-1.
    stay:  [N, U+1, F], log P(y_u | frame t, prefix y1..yu); row 0 is -inf: the root cannot be repeated.
    blank: [N, U+1, F], log P(blank | frame t, prefix y1..yu).
    others: [N, U, K, F], log P(v | frame t, prefix y1..yu) of K more tokens v after each prefix; None for none.
    """

    emit: torch.Tensor
    stay: torch.Tensor
    blank: torch.Tensor
    others: torch.Tensor | None = None


def lattice(
    frame_logits: torch.Tensor,
    blank_logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    others: torch.Tensor | None = None,
    joint: JointTerms | None = None,
) -> Lattice:
    """The lattice of each anchor's labels, in float64 if the frame logits are, else in float32.

    frame_logits: [N, F, V].
    blank_logits: [N, F].
    labels: int64 [N, U], below V; negative ones are padding, whose entries mean nothing.
    bias: [N, U+1, V], row u is added to every frame's token logits after prefix y1..yu; None for none.
    others: int64 [N, U, K], tokens whose probability after each prefix y1..yu, u < U, is asked for, too.
    joint: terms of frame and prefix together (`joint.py`), beside a bias; None for none.
    Differentiable once; autocast does not lower its precision. Raises UserError when the shapes do not match.
    """
    _check_shapes(frame_logits, blank_logits, labels, bias)
    dtype = torch.float64 if frame_logits.dtype == torch.float64 else torch.float32
    length = labels.shape[1]
    more = labels.new_zeros(*labels.shape, 0) if others is None else others
    labels, more = labels.clamp(min=0), more.clamp(min=0)
    blank = blank_logits.to(dtype)[:, None].expand(-1, length + 1, -1)
    frame_logits = frame_logits.to(dtype)
    if joint is not None:
        assert bias is not None
        together = joint_logits(frame_logits, bias.to(dtype), joint)
        frame_logits = frame_logits.scatter(2, joint.columns, -math.inf)  # the others
    if bias is None:
        log_sum, scores = _FrameSums.apply(frame_logits, torch.cat([labels, more.flatten(1)], 1))
        before, after, beside = 0.0, 0.0, 0.0
    else:
        log_sum, scores, biases = _BiasedSums.apply(frame_logits, bias.to(dtype), labels, more)
        before, after, beside = biases[:, :-1, :1], biases[:, 1:, 1:2], biases[:, :-1, 2:, None]
    if joint is not None:
        log_sum = torch.logaddexp(log_sum, together.logsumexp(-1))
    norm = torch.logaddexp(log_sum, blank)
    root = norm.new_full((norm.shape[0], 1, norm.shape[2]), -math.inf)
    emit, stay = scores[:, :length] + before, scores[:, :length] + after
    if others is not None:
        others = scores[:, length:].unflatten(1, more.shape[1:]) + beside
    if joint is not None:

        def instead(logits: torch.Tensor, prefixes: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
            found, known = value_at(prefixes, joint.columns, asked)
            return found.where(known, logits)

        emit, stay = instead(emit, together[:, :-1], labels), instead(stay, together[:, 1:], labels)
        if others is not None:
            each = zip(others.unbind(2), more.unbind(2), strict=True)
            others = torch.stack([instead(logits, together[:, :-1], asked) for logits, asked in each], 2)
    emit, stay = emit - norm[:, :-1], stay - norm[:, 1:]
    others = None if others is None else others - norm[:, :-1, None]
    return Lattice(emit, torch.cat([root, stay], 1), blank - norm, others)


def shifted_exp(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - shift) and the shift, the maximum over the last dimension, which is kept.

    A row of nothing but -inf gives zeros.
    """
    shift = logits.amax(-1, keepdim=True).clamp(min=-1e30)
    return (logits - shift).exp_(), shift


def biased_sums(frames: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """sum_v frames[n, t, v] * biases[n, p, v] as [N, P, F], for two results of `shifted_exp`.

    Held above a floor, which only matters when the best token's a + m lies 70 nats (float32) below the
    best a plus the best m: probabilities then come out too low, never above 1.
    """
    return _product(biases, frames.transpose(1, 2)).clamp_(min=sum_floor(frames.dtype))


def sum_floor(dtype: torch.dtype) -> float:
    # Its inverse times 1 times P must still be finite: the backward pass computes that.
    return torch.finfo(dtype).max ** -0.8


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return torch.bmm(left, right)


class _FrameSums(Function):
    """log sum_v exp(a[t, v]) as [N, 1, F], and a at the labels as [N, U, F].

    Written out, as is `_BiasedSums`, because the backward pass of gather would fill and add up one more
    [N, F, V] for each gather: this takes a third of the time.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        where = _at_labels(labels, logits.shape[1])
        exps, shift = shifted_exp(logits)
        sums = exps.sum(-1, keepdim=True).clamp_(min=sum_floor(exps.dtype))
        ctx.save_for_backward(exps, sums, where)
        return (sums.log() + shift).transpose(1, 2), logits.gather(2, where).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: torch.Tensor, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exps, sums, where = ctx.saved_tensors
        grad = exps * (grad_sums.transpose(1, 2) / sums)
        return grad.scatter_add_(2, where, grad_scores.transpose(1, 2)), None


class _BiasedSums(Function):
    """log sum_v exp(a[t, v] + m[u, v]) as [N, U+1, F]; a at the labels and at `more int64 [N, U, K]`, the tokens of
    all prefixes end to end, as [N, U+UK, F]; and m at the label after and before each prefix and at its `more` as
    [N, U+1, 2+K]; the first row has no label before, the last none after and no more."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, more: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        where = _at_labels(torch.cat([labels, more.flatten(1)], 1), logits.shape[1])
        pad = torch.nn.functional.pad
        around = torch.stack([pad(labels, (0, 1)), pad(labels, (1, 0))], -1)
        around = torch.cat([around, pad(more, (0, 0, 0, 1))], -1)
        exps, shift = shifted_exp(logits)
        bias_exps, bias_shift = shifted_exp(bias)
        sums = biased_sums(exps, bias_exps)
        ctx.save_for_backward(exps, bias_exps, sums, where, around)
        log_sums = sums.log() + bias_shift + shift.transpose(1, 2)
        return log_sums, logits.gather(2, where).transpose(1, 2), bias.gather(2, around)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_sums: torch.Tensor, grad_scores: torch.Tensor, grad_biases: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        exps, bias_exps, sums, where, around = ctx.saved_tensors
        weights = grad_sums / sums
        grad = _product(weights.transpose(1, 2), bias_exps).mul_(exps)
        grad_bias = _product(weights, exps).mul_(bias_exps)
        grad.scatter_add_(2, where, grad_scores.transpose(1, 2))
        return grad, grad_bias.scatter_add_(2, around, grad_biases), None, None


def _at_labels(labels: torch.Tensor, frames: int) -> torch.Tensor:
    return labels[:, None].expand(-1, frames, -1)


def _check_shapes(
    frame_logits: torch.Tensor, blank_logits: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> None:
    anchors, frames, vocab = frame_logits.shape
    length = labels.shape[-1]
    wanted = [("blank_logits", blank_logits, [anchors, frames]), ("labels", labels, [anchors, length])]
    if bias is not None:
        wanted.append(("bias", bias, [anchors, length + 1, vocab]))
    for name, tensor, shape in wanted:
        if list(tensor.shape) != shape:
            raise UserError(f"{name} has shape {list(tensor.shape)}; give it {shape} to match frame_logits and labels")
