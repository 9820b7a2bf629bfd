"""Multimodal classes with text alone: their masks, positions and token types, as `generate` prepares them."""

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from ctc_drafter.decode.hf import speculate
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter

TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1}
TOWER = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
PIXELS = {"image_size": 28, "patch_size": 14}
QWEN = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
EXPERTS = {"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2, "mlp_layer_types": ["dense", "sparse"]}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [0, 0, 0, 0, 2, 7]])
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2])}

# Class name without its ending -> what its configuration is made of.
MODELS = {
    "Gemma3": {
        "text_config": TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": TOWER | PIXELS,
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": TOWER | PIXELS | {"model_type": "pixtral"},
        "image_token_index": 90,
    },
    "Llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER | PIXELS | {"model_type": "clip_vision_model"},
        "image_token_index": 90,
    },
    "InternVL": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": TOWER | {"image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 90,
    },
    "Qwen2VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1},
        **QWEN,
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]},
        **QWEN,
    },
    "Qwen3VL": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": VISION
        | {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **QWEN,
    },
    "Glm4v": {
        "text_config": TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        "vision_config": VISION | {"out_hidden_size": 64, "image_size": 28},
        "image_token_id": 90,
    },
    "Ernie4_5_VLMoe": {
        "text_config": TEXT | EXPERTS | {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
        "vision_config": VISION | {"text_hidden_size": 64, "vision_hidden_size": 32},
    },
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_text_gives_what_generate_gives(name):
    model = build(name)
    options = {"max_new_tokens": 40, "do_sample": False}
    plain = model.generate(**PADDED, **options)
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


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("Gemma3", {"pixel_values": torch.zeros(1, 3, 28, 28)}),
        ("Llava", {"pixel_values": torch.zeros(1, 3, 28, 28)}),
        ("Qwen2_5_VL", {"pixel_values": torch.zeros(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])}),
        ("Qwen2_5_VL", {"pixel_values_videos": torch.zeros(4, 1176), "video_grid_thw": torch.tensor([[1, 2, 2]])}),
    ],
)
def test_images_are_refused_by_the_name_of_what_was_passed(name, inputs):
    model = build(name)
    ids = torch.tensor([[3, 90, 90, 90, 90, 9]])
    with pytest.raises(UserError, match=f"text alone; leave out {next(iter(inputs))}$"):
        model.generate(ids, **inputs, max_new_tokens=4, custom_generate=speculate(PromptLookup()))
