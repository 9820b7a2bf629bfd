"""The logits processors of transformers, applied to rows that are at different places in their text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as stock

from ctc_drafter.decode.rows import Row
from ctc_drafter.decode.state import snapshot
from ctc_drafter.types import UserError

# They look at the scores alone, so rows of any length go through them together.
BLIND_TO_TEXT = (
    stock.TemperatureLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.TopHLogitsWarper,
    stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper,
    stock.EpsilonLogitsWarper,
    stock.EtaLogitsWarper,
    stock.SuppressTokensLogitsProcessor,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
)

# Stock processors that are no function of one row's text and scores, and why.
REFUSED: dict[type, str] = {
    stock.UnbatchedClassifierFreeGuidanceLogitsProcessor: "runs the model itself; leave out guidance_scale",
    stock.ClassifierFreeGuidanceLogitsProcessor: "mixes rows of the batch; leave out guidance_scale",
    stock.SynthIDTextWatermarkLogitsProcessor: "keeps a state; leave out watermarking_config or use WatermarkingConfig",
    stock.EncoderRepetitionPenaltyLogitsProcessor: "is for encoders; leave out encoder_repetition_penalty",
    stock.EncoderNoRepeatNGramLogitsProcessor: "is for encoders; leave out encoder_no_repeat_ngram_size",
}


def process(processors: LogitsProcessorList, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Scores `float32 [R, V]` of each row's next token: what `generate` computes from logits `[R, V]`."""
    scores = logits.to(torch.float32, copy=True)
    texts: list[torch.Tensor] = []
    for processor in processors:
        if type(processor) in BLIND_TO_TEXT:
            scores = processor(torch.empty(len(rows), 0, dtype=torch.long, device=scores.device), scores)
            continue
        texts = texts or [torch.tensor([row.text], device=scores.device) for row in rows]
        each = zip(rows, texts, scores.split(1), strict=True)
        scores = torch.cat([for_row(processor, row.index)(text, own) for row, text, own in each])
    return scores


def for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """The processor for this row alone, where it has settings for each row of a batch."""
    if type(processor) is stock.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return stock.PrefixConstrainedLogitsProcessor(lambda _row, text: allowed(row, text), 1)
    if type(processor) is stock.RepetitionPenaltyLogitsProcessor and torch.is_tensor(processor.prompt_ignore_length):
        single = copy.copy(processor)
        single.prompt_ignore_length = int(processor.prompt_ignore_length[row])
        return single
    return processor


def refuse_unsuitable(processors: LogitsProcessorList) -> None:
    """Raises `UserError` for stock processors that rows of different lengths cannot share."""
    for processor in processors:
        if type(processor) in REFUSED:
            raise UserError(f"{type(processor).__name__} {REFUSED[type(processor)]}")


def refuse_changing(processors: LogitsProcessorList, row: Row, logits: torch.Tensor) -> None:
    """Asks the user's own processors twice the same about this row, logits `[1, V]`. Raises `UserError` if they change.

    A token tree needs processors that are functions of a row's text and scores, as all stock ones are: the text
    may branch, and rows are not always the same ones. State that has changed is noticed wherever it lies
    (`state.py`), though it may not show in the scores yet.
    """
    text = torch.tensor([row.text], device=logits.device)
    for processor in processors:
        users: Any = processor
        if type(processor) is stock.PrefixConstrainedLogitsProcessor:
            users = processor._prefix_allowed_tokens_fn
        elif type(processor).__module__ == stock.__name__:
            continue
        alone = for_row(processor, row.index)
        scores = logits.to(torch.float32)
        first = alone(text.clone(), scores.clone())
        before = snapshot(users)
        try:
            again = alone(text.clone(), scores.clone())
            same = snapshot(users) == before and torch.equal(again, first)
            beside = alone(text.repeat(2, 1), scores.repeat(2, 1)) if same else first
            same = same and torch.equal(beside, first.repeat(2, 1))
        except Exception as error:
            raise changing(users) from error
        if not same:
            raise changing(users)


def changing(thing: Any) -> UserError:
    return UserError(
        f"{name_of(thing)} keeps a state or looks at a row's place in the batch; "
        "make it a function of the text and scores of each row"
    )


def name_of(thing: Any) -> str:
    """Of a function its own name, else that of the class."""
    return getattr(thing, "__name__", None) or type(thing).__name__
