import pytest
import torch
from transformers import DynamicCache, MistralConfig

from ctc_drafter.decode.batch import Batch, DecodingConfig, Method
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.decode.sampling import Sampled
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.drafters.layers import DraftKVCache
from ctc_drafter.target import cache as join_module
from ctc_drafter.target.cache import join
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1], [5], [31, 41, 59, 26, 5, 35, 8, 97 - 1, 9, 3, 2, 3], [6, 6]]
NEW = 16


@pytest.mark.sparing(2)
@pytest.mark.parametrize("in_flight", [1, 2, 4, 10])
@pytest.mark.parametrize("seeds", [None, [9, 8, 7, 6, 5, 4]], ids=["greedy", "sampled"])
def test_rows_that_join_are_rows_that_start(in_flight, seeds):
    target = tiny_target()
    drafter = tiny_drafter(target, num_hidden_layers=2)
    options = {"max_new_tokens": NEW} | ({"sampler": Sampled(seeds)} if seeds else {})
    full = generate(target, drafter, PROMPTS, **options).tokens
    eos = {full[0][3], full[2][6], full[3][0]}  # rows end at different times, one at once
    expected = generate(target, drafter, PROMPTS, eos=eos, **options).tokens
    assert len({len(tokens) for tokens in expected}) > 2
    found = list(generate_many(target, drafter, iter(PROMPTS), in_flight=in_flight, eos=eos, **options))
    assert sorted(place for place, _ in found) == list(range(len(PROMPTS)))
    assert dict(found) == dict(enumerate(expected))


def test_drafts_of_joined_rows_are_accepted():
    target = tiny_target()
    full = generate(target, tiny_drafter(target), PROMPTS, max_new_tokens=NEW).tokens
    scripts = [p + t for p, t in zip(PROMPTS, full, strict=True)]
    eos = full[0][2]  # the first row ends after its first verification, so that rows never end together
    assert all(eos not in tokens for tokens in full[1:])
    bursts: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    options = {"in_flight": 2, "nodes": 12, "max_new_tokens": NEW, "eos": {eos}}
    options |= {"on_tokens": lambda row, tokens: bursts[row].append(len(tokens))}
    found = dict(generate_many(target, ScriptedDrafter(scripts, 4), PROMPTS, **options))
    assert [found[row] for row in range(len(PROMPTS))] == [full[0][:3], *full[1:]]
    assert list(bursts.values()) == [[1, 2]] + [[1, 5, 5, 5]] * (len(PROMPTS) - 1)


def test_prompts_are_read_when_there_is_room():
    target = tiny_target()
    read = []

    def endless():
        for number in range(1000):
            read.append(number)
            yield [number % 90 + 1]

    rows = generate_many(target, tiny_drafter(target), endless(), in_flight=3, max_new_tokens=4)
    assert read == []
    next(rows)
    assert read == [0, 1, 2]
    for _ in range(4):
        next(rows)
    assert len(read) <= 5 + 3


def test_nothing_in_nothing_out():
    target = tiny_target()
    assert list(generate_many(target, tiny_drafter(target), [], max_new_tokens=4)) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"in_flight": 0}, "in_flight"),
        ([[1], [2], [3], []], {"in_flight": 1}, "prompt 3 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    target = tiny_target()
    with pytest.raises(UserError, match=message):
        list(generate_many(target, tiny_drafter(target), prompts, **{"max_new_tokens": 4, **options}))


def test_joined_caches_are_those_of_one_prefill():
    target = tiny_target()
    together = prefill(target, PROMPTS).cache
    for cut in (1, 4):
        cache = prefill(target, PROMPTS[:cut]).cache
        join(cache, prefill(target, PROMPTS[cut:]).cache)
        for ours, theirs in zip(cache.layers, together.layers, strict=True):
            for row, prompt in enumerate(PROMPTS):
                torch.testing.assert_close(ours.keys[row, :, : len(prompt)], theirs.keys[row, :, : len(prompt)])
                torch.testing.assert_close(ours.values[row, :, : len(prompt)], theirs.values[row, :, : len(prompt)])
            assert ours.keys.shape == theirs.keys.shape


def test_rows_join_static_caches_that_must_grow():
    target = Target.wrap(tiny_target(max_position_embeddings=600).model, cache="static")
    drafter = tiny_drafter(target)
    prompts = [*PROMPTS[:2], [n % 90 + 1 for n in range(300)], PROMPTS[3]]
    full = generate(target, drafter, prompts, max_new_tokens=NEW).tokens
    eos = {full[0][2]}
    expected = generate(target, drafter, prompts, max_new_tokens=NEW, eos=eos).tokens
    found = dict(generate_many(target, drafter, prompts, in_flight=2, max_new_tokens=NEW, eos=eos))
    assert [found[row] for row in range(4)] == expected


def test_a_cache_that_rolls_is_refused():
    config = MistralConfig(sliding_window=4, num_hidden_layers=1)
    cache, state = DynamicCache(config=config), torch.zeros(1, 2, 1, 16)
    cache.update(state, state, 0)
    with pytest.raises(UserError, match="SlidingWindow"):
        join(cache, cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("place", ["first", "between layers", "session"])
@torch.inference_mode()
def test_a_row_that_memory_does_not_suffice_for_leaves_the_others_as_they_were(monkeypatch, cache, place):
    target = Target.wrap(tiny_target(max_position_embeddings=512).model, cache)
    drafter = tiny_drafter(target, copies=4, carry=True)
    text, long = [3, 1, 4, 1, 5], [2] * 280  # needs more slots than are there
    expected = plain_generate(target, [text], max_new_tokens=16).tokens[0]
    batch, row = (
        Batch(Method(target, drafter, DecodingConfig(6, 0.0)), Stopwatch(target.device, False)),
        SequenceState(0, text, 16),
    )
    row.tokens += batch.admit([row])

    def go_on():
        tokens, counts = batch.step().emitted()
        row.tokens += tokens[0][: counts[0] + 1]

    go_on()
    calls = iter(range(100))
    real, fails_at = join_module.stacked, {"first": 0, "between layers": 3, "session": 99}[place]

    def stacked(*states):
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError
        return real(*states)

    monkeypatch.setattr(join_module, "stacked", stacked)
    if place == "session":
        monkeypatch.setattr(DraftKVCache, "join", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        batch.admit([SequenceState(1, long, 16)])
    monkeypatch.undo()
    assert batch.rows == [row]
    for layer in batch.cache.layers:  # nothing of the failed row is kept
        assert layer.keys.untyped_storage().nbytes() <= 4 * 2 * 16 * 256
    while len(row.tokens) < 16:
        go_on()
    assert row.tokens[:16] == expected
