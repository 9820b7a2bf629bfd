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
from ctc_drafter.target.packed import PackedLinear, can_pack, multiplies_bfloat16, pack
from helpers import tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8]]


# Also where bfloat16 is not packed because the processor has no instructions for it: oneDNN computes it there as well.
DTYPES = [torch.float32, *[torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (17, 32), (3, 5, 32), (1, 1, 32), (0, 32)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_products_are_those_of_a_linear_layer(shape, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, bias).to(dtype)
    packed, states = PackedLinear.of(linear), torch.randn(shape, dtype=dtype)
    assert packed.weight is linear.weight
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2**-8, "rtol": 2**-7}  # one rounding
    torch.testing.assert_close(packed(states), linear(states), **near)
    every_other = torch.randn(*shape[:-1], 64, dtype=dtype)[..., ::2]
    torch.testing.assert_close(packed(every_other), linear(every_other), **near)


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


@pytest.mark.parametrize(
    ("dtype", "instructions", "expected"),
    [
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, True, False),
    ],
)
def test_what_is_packed(dtype, instructions, expected, monkeypatch):
    monkeypatch.setattr("ctc_drafter.target.packed.multiplies_bfloat16", lambda: instructions)
    assert can_pack(nn.Linear(8, 8).to(dtype)) == expected


def test_other_models_stay_as_they_are():
    half = tiny_target().model.to(torch.float16)
    half.model.embed_tokens.to(torch.float32)
    assert pack(half) == 0
    assert not any(isinstance(module, PackedLinear) for module in half.modules())


@torch.no_grad()
def test_drafts_read_packed_weights_until_they_change():
    """A drafter's own layers, too; training goes on with plain ones, and what it changed is packed anew."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    head = drafter.prepared(target.embed, target.head).head
    assert isinstance(head, PackedLinear) == (multiplies_bfloat16() or head.weight.dtype == torch.float32)
    layer = drafter.layers[0].mlp
    assert isinstance(layer.gate_proj, PackedLinear)
    states = torch.randn(1, drafter.config.hidden_size)
    drafter.train()
    assert not any(isinstance(module, PackedLinear) for module in drafter.modules())
    layer.gate_proj.weight.mul_(2)
    expected = layer.gate_proj(states)
    drafter.eval().prepared(target.embed, target.head)
    assert isinstance(layer.gate_proj, PackedLinear)
    torch.testing.assert_close(layer.gate_proj(states), expected)
    layer.gate_proj.weight.mul_(2)  # by somebody who does not say `train`
    drafter.prepared(target.embed, target.head)
    torch.testing.assert_close(layer.gate_proj(states), 2 * expected)


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
