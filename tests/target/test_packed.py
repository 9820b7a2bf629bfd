"""Packed linear layers: the same products, the same answers, and plain layers wherever something else is asked."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.load import load_target
from ctc_drafter.quickstart import TARGET_DIR
from ctc_drafter.steps import Steps
from ctc_drafter.target import compiled
from ctc_drafter.target.model import Target
from ctc_drafter.target.packed import PackedLinear, can_pack, pack
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8]]


@pytest.mark.parametrize("shape", [(1, 32), (17, 32), (3, 5, 32), (1, 1, 32), (0, 32)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_products_are_those_of_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, bias)
    packed, states = PackedLinear.of(linear), torch.randn(shape)
    assert packed.weight is linear.weight
    torch.testing.assert_close(packed(states), linear(states), atol=1e-5, rtol=1e-5)
    every_other = torch.randn(*shape[:-1], 64)[..., ::2]
    torch.testing.assert_close(packed(every_other), linear(every_other), atol=1e-5, rtol=1e-5)


def test_gradients_copies_and_other_dtypes_are_a_linear_layers():
    packed = PackedLinear.of(nn.Linear(8, 4))
    states = torch.randn(2, 8, requires_grad=True)
    packed(states).sum().backward()
    assert states.grad is not None
    other = copy.deepcopy(packed)
    assert type(other) is nn.Linear
    assert other.weight is not packed.weight
    assert torch.equal(other.weight, packed.weight)
    with torch.no_grad():
        assert copy.deepcopy(packed).to(torch.bfloat16)(states.bfloat16()).dtype == torch.bfloat16


def test_a_packed_target_writes_the_same():
    plain, packed = tiny_target(), tiny_target()
    names = list(packed.model.state_dict())
    assert pack(packed.model) == 3 * 7 + 1
    assert list(packed.model.state_dict()) == names
    target = Target.wrap(packed.model)
    expected = plain_generate(plain, PROMPTS, max_new_tokens=24, eos=()).tokens
    assert plain_generate(target, PROMPTS, max_new_tokens=24, eos=()).tokens == expected
    assert generate(target, PromptLookup(), PROMPTS, max_new_tokens=24, eos=()).tokens == expected


def test_layers_that_are_more_than_linear_stay_as_they_are():
    """Weights of another type (torchao), hooks, and a forward of their own (accelerate's offloading)."""

    class Weights(torch.Tensor):
        pass

    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    model[0].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Weights))
    model[1].register_forward_hook(lambda *_: None)
    model[2].forward = model[2].forward
    assert pack(model) == 1
    assert [isinstance(layer, PackedLinear) for layer in model] == [False, False, False, True]


def test_other_models_stay_as_they_are():
    half = tiny_target().model.to(torch.bfloat16)
    assert not can_pack(half)
    assert pack(half) == 0
    assert not any(isinstance(module, PackedLinear) for module in half.modules())


@pytest.mark.parametrize("packed", [True, False])
def test_commands_load_small_float32_targets_packed(packed):
    target, _ = load_target(str(TARGET_DIR), "float32", "cpu", packed=packed)
    layers = [module for module in target.model.modules() if isinstance(module, nn.Linear)]
    assert layers
    assert all(isinstance(layer, PackedLinear) == packed for layer in layers)


def test_exact_steps_have_products_of_their_own():
    """They redirect the calls of linear layers, and look for these."""
    target = tiny_target(num_hidden_layers=1)
    names, embedded = list(target.model.state_dict()), target.model.lm_head.weight
    assert pack(target.model)
    Steps(exact=True).of(target, [], 0, 1)
    assert not any(isinstance(module, PackedLinear) for module in target.model.modules())
    assert list(target.model.state_dict()) == names
    assert target.model.lm_head.weight is embedded


@pytest.mark.usefixtures("quiet_tracing")
def test_compiled_steps_share_the_blocks(monkeypatch):
    """Prompts run as they did, and weights are not laid out a third time."""
    monkeypatch.setattr(compiled, "compile_target", partial(compiled.compile_target, backend="eager"))  # takes seconds
    target = tiny_target(num_hidden_layers=1)
    assert pack(target.model)
    made = Steps(compiled=True).of(target, [], 0, 1)
    assert isinstance(made.model.lm_head, PackedLinear)
    assert made.regions.model.lm_head.blocks.tensor is made.model.lm_head.blocks
