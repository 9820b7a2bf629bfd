"""Targets whose weights are not plain tensors: torchao's int8 and bitsandbytes, loaded through from_pretrained."""

import warnings

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig

from benchmarks.families import NEW_TOKENS, PROMPTS, exact, family_model
from benchmarks.family_checks import stock_continuations
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.lm_head import draft_head
from ctc_drafter.evaluate.exactness import ScriptedDrafter
from ctc_drafter.load import Loading
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.target.packed import PackedLinear, pack
from ctc_drafter.target.self_test import trials
from helpers import tiny_target

pytest.importorskip("torchao")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own, when it looks for its compiled kernels
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def int8(folder, config, **options) -> Target:
    family_model("Llama").save_pretrained(folder)
    return Target.load(str(folder), quantization_config=TorchAoConfig(config, **options))


@pytest.mark.parametrize("everything", [False, True], ids=["blocks", "embedding and head too"])
def test_int8_weights_decode_exactly(tmp_path, everything):
    target = int8(tmp_path, Int8WeightOnlyConfig(), include_input_output_embeddings=everything)
    projection = target.model.model.layers[0].self_attn.q_proj.weight
    assert type(projection) is not nn.Parameter
    assert (type(target.head.weight) is not nn.Parameter) == everything
    assert (target.dtype, target.device.type) == (torch.float32, "cpu")
    assert torch.isfinite(target.norm_scale).all()
    expected = stock_continuations(target.model, PROMPTS, NEW_TOKENS)
    assert expected != stock_continuations(family_model("Llama"), PROMPTS, NEW_TOKENS)
    for kind in CACHES:
        assert exact(Target.wrap(target.model, kind), expected)


def test_quantised_layers_are_not_packed(tmp_path):
    """Packing would take the dequantised weights, or fail."""
    target = int8(tmp_path, Int8WeightOnlyConfig())
    expected = plain_generate(target, [[3, 1, 4, 1, 5]], max_new_tokens=8, eos=()).tokens
    assert pack(target.model) == 1  # the LM head
    assert isinstance(target.head, PackedLinear)
    assert type(target.model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert plain_generate(Target.wrap(target.model), [[3, 1, 4, 1, 5]], max_new_tokens=8, eos=()).tokens == expected


def test_a_quantised_head_is_drafted_with_as_it_is(tmp_path):
    target = int8(tmp_path, Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    assert draft_head(target.head) is target.head
    drafter = CTCDrafter.for_target(target.config, frames=3, draft_length=2, predictor_rank=4, predictor_width=8)
    blocks = torch.randn(2, 4, target.hidden_size)
    tokens, _ = drafter.frame_logits(blocks, target.head)
    assert torch.equal(tokens.flatten(0, 1), target.head(blocks[:, 1:].flatten(0, 1)).float())


def test_rounded_activations_are_told_from_a_wrong_target(tmp_path):
    """Their own rounding is larger than float32's tolerance: the trial allows for it, and decoding runs."""
    target = int8(tmp_path, Int8DynamicActivationInt8WeightConfig())
    _, error, tolerance = next(trials(target))
    assert 1e-3 < error < tolerance
    drafter = CTCDrafter.for_target(target.config, frames=3, draft_length=2, predictor_rank=4, predictor_width=8)
    prompts = [list(prompt) for prompt in PROMPTS]
    found = generate(target, drafter.eval(), prompts, max_new_tokens=4).tokens
    assert [len(row) for row in found] == [len(row) for row in plain_generate(target, prompts, max_new_tokens=4).tokens]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("saved", [False, True], ids=["while it loads", "as it was saved"])
def test_bitsandbytes_on_a_cpu(tmp_path, bits, saved):
    """Sizes are multiples of 64: where a CPU has AVX512_BF16, its 4-bit kernel takes no others."""
    pytest.importorskip("bitsandbytes")
    model = tiny_target(intermediate_size=128, initializer_range=0.5).model
    model.save_pretrained(tmp_path)
    target = Target.load(str(tmp_path), **Loading(bits=bits, device="cpu").options())
    if saved:
        target.model.save_pretrained(tmp_path / "saved")
        target = Target.load(str(tmp_path / "saved"))
    assert type(target.model.model.layers[0].self_attn.q_proj).__name__ == f"Linear{bits}bit{'Lt' if bits == 8 else ''}"
    expected = stock_continuations(target.model, PROMPTS, NEW_TOKENS)
    assert expected != stock_continuations(model, PROMPTS, NEW_TOKENS)
    drafter = ScriptedDrafter(
        [[*p, *e] for p, e in zip(PROMPTS, expected, strict=True)], (0, 3, 1, 4), target.vocab_size
    )
    prompts = [list(prompt) for prompt in PROMPTS]
    for each, text in zip(prompts, expected, strict=True):
        found = generate(target, drafter, [each], max_new_tokens=NEW_TOKENS, eos=()).tokens
        if bits == 4:
            assert found == [text]
        else:  # activations are rounded too, by what else is in the forward: near-ties may go either way
            assert [len(row) for row in found] == [len(text)]
