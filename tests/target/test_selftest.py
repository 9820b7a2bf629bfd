"""The trial at load: it accepts what decodes exactly, and catches what is silently wrong."""

import copy
import logging

import pytest
import torch
import transformers

from benchmarks.families import FAMILIES, GROUPED, MIXED, WINDOW, family_config, family_model
from ctc_drafter.target import self_test as self_test_module
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.target.self_test import is_quantised, prompt_length, rounds_coarsely, self_test, thresholds, trials
from ctc_drafter.types import UserError
from helpers import tiny_config, tiny_target

ACCEPTED = [name for name, _, _ in FAMILIES][: [name for name, _, _ in FAMILIES].index("Falcon, alibi")]
SMALL = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
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


@pytest.mark.sparing(12)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_exact_passes_with_a_wide_margin(name, kind):
    _, error, tolerance = next(trials(Target(family_model(name), kind)))
    assert error < tolerance / 50


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "OPT"])
def test_bfloat16_passes_and_still_catches(name):
    self_test(Target(family_model(name).to(torch.bfloat16)))
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(Target(family_model("RoBERTa").to(torch.bfloat16)))


class Causal(Target):
    """A node sees every node before it."""

    def _masks(self, allowed, positions, key_positions):
        return super()._masks(allowed | torch.ones_like(allowed).tril(allowed.shape[2] - 7), positions, key_positions)


class Blind(Target):
    """The root is hidden from its children."""

    def _masks(self, allowed, positions, key_positions):
        hidden = allowed.clone()
        hidden[:, 1:, -7] = False
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

    selftest_compact = self_test_module.compact
    monkeypatch.setattr(self_test_module, "compact", first_nodes)
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(target)


def test_dropout_is_named():
    model = family_model("GPT-2").train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        Target.wrap(model)
    Target.wrap(model.eval())


def counted(model):
    """The tokens of each forward that wrapping takes."""
    tokens = []
    handle = model.register_forward_hook(
        lambda _m, _a, kwargs, _o: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    Target.wrap(model)
    handle.remove()
    return tokens


def test_self_test_costs_four_short_forwards_and_leaves_no_trace():
    model = tiny_target().model
    config, names, state = copy.deepcopy(model.config.to_dict()), set(vars(model)), torch.get_rng_state()
    tokens = counted(model)
    assert len(tokens) == 4
    assert sum(tokens) < 60
    assert (model.config.to_dict(), set(vars(model))) == (config, names)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def long_window(size, **more):
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model("mistral", **GROUPED, sliding_window=size, **more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_long_window_costs_three_forwards_more_as_short_as_the_others():
    tokens = counted(long_window(4096))
    assert len(tokens) == 7
    assert max(tokens) < 40


@pytest.mark.sparing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 512, 4096])
def test_a_window_that_is_one_too_wide_is_caught_however_long_it_is(size, dtype):
    class Wider(Target):
        window = size + 1

    class None_(Target):
        def _masks(self, allowed, positions, key_positions):
            return super()._masks(allowed, positions, positions.max() + key_positions * 0)

    model = long_window(size).to(dtype)
    self_test(Target(model))
    for broken in (Wider, None_):
        with pytest.raises(UserError, match=f"where sliding_window = {size} is crossed"):
            self_test(broken(model))


@pytest.mark.parametrize("kind", CACHES)
def test_where_memory_is_short_only_positions_cross(monkeypatch, kind):
    monkeypatch.setattr(self_test_module, "LEAST", 0)
    lengths = []
    fill = self_test_module.fill
    monkeypatch.setattr(
        self_test_module,
        "fill",
        lambda cache, states, rows: lengths.append(states[0][0].shape[2]) or fill(cache, states, rows),
    )
    self_test(Target(long_window(4096), kind))
    assert set(lengths) == {self_test_module.SHORT}


def test_the_lengths_that_a_configuration_names():
    assert thresholds(family_config("Gemma 3")) == {WINDOW: "sliding_window"}
    assert thresholds(tiny_target().config) == {}
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert thresholds(tiny_config(rope_parameters=scaled)) == {64: "original_max_position_embeddings"}
    local = transformers.GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]])
    assert thresholds(local) == {256: "window_size"}
    chunked = transformers.Llama4TextConfig(attention_chunk_size=64, floor_scale=32)
    assert thresholds(chunked) == {32: "floor_scale", 64: "attention_chunk_size"}


def test_the_prompt_is_short_and_fits_the_positions():
    assert prompt_length(Target(family_model("Gemma 3"))) == self_test_module.SHORT
    assert prompt_length(Target(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, n_positions=10)))) == 2


@pytest.mark.parametrize(("own", "allowed"), [(0.08, 0.16), (0.3, 0.2)])
def test_bfloat16_may_differ_as_its_own_cache_does(monkeypatch, own, allowed):
    """SmolLM2's trees differ by 0.17 of the spread on a CPU with AMX, and by 0.16 where stock forwards resume."""
    differences = iter([0.15, own])
    monkeypatch.setattr(self_test_module, "difference", lambda *_: next(differences))
    assert next(trials(Target(tiny_target().model.to(torch.bfloat16)))) == ("", 0.15, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_formats_may_not(monkeypatch, dtype):
    monkeypatch.setattr(self_test_module, "difference", lambda *_: 0.15)
    with pytest.raises(UserError, match="cannot be a target"):
        self_test(Target(tiny_target().model.to(dtype)))


@pytest.mark.parametrize(("dtype", "coarse"), [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_what_rounds_coarsely(dtype, coarse):
    assert rounds_coarsely(tiny_target().model.to(dtype)) is coarse


def test_a_bfloat16_target_whose_trees_are_close_is_tried_no_further(monkeypatch):
    monkeypatch.setattr(self_test_module, "resumed_logits", None)
    assert next(trials(Target(tiny_target().model.to(torch.bfloat16))))[2] == 0.1


def test_only_coarse_targets_are_allowed_their_rounding():
    """A model whose own cache changes its logits is no target, whatever its format."""
    config = transformers.AutoConfig.for_model("gemma3_text", **GROUPED, **MIXED, use_bidirectional_attention=True)
    for seed in range(4):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert not is_quantised(model)
        assert next(trials(Target(model)))[2] == 1e-3
        with pytest.raises(UserError, match="cannot be a target"):
            Target.wrap(model)
