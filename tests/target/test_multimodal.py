"""Multimodal classes with text alone: their masks, positions and token types, as `generate` prepares them."""

import pytest
import torch

from ctc_drafter.decode.hf import speculate
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter
from multimodal import MODELS, build

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [0, 0, 0, 0, 2, 7]])
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2])}


@pytest.mark.sparing
@pytest.mark.parametrize("name", MODELS)
def test_text_gives_what_generate_gives(name):
    model = build(name)
    options = {"max_new_tokens": 40, "do_sample": False}
    plain = model.generate(**PADDED, **options)
    if name == "PaliGemma":  # stock writes otherwise in a padded batch than for its rows alone, which is what we write
        for row, begin in enumerate((0, 4)):
            plain[row, begin:] = model.generate(IDS[row : row + 1, begin:], **options)
    scripts = [plain[0].tolist(), plain[1, 4:].tolist()]
    for drafter in (PromptLookup(), ScriptedDrafter(scripts, (0, 3, 1, 4))):
        assert torch.equal(model.generate(**PADDED, **options, custom_generate=speculate(drafter)), plain)
    single = model.generate(IDS[:1], **options)
    assert torch.equal(model.generate(IDS[:1], **options, custom_generate=speculate(PromptLookup())), single)


@pytest.mark.parametrize("name", ["Gemma3", "Qwen2_5_VL"])
def test_a_drafter_that_reads_features(name):
    model = build(name)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**PADDED, **options)
    drafter = tiny_drafter(Target.wrap(model))
    assert torch.equal(model.generate(**PADDED, **options, custom_generate=speculate(drafter)), plain)


@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Glm4v"])
def test_several_sequences_of_planes_of_positions(name):
    model = build(name)
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "seeds": [1, 2, 3, 4]}
    together = model.generate(**PADDED, **options, custom_generate=speculate(PromptLookup()))
    options |= {"num_return_sequences": 1, "seeds": [3]}
    alone = model.generate(IDS[1:, 4:], **options, custom_generate=speculate(PromptLookup()))
    assert torch.equal(alone[0, 2:], together[2, 6:])


@pytest.mark.parametrize(("name", "types"), [("Gemma3", "token_type_ids"), ("Qwen2_5_VL", "mm_token_type_ids")])
def test_token_types_that_say_text(name, types):
    model = build(name)
    options = {"max_new_tokens": 12, "do_sample": False, types: torch.zeros_like(IDS)}
    plain = model.generate(**PADDED, **options)
    assert torch.equal(model.generate(**PADDED, **options, custom_generate=speculate(PromptLookup())), plain)
    with pytest.raises(UserError, match=types):
        model.generate(**PADDED, **options | {types: IDS % 2}, custom_generate=speculate(PromptLookup()))


def test_what_an_earlier_call_left_on_the_model_is_not_read():
    """Qwen-VL classes keep what `generate` made of the last call's images, for its rows."""
    model = build("Qwen2_5_VL")
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**PADDED, **options)
    model.model.rope_deltas = torch.full((3, 1), 5)
    drafter = PromptLookup()
    assert torch.equal(model.generate(**PADDED, **options, custom_generate=speculate(drafter)), plain)
    model.model.rope_deltas = torch.full((3, 1), 5)
    Target.wrap(model)
