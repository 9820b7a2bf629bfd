import inspect
import itertools

import pytest
import torch

from ctc_drafter.decode.batch import Batch
from ctc_drafter.decode.generate import generate, plain_generate, run
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]
NEW = 24


def alone(target, prompt, new=NEW, eos=()):
    """The oracle's oracle: whole forwards without any cache."""
    text = list(prompt)
    for _ in range(new):
        with torch.inference_mode():
            text.append(int(target.model(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] in eos:
            break
    return text[len(prompt) :]


def test_plain_decoding_is_what_forwards_without_a_cache_give():
    target = tiny_target()
    result = plain_generate(target, PROMPTS, max_new_tokens=NEW)
    assert result.tokens == [alone(target, prompt) for prompt in PROMPTS]
    assert result.stats.tokens == 3 * NEW
    assert result.stats.beta == 1


@pytest.mark.parametrize("right", [0, 1, 4, (0, 3, 1, 4)], ids=["never", "once", "always", "sometimes"])
@pytest.mark.parametrize("nodes", [1, 3, 8, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_drafts_never_change_the_output(right, nodes, batch):
    target = tiny_target()
    prompts = PROMPTS[:batch]
    expected = plain_generate(target, prompts, max_new_tokens=NEW).tokens
    scripts = [p + t for p, t in zip(prompts, expected, strict=True)]
    result = generate(target, ScriptedDrafter(scripts, right), prompts, max_new_tokens=NEW, nodes=nodes)
    assert result.tokens == expected
    assert result.stats.tokens == batch * NEW


def test_right_drafts_are_accepted_and_counted():
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    scripts = [p + t for p, t in zip(PROMPTS, expected, strict=True)]
    stats = generate(target, ScriptedDrafter(scripts, 4), PROMPTS, max_new_tokens=NEW, nodes=12).stats
    # 23 tokens after the prefill's: four steps of 5 and one whose last tokens lie beyond the limit.
    assert stats.steps == 3 * 5
    assert stats.accept_histogram[4] >= 3 * 4
    assert stats.step_tokens == 3 * (NEW - 1)
    never = generate(target, ScriptedDrafter(scripts, 0), PROMPTS, max_new_tokens=NEW, nodes=12).stats
    assert never.beta == 1
    assert never.accept_histogram == [3 * (NEW - 1)]


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_ctc_drafter_never_changes_the_output(nodes, layers):
    target = tiny_target()
    drafter = tiny_drafter(target, num_hidden_layers=layers)
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    assert generate(target, drafter, PROMPTS, max_new_tokens=NEW, nodes=nodes).tokens == expected


def test_eos_ends_a_row_and_the_others_go_on():
    target = tiny_target()
    full = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    eos = {full[0][5], full[2][9]}
    expected = [alone(target, prompt, eos=eos) for prompt in PROMPTS]
    scripts = [p + t for p, t in zip(PROMPTS, full, strict=True)]
    assert len({len(row) for row in expected}) > 1
    assert plain_generate(target, PROMPTS, max_new_tokens=NEW, eos=eos).tokens == expected
    drafter = ScriptedDrafter(scripts, (4, 2))
    assert generate(target, drafter, PROMPTS, max_new_tokens=NEW, nodes=12, eos=eos).tokens == expected


def test_streams_exactly_what_it_returns():
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    scripts = [p + t for p, t in zip(PROMPTS, expected, strict=True)]
    streamed: list[list[int]] = [[], [], []]
    bursts = []

    def on_tokens(row, tokens):
        streamed[row] += tokens
        bursts.append(len(tokens))

    generate(target, ScriptedDrafter(scripts, 4), PROMPTS, max_new_tokens=NEW, nodes=12, on_tokens=on_tokens)
    assert streamed == expected
    assert max(bursts) == 5


def test_bfloat16_runs():
    target = tiny_target(dtype=torch.bfloat16)
    result = generate(target, tiny_drafter(target), PROMPTS, max_new_tokens=8)
    assert all(len(row) == 8 for row in result.tokens)


def test_a_row_does_not_depend_on_its_neighbours():
    target, drafter = tiny_target(), tiny_drafter(tiny_target())
    together = generate(target, drafter, PROMPTS, max_new_tokens=NEW).tokens
    for order in itertools.permutations(range(3)):
        rows = generate(target, drafter, [PROMPTS[i] for i in order], max_new_tokens=NEW).tokens
        assert rows == [together[i] for i in order]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "empty"),
        ([[1, 97]], {}, "vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"nodes": 0}, "nodes"),
        ([[1]], {"min_probability": 1.0}, "floor"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    target = tiny_target()
    with pytest.raises(UserError, match=message):
        generate(target, tiny_drafter(target), prompts, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("min_probability", [0.0, 0.3, 0.5])
def test_a_floor_never_changes_the_output(min_probability):
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    scripts = [p + t for p, t in zip(PROMPTS, expected, strict=True)]
    result = generate(
        target, ScriptedDrafter(scripts, 4), PROMPTS, max_new_tokens=NEW, nodes=12, min_probability=min_probability
    )
    assert result.tokens == expected
    # The scripted nodes have probabilities 1, .6, .4 and .2, less a little for their siblings' order.
    assert len(result.stats.accept_histogram) == {0.0: 5, 0.3: 4, 0.5: 3}[min_probability]


def test_timing_names_the_stages():
    target = tiny_target()
    stats = generate(target, tiny_drafter(target), PROMPTS, max_new_tokens=4, timed=True).stats
    assert set(stats.stages_ms) == {"prefill", "draft", "tree", "verify", "accept", "compact"}
    assert sum(stats.stages_ms.values()) <= stats.seconds * 1e3


@pytest.mark.parametrize("part", [Batch.step, Batch.admit, run.__wrapped__, plain_generate.__wrapped__])
def test_the_loop_fits_a_screen(part):
    assert len(inspect.getsource(part).splitlines()) <= 48
