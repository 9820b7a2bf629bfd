"""transformers' logits processors and stopping criteria, applied sequence by sequence."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import random
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CellType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as stock
from transformers.generation import stopping_criteria as stock_criteria

from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.types import UserError

# The logits processors of transformers, applied to rows that are at different places in their text.

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


class OfText(LogitsProcessor):
    """A processor that is a function of text and scores, though it remembers what it was asked last, to answer sooner.
    Rows do not share it."""


@dataclass(frozen=True)
class CountPenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which transformers lacks: scores less `presence` for each token that
    the text holds from place `start` on, and less `frequency` for each time that it does."""

    start: int
    presence: float = 0.0
    frequency: float = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.start :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def process(processors: LogitsProcessorList, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
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


def refuse_changing(processors: LogitsProcessorList, row: SequenceState, logits: torch.Tensor) -> None:
    """Asks the user's own processors twice the same about this row, logits `[1, V]`. Raises `UserError` if they change.

    A token tree needs processors that are functions of a row's text and scores, as all stock ones are: the text
    may branch, and rows are not always the same ones. State that has changed is noticed wherever it lies
    (`snapshot`), though it may not show in the scores yet.
    """
    text = torch.tensor([row.text], device=logits.device)
    for processor in processors:
        users: Any = processor
        if type(processor) is stock.PrefixConstrainedLogitsProcessor:
            users = processor._prefix_allowed_tokens_fn
        elif type(processor).__module__ == stock.__name__ or isinstance(processor, OfText):
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
    """Name of a function, else of the object's class."""
    return getattr(thing, "__name__", None) or type(thing).__name__


# Stopping criteria of transformers, applied to each row alone, and those that cannot be.


def end_tokens(criteria: StoppingCriteriaList) -> list[int]:
    """In the order in which they were given."""
    found = (each.eos_token_id.flatten().tolist() for each in criteria if type(each) is EosTokenCriteria)
    return [token for tokens in found for token in tokens]


def fills_up(criteria: StoppingCriteriaList) -> bool:
    """Whether rows that ended are filled up with pad tokens. Otherwise `generate` writes on until all have ended."""
    return any(hasattr(each, "eos_token_id") for each in criteria)


def remaining(criteria: StoppingCriteriaList, scored: bool) -> StoppingCriteriaList:
    """Criteria less those that rows handle themselves. scored: whether `generate` would show the scores to them."""
    kept = [each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
    return StoppingCriteriaList([Unscored(each) for each in kept] if scored else kept)


class NoScores:
    """Stands for the scores, which rows of a token tree cannot show to criteria while they are decoded."""

    def refuse(self, *_: Any) -> NoReturn:
        raise UserError("speculate shows no scores to stopping criteria; leave out output_scores, or that criterion")

    __getitem__ = __iter__ = __len__ = __bool__ = __getattr__ = refuse


@dataclass(frozen=True)
class Unscored(StoppingCriteria):
    """A criterion that would see scores in stock `generate`: raises `UserError` when it looks at them."""

    criterion: StoppingCriteria

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return self.criterion(input_ids, NoScores(), **options)


def refuse_criteria(criteria: Iterable[StoppingCriteria], input_ids: torch.Tensor) -> None:
    """Raises `UserError` for criteria of a batch `int64 [B, T]` that are no function of each row's text.

    Rows of a batch advance by different numbers of tokens, so each is asked about alone. A single row is asked about
    token by token, as `generate` does it: there criteria may count, or answer as they like.
    """
    if len(input_ids) < 2:
        return
    texts = torch.cat([input_ids, input_ids[:, -1:]], 1)  # no criterion is ever asked about a prompt alone
    for criterion in criteria:
        if type(criterion).__module__ == stock_criteria.__name__:
            continue
        alone = [criterion(text.unsqueeze(0), None) for text in texts]
        before = snapshot(criterion)
        again = criterion(texts[-1:].clone(), None)
        if snapshot(criterion) != before or bool(again) != bool(alone[-1]):
            raise UserError(
                f"{type(criterion).__name__} keeps a state; make it a function of a row's text, or give one row"
            )
        together = criterion(texts.clone(), None)
        rows = together.flatten().tolist() if isinstance(together, torch.Tensor) and together.dim() else [together]
        if [bool(row) for row in rows] != [bool(row) for row in alone]:
            raise UserError(
                f"{type(criterion).__name__} does not answer for each row by itself; "
                "return a bool tensor with a value for each row, or give one row"
            )


# Whether a logits processor or stopping criterion keeps a state: a deep, structural snapshot of any Python object.
#
# Two snapshots are equal when nothing was changed in between: no attribute, no item of a container, no element of a
# tensor or array, no variable of a closure, a generator or a module that its functions name. What cannot be looked
# into (locks, objects of extension modules that cannot be pickled) counts by its type alone.

LIMIT = 20_000  # objects that are looked at, those near the surface first
LARGEST = 1 << 16  # elements of a tensor that are all looked at; of larger ones every so-and-so-many-th
LEAVES = (type(None), bool, int, str, bytes)
BY_NAME = (float, complex, type, ModuleType, BuiltinFunctionType, Enum, logging.Logger, torch.dtype, torch.device)
# Their classes and functions keep no state of a user's; their objects may.
LIBRARIES = sys.stdlib_module_names | {"torch", "transformers", "tokenizers", "numpy"}
UNREADABLE = "tokenizers"  # pickling them takes long, and they keep nothing

Snapshot = list[tuple[Any, ...]]


def snapshot(thing: Any) -> Snapshot:
    """Deep snapshot of `thing` as plain values that can be compared with those of another moment."""
    order: dict[int, int] = {}
    alive: list[Any] = []  # an id belongs to one object as long as that is alive
    waiting: deque[Any] = deque()

    def mark(value: Any) -> Any:
        if isinstance(value, LEAVES) and type(value) in LEAVES:
            return value
        if isinstance(value, BY_NAME):
            return type(value).__name__, repr(value)
        if id(value) not in order:
            if len(order) >= LIMIT:
                return "beyond the limit"
            order[id(value)] = len(order)
            alive.append(value)
            waiting.append(value)
        return "object", order[id(value)]

    mark(thing)
    found: Snapshot = []
    while waiting:
        value = waiting.popleft()
        found.append((type(value).__qualname__, *(mark(part) for part in parts(value))))
    return found


def parts(value: Any) -> list[Any]:
    """Parts of an object, one level down."""
    if isinstance(value, torch.Tensor):
        return [digest(value)]
    if isinstance(value, np.ndarray):
        some = value.reshape(-1) if value.size <= LARGEST else value.flat[:: value.size // LARGEST]
        return [str(value.dtype), str(value.shape), some.tolist() if value.dtype == object else some.tobytes()]
    if isinstance(value, torch.Generator):
        return [digest(value.get_state())]
    if isinstance(value, random.Random):
        return [value.getstate()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return of_function(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, CellType):
        return attributes(value, ["cell_contents"])
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        return [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, classmethod | staticmethod):
        return [value.__func__]
    return of_object(value)


def of_function(function: FunctionType) -> list[Any]:
    """Its defaults, closure and own attributes, and the globals that it names."""
    held = [function.__defaults__, function.__kwdefaults__, function.__closure__, vars(function) or None]
    if library(function):
        return held
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    return held + [function.__globals__[name] for name in names]


def of_object(value: Any) -> list[Any]:
    """Items, attributes and slots, and what its classes hold where they are a user's."""
    held: list[Any] = []
    if isinstance(value, dict):
        held += itertools.chain.from_iterable(dict.items(value))
    elif isinstance(value, list | tuple | deque):
        held += value
    elif isinstance(value, set | frozenset):
        plain = all(type(item) in LEAVES for item in value)
        held += sorted(map(repr, value)) if plain else value
    elif not hasattr(value, "__dict__"):
        held += reduced(value)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        held += attributes(value, [slots] if isinstance(slots, str) else slots)
        if not library(kind):
            held += [each for name, each in vars(kind).items() if not name.startswith("__") or name == "__call__"]
    return held + attributes(value, ["__dict__"])


def reduced(value: Any) -> list[Any]:
    """State that pickle would keep of an object that shows no attributes, such as an iterator."""
    if type(value).__module__.partition(".")[0] == UNREADABLE:
        return []
    try:
        return [value.__reduce_ex__(4)]
    except Exception:  # whatever an extension module raises
        told = repr(value)
        return [] if " at 0x" in told else [told]


def attributes(value: Any, names: Iterable[str]) -> list[Any]:
    held = []
    for name in names:
        try:
            held.append(getattr(value, name))
        except Exception:  # an empty cell, an unset slot, a property that fails
            continue
    return held


def library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def digest(tensor: torch.Tensor) -> str:
    """Shape, type and elements; of a large tensor a sample of them and the count of its changes in place."""
    told = f"{tuple(tensor.shape)} {tensor.dtype}"
    try:
        flat = tensor.detach().reshape(-1)
        if flat.numel() > LARGEST:
            flat = flat[:: flat.numel() // LARGEST]
            told += " inference" if tensor.is_inference() else f" version {tensor._version}"
        return f"{told} {hash(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())}" if flat.numel() else told
    except (RuntimeError, NotImplementedError, TypeError):  # meta, sparse and quantised tensors
        return told
