"""Fits the temperature of a drafter's scores on held-out text.

A tree takes the prefixes that its drafter finds likeliest. Where a drafter is too sure of itself, or not sure enough,
it goes too deep or too wide. Dividing its logits by one number, of the largest likelihood on text that it did not learn
from, is what usually repairs this (Guo et al., "On Calibration of Modern Neural Networks", 2017). The number is written
into the drafter's config.json and used for every draft; training and its loss know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ctc_drafter.drafters.lm_head import usual_chunk
from ctc_drafter.drafters.trainable import LossInputs, TrainableDrafter
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.objective import anchor_copies, label_anchors
from ctc_drafter.train.validate import draft_positions, position_batches

POSITIONS = 512  # anchors that the likelihood is taken at
TRIED = tuple(0.4 * (2.5 / 0.4) ** (i / 16) for i in range(17))  # evenly spaced by their logarithm


@torch.inference_mode()
def fit_temperature(
    target: Target,
    drafter: TrainableDrafter,
    held_out: DistilledDataset,
    *,
    positions: int = POSITIONS,
    batch_size: int = 8,
    seed: int = 0,
) -> float | None:
    """Sets `drafter.config.score_temperature` to what suits these rows, and returns it; None for methods without one.

    Every drafted token after a prefix of the text counts alike. Raises `UserError` if no row is longer than a draft.
    """
    device, training = target.device, drafter.training
    drafter.eval()
    total = torch.zeros(len(TRIED), dtype=torch.float64, device=device)
    size = usual_chunk(drafter.config.vocab_size, drafter.config.draft_length)
    chosen = draft_positions(held_out, drafter, positions, len(held_out), seed)
    for batch, of_rows in position_batches(held_out, chosen, batch_size):
        tokens, lengths = batch["input_ids"].to(device), batch["lengths"].to(device)
        places = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in of_rows], batch_first=True).to(device)
        counts = torch.tensor([len(each) for each in of_rows], device=device)
        used = torch.arange(places.shape[1], device=device) < counts.unsqueeze(1)
        anchors = label_anchors(tokens, lengths, places, used, drafter.config.draft_length)
        features = target.hidden_features(tokens, drafter.feature_layers)
        states = drafter.draft_states(features, tokens, places, target.embed)
        flat = anchors.flat
        copies = anchor_copies(drafter.config, tokens, places)
        known = flat(anchors.prefixes), flat(anchors.valid), None, None if copies is None else flat(copies)
        inputs = LossInputs(flat(states), *known)
        for part in inputs.split(size):
            found = drafter.log_likelihoods(part, target.embed, target.head, TRIED)
            if found is None:
                drafter.train(training)
                return None
            total += found
    drafter.train(training)
    drafter.config.score_temperature = round(likeliest(TRIED, total.tolist()), 3)
    return drafter.config.score_temperature


def likeliest(temperatures: Sequence[float], likelihoods: Sequence[float]) -> float:
    """The temperature at the top of a parabola through the best one tried and its neighbours, over the logarithm of the
    temperatures, which are evenly spaced there; the first or last one itself if it is the best."""
    best = max(range(len(temperatures)), key=lambda i: likelihoods[i])
    if best in (0, len(temperatures) - 1):
        return temperatures[best]
    left, top, right = likelihoods[best - 1 : best + 2]
    bend = left - 2 * top + right
    shift = 0.0 if bend == 0 else (left - right) / (2 * bend)
    step = math.log(temperatures[best + 1] / temperatures[best])
    return temperatures[best] * math.exp(shift * step)
