"""CTC losses on the lattice: prefix likelihood and full sequence.

State u means "y1..yu emitted". blank_t(u) and token_t(u) are the probabilities of being there after frame
t with a blank or a token in it. The root counts as a blank frame: blank_0(0) = 1, so y1 may equal it.

    new_t(u+1) = [blank_{t-1}(u) + token_{t-1}(u) (y_{u+1} != y_u)] P(y_{u+1} | t, u)
    token_t(u) = new_t(u) + token_{t-1}(u) P(y_u | t, u)
    blank_t(u) = [blank_{t-1}(u) + token_{t-1}(u)] P(blank | t, u)
    prefix(u)  = sum_t new_t(u)

The forward recursion of CTC (Graves et al., 2006), with prefix probabilities as in its prefix search.
"""

from __future__ import annotations

import torch

from ctc_drafter.ctc.lattice import Lattice

# Stands for log 0. Finite, since the gradient of log(exp(-inf) + exp(-inf)) is NaN.
FLOOR = -1e30


def prefix_log_probs(lattice: Lattice, labels: torch.Tensor) -> torch.Tensor:
    """log prefix(u) for u = 1..U: the probability of all alignments whose collapse begins with y1..yu.

    labels: int64 [N, U], those of the lattice.
    Returns [N, U] in the lattice's dtype; `FLOOR`, without gradient, where no alignment reaches y1..yu.
    """
    new, *_ = _recursion(lattice, labels)
    return _hold(torch.logsumexp(new, -1))


def next_log_probs(lattice: Lattice, labels: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log of the probability that token v comes next after y1..yu, for the K tokens `others int64 [N, U, K]` of each
    u < U that the lattice was made for: prefix(u v) / prefix(u), `[N, U, K]`; and `prefix_log_probs`, `[N, U]`.

    `FLOOR`, or about that, where no alignment reaches y1..yu v.
    """
    new, _, mass, blank = _recursion(lattice, labels)
    assert lattice.others is not None
    prefixes = _hold(torch.logsumexp(new, -1))
    last = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-1)  # the root is no token that could be repeated
    repeats = (others == last.unsqueeze(-1)).unsqueeze(-1)
    standing = torch.where(repeats, blank.unsqueeze(2), mass.unsqueeze(2))
    joint = _hold(torch.logsumexp(standing + lattice.others, -1))
    before = torch.nn.functional.pad(prefixes[:, :-1], (1, 0))
    return joint - before.unsqueeze(-1), prefixes


def teacher_loss(
    lattice: Lattice,
    labels: torch.Tensor,
    valid: torch.Tensor,
    others: torch.Tensor,
    probabilities: torch.Tensor,
    decay: float = 0.8,
) -> torch.Tensor:
    """`prefix_loss` where the target's distribution takes the label's place in each of its factors.

    -log prefix(u) is the sum of -log P(y_i | y1..y(i-1)) for i up to u; here each is the cross-entropy between
    probabilities `[N, U, K]`, of the tokens `others int64 [N, U, K]` after y1..y(i-1), and the drafter's. Equal to
    `prefix_loss` where they are 1 for the label. Knowledge distillation: Hinton et al. (2015).
    """
    found, prefixes = next_log_probs(lattice, labels, others)
    counts = valid & (prefixes > FLOOR)
    weights = decay ** torch.arange(labels.shape[1], device=found.device, dtype=found.dtype) * counts
    total = weights.sum(1)
    factors = weights.flip(1).cumsum(1).flip(1) * counts  # of each factor: the weights of all prefixes that have it
    reachable = (found > FLOOR / 2) & counts.unsqueeze(-1)
    entropy = -(probabilities * found.where(reachable, 0.0)).sum(-1)
    return (factors * entropy).sum(1) / total.where(total > 0, 1.0)


def prefix_loss(lattice: Lattice, labels: torch.Tensor, valid: torch.Tensor, decay: float = 0.8) -> torch.Tensor:
    """Mean of -log prefix(u), weighted decay^(u-1), over the u that are valid and reachable.

    labels: int64 [N, U]. valid: bool [N, U], false where y_u is padding or must not count.
    Returns [N], in nats; 0, without gradient, for an anchor where no u counts.
    """
    scores = prefix_log_probs(lattice, labels)
    counts = valid & (scores > FLOOR)
    weights = decay ** torch.arange(labels.shape[1], device=scores.device, dtype=scores.dtype) * counts
    total = weights.sum(1)
    return -(weights * scores.where(counts, 0.0)).sum(1) / total.where(total > 0, 1.0)


def ctc_loss(lattice: Lattice, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """-log of the probability that the frames collapse to exactly y1..yU, with U = lengths of each anchor.

    labels: int64 [N, U]. lengths: int64 [N], 0 to U.
    Returns [N], in nats; 0, without gradient, where no alignment exists (too few frames), as
    `torch.nn.functional.ctc_loss` does with `zero_infinity=True`.
    """
    _, end, *_ = _recursion(lattice, labels)
    score = _hold(end.gather(1, lengths[:, None])[:, 0])
    return -score.where(score > FLOOR, 0.0)


def ctc_objective(lattice: Lattice, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The full-sequence CTC loss of as many labels as the frames can hold."""
    frames = lattice.emit.shape[-1]
    repeats = torch.zeros_like(labels)
    repeats[:, 1:] = (labels[:, 1:] == labels[:, :-1]).long()
    needed = torch.arange(1, labels.shape[1] + 1, device=labels.device) + repeats.cumsum(1)  # a repeat needs a blank
    return ctc_loss(lattice, labels, (valid & (needed <= frames)).sum(1))


def _recursion(lattice: Lattice, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """log new_t(u) for u = 1..U as [N, U, F]; log [blank_F(u) + token_F(u)] for u = 0..U as [N, U+1]; and before each
    frame t, for u = 0..U-1 as [N, U, F]: log [blank(u) + token(u)] and log blank(u)."""
    emits, stays, blanks = (part.clamp(min=FLOOR).unbind(-1) for part in (lattice.emit, lattice.stay, lattice.blank))
    differs = torch.ones_like(labels, dtype=torch.bool)
    differs[:, 1:] = labels[:, 1:] != labels[:, :-1]
    token = torch.full_like(lattice.blank[..., 0], FLOOR)
    blank = token.clone()
    blank[:, 0] = 0.0
    pad, news, masses, empties = torch.nn.functional.pad, [], [], []
    for emit, stay, empty in zip(emits, stays, blanks, strict=True):
        mass = torch.logaddexp(blank, token)
        masses.append(mass[:, :-1])
        empties.append(blank[:, :-1])
        new = torch.where(differs, masses[-1], empties[-1]) + emit
        blank = mass + empty
        token = torch.logaddexp(pad(new, (1, 0), value=FLOOR), token + stay)
        news.append(new)
    new, before, empty = (torch.stack(each, -1) for each in (news, masses, empties))
    return new, torch.logaddexp(blank, token), before, empty


def _hold(scores: torch.Tensor) -> torch.Tensor:
    # Half the floor tells sums that hold one from real log-probabilities.
    return scores.where(scores > FLOOR / 2, FLOOR)
