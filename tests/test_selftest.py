"""The trial at load: it accepts what decodes exactly, and catches what is silently wrong."""

import copy
import logging

import pytest
import torch

from ctc_drafter import selftest
from ctc_drafter.evaluate.families import FAMILIES, WINDOW, family_model
from ctc_drafter.selftest import disagreement, prompt_length, self_test
from ctc_drafter.target import CACHES, Target
from ctc_drafter.types import UserError
from helpers import tiny_target

ACCEPTED = [name for name, _, _ in FAMILIES][: [name for name, _, _ in FAMILIES].index("Falcon, alibi")]
SLIDING = ["Mistral, sliding", "Gemma 3", "Qwen2, sliding from the second layer"]
# Static checks stop most of these earlier; without them, all but Llama 4 would decode something else.
SILENTLY_WRONG = [
    *("Bloom", "MPT", "Falcon, alibi", "RoBERTa", "BERT, bidirectional", "Moshi, sliding"),
    *("Mamba", "RWKV", "Jamba", "RecurrentGemma", "Qwen3-Next"),
]


@pytest.fixture(autouse=True)
def quiet():
    """Recurrent models warn that their fast kernels are missing."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    logging.getLogger("transformers").setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", SILENTLY_WRONG)
def test_what_is_silently_wrong_is_caught_without_any_static_check(name):
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(Target(family_model(name)))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_exact_passes_with_a_wide_margin(name, kind):
    error, tolerance = disagreement(Target(family_model(name), kind))
    assert error < tolerance / 50


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "OPT"])
def test_bfloat16_passes_and_still_catches(name):
    self_test(Target(family_model(name).to(torch.bfloat16)))
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(Target(family_model("RoBERTa").to(torch.bfloat16)))


class Causal(Target):
    """A node sees every node before it."""

    def _masks(self, allowed, positions, key_positions):
        return super()._masks(allowed | torch.ones_like(allowed).tril(allowed.shape[2] - 5), positions, key_positions)


class Blind(Target):
    """The root is hidden from its children."""

    def _masks(self, allowed, positions, key_positions):
        hidden = allowed.clone()
        hidden[:, 1:, -5] = False
        return super()._masks(hidden, positions, key_positions)


class InOrder(Target):
    """Positions count nodes instead of depth."""

    def forward(self, tokens, positions, *rest, **named):
        order = positions[:, :1] + torch.arange(tokens.shape[1])
        return super().forward(tokens, order, *rest, **named)


class WiderWindow(Target):
    window = WINDOW + 1


class NoWindow(Target):
    def _masks(self, allowed, positions, key_positions):
        return super()._masks(allowed, positions, positions.max() + key_positions * 0)


@pytest.mark.parametrize("broken", [Causal, Blind, InOrder])
def test_wrong_masks_and_positions_are_caught(broken):
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(broken(tiny_target().model))


@pytest.mark.parametrize("broken", [WiderWindow, NoWindow])
@pytest.mark.parametrize("name", SLIDING)
def test_wrong_windows_are_caught(name, broken):
    model = family_model(name)
    self_test(Target(model))
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(broken(model))


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_is_not_compacted_is_caught(monkeypatch, kind):
    target = Target(tiny_target().model, kind)

    def first_nodes(cache, lengths, first, path, counts):
        selftest_compact(cache, lengths, first, torch.arange(path.shape[1]).expand_as(path), counts)

    selftest_compact = selftest.compact
    monkeypatch.setattr(selftest, "compact", first_nodes)
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(target)


def test_dropout_is_named():
    model = family_model("GPT-2").train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        Target.wrap(model)
    Target.wrap(model.eval())


def test_it_costs_six_short_forwards_and_leaves_no_trace():
    model = tiny_target().model
    tokens = []
    handle = model.register_forward_hook(
        lambda _m, _a, kwargs, _o: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    config, names, state = copy.deepcopy(model.config.to_dict()), set(vars(model)), torch.get_rng_state()
    Target.wrap(model)
    assert len(tokens) == 6
    assert sum(tokens) < 90
    assert (model.config.to_dict(), set(vars(model))) == (config, names)
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_prompt_crosses_the_window_where_that_is_cheap(monkeypatch):
    assert prompt_length(Target(family_model("Gemma 3"))) == WINDOW + selftest.SHORT
    monkeypatch.setitem(selftest.BUDGET, "cpu", 1e5)
    assert prompt_length(Target(family_model("Gemma 3"))) == selftest.SHORT
    assert prompt_length(tiny_target(max_position_embeddings=10)) == 4
