"""Settings at the edges of floating-point numbers: drafts change no answer, and what is refused is refused alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.processors import CountPenalty
from ctc_drafter.decode.sampling import Greedy, Sampled, warpers
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
LENGTH = 12
SMALLEST, LARGEST = 5e-324, 1.7e308


def greedy(*processors) -> Greedy:
    return Greedy(LogitsProcessorList(processors))


def bias(value: float) -> SequenceBiasLogitsProcessor:
    return SequenceBiasLogitsProcessor([[[5], value], [[9], -value]])


# By setting: what makes a sampler of a value, and values.
EDGES: dict[str, tuple[Callable[[Any], Sampled | Greedy], tuple]] = {
    "temperature": (
        lambda value: Sampled(5, warpers(temperature=value)),
        (1e-9, 1e-3, 0.3, 1e3, 1e9, 1e30, 1e38, LARGEST, math.inf, SMALLEST, 1e-45, math.nan, -1.0),
    ),
    "top_p": (
        lambda value: Sampled(5, warpers(top_p=value)),
        (SMALLEST, 1e-45, 1e-9, 0.5, 1 - 1e-16, 1.0, math.nan, math.inf, -0.0),
    ),
    "top_k": (lambda value: Sampled(5, warpers(top_k=value)), (0, 1, 2, 97, 98, 2**31, 2**62)),
    "min_p": (lambda value: Sampled(5, warpers(min_p=value)), (SMALLEST, 1e-9, 1.0, math.nan)),
    "seed": (
        lambda value: Sampled(value, warpers()),
        (0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 2**200, -(2**200)),
    ),
    "seeds": (lambda value: Sampled([value, value + 1], warpers()), (0, -5, 2**63 - 1, 2**200)),
    "repetition penalty": (
        lambda value: greedy(RepetitionPenaltyLogitsProcessor(value)),
        (1e-30, 1e-9, 0.5, 2.0, 1e9, 1e30, 1e38),
    ),
    "presence and frequency": (lambda value: greedy(CountPenalty(8, value, value)), (1e-30, -1e30, 1e30, 1e38, -1e38)),
    "bias": (lambda value: greedy(bias(value)), (1e-30, 1e9, 1e30, 1e38, -1e38)),
    "several": (
        lambda value: Sampled(
            2**63, LogitsProcessorList([bias(value), *warpers(value, top_k=96, top_p=1e-9, min_p=1e-9)])
        ),
        (1e-9, 1e9, 1e30),
    ),
}
CASES = [(setting, value) for setting, (_, values) in EDGES.items() for value in values]


def outcome(run: Callable[[], list[list[int]]]) -> object:
    """The tokens, or what the user is told."""
    try:
        return run()
    except (UserError, ValueError) as error:  # ours, and transformers' of a setting that it does not take
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("setting", "value"), CASES)
def test_drafts_change_nothing_at_the_edges(setting: str, value: float) -> None:
    target, make = tiny_target(), EDGES[setting][0]

    def plain() -> list[list[int]]:
        return plain_generate(target, PROMPTS, max_new_tokens=LENGTH, sampler=make(value)).tokens

    def drafted(drafter: Drafter) -> list[list[int]]:
        options = {"max_new_tokens": LENGTH, "nodes": 8, "min_probability": 0.0, "sampler": make(value)}
        return generate(target, drafter, PROMPTS, **options).tokens

    expected = outcome(plain)
    assert outcome(lambda: drafted(tiny_drafter(target))) == expected
    if isinstance(expected, list):
        assert [len(row) for row in expected] == [LENGTH, LENGTH]
        scripts = [prompt + row for prompt, row in zip(PROMPTS, expected, strict=True)]
        assert outcome(lambda: drafted(ScriptedDrafter(scripts, (0, 3, 1)))) == expected
    else:
        assert "\n" not in expected


def test_most_of_them_are_answered() -> None:
    """A family in which all were refused would compare nothing."""
    target, answered = tiny_target(), 0
    for setting, value in CASES:
        try:
            sampler = EDGES[setting][0](value)
        except (UserError, ValueError):
            continue
        answered += bool(plain_generate(target, PROMPTS[:1], max_new_tokens=1, sampler=sampler).tokens)
    assert answered > 0.7 * len(CASES)
