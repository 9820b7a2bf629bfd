"""Brute force CTC: every alignment of F frames over V tokens and the blank, one after the other.

Numbers are Python floats (64 bits). Tokens are 0..V-1, the blank is V.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

Prefix = tuple[int, ...]
PrefixBias = Callable[[Prefix], Sequence[float]]  # the bias of each token after this collapsed prefix


def sequence_probs(
    frame_logits: Sequence[Sequence[float]], blank_logits: Sequence[float], bias: PrefixBias | None = None
) -> dict[Prefix, float]:
    """Probability of every full collapsed sequence."""
    vocab = len(frame_logits[0])
    known: dict[tuple[int, Prefix], list[float]] = {}

    def distribution(frame: int, prefix: Prefix) -> list[float]:
        if (frame, prefix) not in known:
            extra = bias(prefix) if bias else [0.0] * vocab
            logits = [a + m for a, m in zip(frame_logits[frame], extra, strict=True)] + [blank_logits[frame]]
            top = max(logits)
            exps = [math.exp(logit - top) for logit in logits]
            known[frame, prefix] = [value / math.fsum(exps) for value in exps]
        return known[frame, prefix]

    terms = defaultdict(list)
    for alignment in itertools.product(range(vocab + 1), repeat=len(frame_logits)):
        probability, prefix, before = 1.0, (), vocab
        for frame, symbol in enumerate(alignment):
            probability *= distribution(frame, prefix)[symbol]
            if symbol not in (vocab, before):
                prefix += (symbol,)
            before = symbol
        terms[prefix].append(probability)
    return {prefix: math.fsum(values) for prefix, values in terms.items()}


def prefix_probs(sequences: dict[Prefix, float]) -> dict[Prefix, float]:
    """From `sequence_probs`, the probability that the sequence begins with each prefix; () is left out."""
    terms = defaultdict(list)
    for sequence, probability in sequences.items():
        for length in range(1, len(sequence) + 1):
            terms[sequence[:length]].append(probability)
    return {prefix: math.fsum(values) for prefix, values in terms.items()}


# Frames to tokens: repeats merge, blanks vanish.


def collapse(frames: torch.Tensor, blank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Collapses alignments to the token sequences they stand for.

    A frame starts a token when it is not blank and differs from the frame before it. Before the first
    frame lies the root, which counts as a blank frame: the first token may equal the root.

    frames: int64 [..., F], token ids or `blank`.
    Returns tokens `int64 [..., F]`, left-aligned and padded with -1, and lengths `int64 [...]`.

    >>> collapse(torch.tensor([7, 7, 9, 7, 9, 9]), blank=9)
    (tensor([ 7,  7, -1, -1, -1, -1]), tensor(2))
    """
    before = torch.nn.functional.pad(frames[..., :-1], (1, 0), value=blank)
    starts = (frames != blank) & (frames != before)
    # Frames that start nothing go to a spare last column.
    slots = torch.where(starts, starts.cumsum(-1) - 1, frames.shape[-1])
    tokens = frames.new_full((*frames.shape[:-1], frames.shape[-1] + 1), -1).scatter(-1, slots, frames)
    return tokens[..., :-1], starts.sum(-1)
