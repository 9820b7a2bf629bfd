"""Snapshots differ when, and only when, something in an object has changed; processors and criteria with a state."""

import functools
import itertools
import random
import threading
from collections import Counter, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from ctc_drafter.decode import processors
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.processors import snapshot
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.types import UserError
from helpers import tiny_target

MODEL = tiny_target().model
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
GLOBAL: list[int] = []


def of_globals():
    GLOBAL.append(1)


class OfClass:
    calls: list[int] = []  # noqa: RUF012

    def go(self):
        self.calls.append(1)


class Slotted:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 0

    def go(self):
        self.value += 1


def closure():
    seen: list[int] = []
    return lambda: seen.append(1)


def rebound():
    count = 0

    def go():
        nonlocal count
        count += 1

    return go


def produced():
    numbers = (n for n in range(100))
    return numbers, lambda: next(numbers)


def pair(thing, change):
    return thing, lambda: change(thing)


CHANGES = {
    "list": lambda: pair([], lambda x: x.append(1)),
    "list in a list": lambda: pair([[0]], lambda x: x[0].append(1)),
    "dict": lambda: pair({}, lambda x: x.update(a=1)),
    "value of a dict": lambda: pair({"a": 1}, lambda x: x.update(a=2)),
    "defaultdict": lambda: pair(defaultdict(int), lambda x: x["a"]),
    "Counter": lambda: pair(Counter("a"), lambda x: x.update("a")),
    "set": lambda: pair({1}, lambda x: x.add(2)),
    "deque": lambda: pair(deque([1], 1), lambda x: x.append(2)),
    "bytearray": lambda: pair(bytearray(2), lambda x: x.__setitem__(0, 1)),
    "tensor": lambda: pair(torch.zeros(3), lambda x: x.add_(1)),
    "large tensor": lambda: pair(torch.zeros(1 << 18), lambda x: x[7:8].add_(1)),
    "bfloat16": lambda: pair(torch.zeros(3, dtype=torch.bfloat16), lambda x: x.add_(1)),
    "array": lambda: pair(np.zeros(3), lambda x: x.fill(1)),
    "array of objects": lambda: pair(np.array([[], None], dtype=object), lambda x: x[0].append(1)),
    "nan": lambda: pair([float("nan")], lambda x: x.append(0)),
    "object": lambda: pair(SimpleNamespace(a=SimpleNamespace(b=[])), lambda x: x.a.b.append(1)),
    "slots": lambda: pair(Slotted(), Slotted.go),
    "class": lambda: pair(OfClass(), OfClass.go),
    "closure": lambda: (lambda f: (f, f))(closure()),
    "rebound closure": lambda: (lambda f: (f, f))(rebound()),
    "partial": lambda: pair(functools.partial(print, []), lambda x: x.args[0].append(1)),
    "method": lambda: (lambda x: (x.go, x.go))(Slotted()),
    "globals": lambda: (of_globals, of_globals),
    "generator": produced,
    "count": lambda: pair(itertools.count(), next),
    "iterator": lambda: pair(iter([1, 2]), next),
    "random": lambda: pair(random.Random(0), lambda x: x.random()),
    "numpy random": lambda: pair(np.random.default_rng(0), lambda x: x.random()),
    "torch generator": lambda: pair(torch.Generator(), lambda x: torch.rand(1, generator=x)),
    "module": lambda: pair(torch.nn.BatchNorm1d(2), lambda x: x(torch.ones(2, 2))),
    "itself": lambda: (lambda x: (x.append(x), pair(x, lambda y: y.append(1)))[1])([]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_nothing_else(name):
    thing, change = CHANGES[name]()
    before = snapshot(thing)
    assert snapshot(thing) == before
    change()
    assert snapshot(thing) != before


@pytest.mark.parametrize("thing", [threading.Lock(), object(), print, memoryview(b"a"), lambda: None, torch.nn.Linear])
def test_what_cannot_be_looked_into_stays_equal(thing):
    assert snapshot(thing) == snapshot(thing)


def test_new_objects_that_are_equal_are_no_change():
    holder = SimpleNamespace(text=[1, 2], of={"a": torch.ones(2)})
    before = snapshot(holder)
    holder.text, holder.of = [1, 2], {"a": torch.ones(2)}
    assert snapshot(holder) == before


def test_only_so_much_is_looked_at_and_what_is_near_comes_first(monkeypatch):
    monkeypatch.setattr(processors, "LIMIT", 50)
    holder = SimpleNamespace(large=[[i] for i in range(1000)], calls=[])
    before = snapshot(holder)
    assert len(before) <= 50
    holder.calls.append(1)
    assert snapshot(holder) != before


class Late(LogitsProcessor):
    """Counts its calls in a list, and acts from the eighth on."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(1)
        return scores if len(self.calls) < 8 else scores.roll(1, -1)


class Remembers(LogitsProcessor):
    """Keeps answers by text, which is no state."""

    def __init__(self):
        self.known = {}

    def __call__(self, input_ids, scores):
        rows = [self.known.setdefault(tuple(row), sum(row) % 97) for row in input_ids.tolist()]
        scores[range(len(rows)), rows] = float("-inf")
        return scores


def late_function():
    calls = []

    def act(input_ids, scores):
        calls.append(1)
        return scores if len(calls) < 8 else scores.roll(1, -1)

    return act


def late_prefix():
    calls = []

    def allowed(row, text):
        calls.append(row)
        return list(range(97)) if len(calls) < 8 else [5]

    return allowed


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"logits_processor": LogitsProcessorList([Late()])}, "Late keeps a state"),
        ({"logits_processor": LogitsProcessorList([late_function()])}, "act keeps a state"),
        ({"prefix_allowed_tokens_fn": late_prefix()}, "allowed keeps a state"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_processor_that_counts_is_refused(options, name, batch):
    with pytest.raises(UserError, match=name):
        MODEL.generate(
            IDS[:batch], max_new_tokens=4, pad_token_id=0, **options, custom_generate=speculate(PromptLookup())
        )


def test_a_processor_that_remembers_its_answers_is_not():
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False, "logits_processor": [Remembers()]}
    plain = MODEL.generate(IDS, **options)
    assert torch.equal(MODEL.generate(IDS, **options, custom_generate=speculate(PromptLookup())), plain)


class AfterCalls(StoppingCriteria):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(1)
        return torch.full((len(input_ids),), len(self.calls) >= 5)


class FirstRow(StoppingCriteria):
    """As many write it: the first row speaks for all."""

    def __call__(self, input_ids, scores, **kwargs):
        return bool(input_ids[0, -1] % 3 == 0)


class AnyRow(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 4 == 0).any().expand(len(input_ids))


@pytest.mark.parametrize("criterion", [AfterCalls, FirstRow, AnyRow])
def test_criteria_of_a_single_row_may_do_as_they_like(criterion):
    options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    plain = MODEL.generate(IDS[:1], **options, stopping_criteria=[criterion()])
    ours = MODEL.generate(
        IDS[:1], **options, stopping_criteria=[criterion()], custom_generate=speculate(PromptLookup())
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize(
    ("criterion", "message"), [(AfterCalls, "keeps a state"), (FirstRow, "each row"), (AnyRow, "each row")]
)
def test_criteria_of_a_batch_must_answer_row_by_row(criterion, message):
    for kept in ({}, {"return_dict_in_generate": True, "output_scores": True}):
        with pytest.raises(UserError, match=f"{criterion.__name__} .*{message}"):
            MODEL.generate(
                IDS, max_new_tokens=4, pad_token_id=0, stopping_criteria=[criterion()], **kept,
                custom_generate=speculate(PromptLookup()),
            )  # fmt: skip


class Ends(StoppingCriteria):
    def __init__(self, divisor):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) % self.divisor == 0


@pytest.mark.parametrize("divisor", [5, 7, 11])
def test_without_an_end_token_rows_go_on_until_all_have_stopped(divisor):
    """`generate` fills rows up with pad tokens only where there is an end token."""
    options = {"max_new_tokens": 40, "pad_token_id": 0, "do_sample": False, "stopping_criteria": [Ends(divisor)]}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    model = tiny_target(eos_token_id=None).model
    plain = model.generate(IDS, **options)
    shown: dict[int, list[int]] = {0: [], 1: []}
    decode = speculate(PromptLookup(), on_tokens=lambda row, tokens: shown[row].extend(tokens))
    ours = model.generate(IDS, **options, custom_generate=decode)
    assert plain.sequences.shape[1] < 46
    assert torch.equal(ours.sequences, plain.sequences)
    assert [shown[0], shown[1]] == plain.sequences[:, 6:].tolist()
    for mine, stock in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-4)
