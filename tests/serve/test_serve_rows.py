"""A row that fails in a server's batch: it gets its own error, and its neighbours what they get alone."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field

import pytest
import torch
from transformers import LogitsProcessorList

import tiny_models
from ctc_drafter.decode.batch import Batch, DecodingConfig, Method
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Greedy, Sampled
from ctc_drafter.evaluate.exactness import ScriptedDrafter
from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.protocol import Sampling
from ctc_drafter.serve.requests import Completion, Failure, Finish
from ctc_drafter.serve.service import Limits, Service
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import UserError

PROMPTS = [[5, 9, 2, 7, 7, 3], [8, 2], [3, 1, 4], [6], [2, 7, 1, 8]]
FAILING = 2  # its place
LENGTH = 16


@dataclass(frozen=True)
class Fails:
    """Argmax, until a row has so many tokens."""

    at: int
    error: Exception = field(default_factory=lambda: UserError("no token is left"))

    def validate(self, row, logits):
        return

    def sample(self, logits, rows):
        if any(len(row.tokens) >= self.at for row in rows):
            raise self.error
        return ARGMAX.sample(logits, rows)

    def sample_tree(self, tree, logits, rows):
        self.sample(logits[:, 0], rows)
        return ARGMAX.sample_tree(tree, logits, rows)


class Bad:
    """A processor that fails at a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length and len(input_ids) == 1:
            raise ZeroDivisionError("a processor of the user's")
        return scores


def expected(target: Target) -> list[list[int]]:
    return [plain_generate(target, [p], max_new_tokens=LENGTH, eos=()).tokens[0] for p in PROMPTS]


def scripted(target: Target, depths=(4, 0, 2)) -> ScriptedDrafter:
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected(target), strict=True)]
    return ScriptedDrafter(texts, depths, target.vocab_size)


def serve(
    target: Target, drafter, change=lambda _job: None, at_once: bool = True
) -> tuple[list[Completion], list[list]]:
    """All prompts decoded side by side, and each completion's events; `change` has its way with the failing one."""
    engine = Engine({"draft": Method(target, drafter, DecodingConfig(8, 0.0))}, batch_size=len(PROMPTS))
    service = Service(engine, target, tiny_models.tiny_tokenizer(), "tiny", Limits())
    told: queue.SimpleQueue = queue.SimpleQueue()
    completions = []
    for place, prompt in enumerate(PROMPTS):
        (completion,) = service.completions([prompt], Sampling(temperature=0), LENGTH)
        completion.eos, completion.deliver = frozenset(), lambda event, place=place: told.put((place, event))
        completions.append(completion)
    change(completions[FAILING])
    events: list[list] = [[] for _ in completions]
    with engine:
        engine.submit(completions)
        while not all(any(isinstance(e, Finish | Failure) for e in each) for each in events):
            place, event = told.get(timeout=60)
            events[place].append(event)
        assert engine.alive
    return completions, events


def check(target: Target, completions: list[Completion], events: list[list], message: str) -> None:
    for place, (completion, each, text) in enumerate(zip(completions, events, expected(target), strict=True)):
        if place == FAILING:
            assert isinstance(each[-1], Failure)
            assert message in each[-1].message
            assert completion.tokens == text[: len(completion.tokens)]
            assert len(completion.tokens) < LENGTH
        else:
            assert isinstance(each[-1], Finish)
            assert completion.tokens == text


@pytest.fixture(params=CACHES)
def target(request) -> Target:
    return Target.wrap(tiny_models.tiny_llama(), request.param)


LOG_SAYS_WHY = "log says why"


@pytest.mark.sparing
@pytest.mark.parametrize("at", [0, 1, 6])
@pytest.mark.parametrize(
    ("error", "message"), [(UserError("no token is left"), "no token is left"), (ValueError("odd"), LOG_SAYS_WHY)]
)
def test_a_choice_that_fails(target, at, error, message):
    completions, events = serve(
        target, scripted(target), lambda completion: setattr(completion, "sampler", Fails(at, error))
    )
    check(target, completions, events, message)
    assert len(completions[FAILING].tokens) >= min(at, 1)


@pytest.mark.sparing
def test_a_processor_that_fails(target):
    length = len(PROMPTS[FAILING]) + 5
    sampler = Greedy(LogitsProcessorList([Bad(length)]))
    completions, events = serve(target, scripted(target), lambda completion: setattr(completion, "sampler", sampler))
    check(target, completions, events, LOG_SAYS_WHY)


@pytest.mark.sparing
def test_a_row_without_numbers(target):
    """Its own text holds what the target cannot compute; sampling has nothing to draw then."""
    texts = expected(target)
    others = {token for place, text in enumerate(texts) for token in (*text, *PROMPTS[place]) if place != FAILING}
    drafter = scripted(target)
    poison = next(token for token in range(5, 280) if token not in others | {*PROMPTS[FAILING], *texts[FAILING]})
    with torch.no_grad():
        target.model.model.embed_tokens.weight[poison] = float("nan")
    assert [text for place, text in enumerate(expected(target)) if place != FAILING] == [
        text for place, text in enumerate(texts) if place != FAILING
    ]

    def change(completion):
        completion.prompt, completion.sampler = [*completion.prompt, poison], Sampled(3)

    completions, events = serve(target, drafter, change)
    assert "not numbers" in events[FAILING][-1].message
    for place, (completion, text) in enumerate(zip(completions, texts, strict=True)):
        assert place == FAILING or completion.tokens == text


@pytest.mark.sparing
def test_a_text_that_cannot_be_shown(target):
    class Broken:
        stopped, length, shown, calls = False, 0, 0, 0

        def push(self, _token):
            self.calls += 1
            if self.calls > 4:
                raise KeyError("a tokenizer's own")
            return ""

    completions, events = serve(target, scripted(target), lambda completion: setattr(completion, "shown", Broken()))
    check(target, completions, events, LOG_SAYS_WHY)


@pytest.mark.sparing
def test_a_client_that_cannot_be_told(target):
    def change(completion):
        tell = completion.deliver

        def deliver(event):
            tell(event)
            if len(completion.tokens) > 3 and not isinstance(event, Failure):
                raise RuntimeError("gone")

        completion.deliver = deliver

    completions, events = serve(target, scripted(target), change)
    for place, (completion, text) in enumerate(zip(completions, expected(target), strict=True)):
        assert place == FAILING or completion.tokens == text
    assert any(isinstance(event, Failure) for event in events[FAILING])


@pytest.mark.sparing
@pytest.mark.parametrize("broken", ["propose", "extend", "select", "join"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_drafter_that_fails_costs_drafts_and_no_answers(target, broken, after, caplog):
    drafter = scripted(target)
    begin, calls = drafter.begin, iter(range(10**6))

    def begun(*args):
        session = begin(*args)
        real = getattr(session, broken)

        def fails(*args):
            if next(calls) >= after:
                raise IndexError("a drafter's own")
            return real(*args)

        setattr(session, broken, fails)
        return session

    drafter.begin = begun
    completions, _ = serve(target, drafter, lambda completion: setattr(completion, "limit", 5))
    for completion, text in zip(completions, expected(target), strict=True):
        assert completion.tokens == text[: completion.limit]
    assert broken == "select" or "a drafter's own" in caplog.text


def test_a_step_that_fails_for_everybody_is_everybodys_error(monkeypatch, target):
    real = Batch.advance
    calls = iter(range(10**6))

    def fails(self):
        if next(calls) > 2:
            raise MemoryError("none left")
        return real(self)

    monkeypatch.setattr(Batch, "advance", fails)
    _, events = serve(target, scripted(target))
    assert all(isinstance(each[-1], Failure) for each in events)


@pytest.mark.sparing
@pytest.mark.parametrize("decode", ["generate", "generate_many", "plain_generate"])
@pytest.mark.parametrize("at", [0, 4])
def test_in_the_library_the_error_names_the_row(target, decode, at):
    class OfRow(Fails):
        def sample(self, logits, rows):
            mine = [row for row in rows if row.index == FAILING]
            return super().sample(logits, mine) if mine else ARGMAX.sample(logits, rows)

        def sample_tree(self, tree, logits, rows):
            self.sample(logits[:, 0], rows)
            return ARGMAX.sample_tree(tree, logits, rows)

    def run(error):
        options = {"max_new_tokens": LENGTH, "eos": (), "sampler": OfRow(at, error)}
        if decode == "plain_generate":
            return plain_generate(target, PROMPTS, **options)
        if decode == "generate":
            return generate(target, scripted(target), PROMPTS, min_probability=0.0, **options)
        return list(generate_many(target, scripted(target), PROMPTS, in_flight=4, min_probability=0.0, **options))

    with pytest.raises(UserError, match=f"row {FAILING}: no token is left"):
        run(UserError("no token is left"))
    with pytest.raises(ZeroDivisionError) as found:
        run(ZeroDivisionError("the user's own"))
    assert any(f"row {FAILING}" in note for note in found.value.__notes__)
