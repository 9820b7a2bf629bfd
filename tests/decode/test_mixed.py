"""Rows of one batch under different settings are rows decoded alone, and a silent drafter is plain decoding."""

from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Greedy, PerSequenceSampler, Sampled, warpers
from ctc_drafter.drafters.base import NoDrafter
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1], [5], [31, 41, 59], [6, 6]]
NEW = 16
SEEDS = [4, 8, 15, 16, 23, 42]
HOT = Sampled(SEEDS, warpers(temperature=1.3, top_p=0.9))
ONCE = Greedy(LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)]))
CHOOSERS = [ARGMAX, HOT, ONCE, ARGMAX, HOT, Sampled(SEEDS)]  # groups whose order is not its own inverse


def alone(target):
    """Each prompt by plain decoding in a call where all rows have its settings."""
    each = [plain_generate(target, PROMPTS, max_new_tokens=NEW, sampler=sampler).tokens for sampler in CHOOSERS]
    return [tokens[row] for row, tokens in enumerate(each)]


def test_rows_with_settings_of_their_own():
    target = tiny_target()
    expected = alone(target)
    assert len({tuple(row) for row in expected}) == len(expected)
    mixed = PerSequenceSampler(lambda row: CHOOSERS[row.index])
    scripted = ScriptedDrafter([p + t for p, t in zip(PROMPTS, expected, strict=True)], (4, 0, 2))
    for drafter in (scripted, tiny_drafter(target)):
        assert generate(target, drafter, PROMPTS, max_new_tokens=NEW, nodes=12, sampler=mixed).tokens == expected
    joined = generate_many(target, tiny_drafter(target), PROMPTS, in_flight=2, max_new_tokens=NEW, sampler=mixed)
    assert dict(joined) == dict(enumerate(expected))


def test_nothing_drafted_is_plain_decoding():
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    eos = {expected[0][3], expected[2][6]}
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW, eos=eos)
    for prompts in (PROMPTS, PROMPTS[:1]):
        silent = generate(target, NoDrafter(), prompts, max_new_tokens=NEW, eos=eos)
        assert silent.tokens == expected.tokens[: len(prompts)]
        assert silent.stats.beta == 1.0
    assert dict(generate_many(target, NoDrafter(), PROMPTS, in_flight=3, max_new_tokens=NEW, eos=eos)) == dict(
        enumerate(expected.tokens)
    )
