"""Tiny random multimodal models, and prompts with pictures for them as their processors would make them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

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

# Class name without its ending -> what its configuration is made of.
MODELS = {
    "Gemma3": {
        "text_config": TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": TOWER | PIXELS,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,  # tied ones repeat the last token
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
    "SmolVLM": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER | {"image_size": 56, "patch_size": 14},
        "scale_factor": 2,
        "image_token_id": 90,
    },
    "Idefics3": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER | {"image_size": 56, "patch_size": 14},
        "scale_factor": 2,
        "image_token_id": 90,
    },
    "PaliGemma": {
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": TOWER | PIXELS | {"model_type": "siglip_vision_model", "projection_dim": 64},
        "projection_dim": 64,
        "image_token_index": 90,
    },
    "Ernie4_5_VLMoe": {
        "text_config": TEXT | EXPERTS | {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
        "vision_config": VISION | {"text_hidden_size": 64, "vision_hidden_size": 32},
        "image_token_id": 90,
        "video_token_id": 91,
    },
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    if name == "Gemma3":  # which begins with zeros: no picture would differ from another
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


PICTURE = -1  # in a prompt: a picture stands here
PLACEHOLDER = 90
# Tokens of the first and the second picture, and so in turn; grids are of (time, height, width) patches.
GRIDS = ((1, 4, 4), (1, 2, 6))
PATCH = {"Qwen3VL": 1536, "Glm4v": 1176, "Ernie4_5_VLMoe": 588}


def prompts(name: str, rows: list[list[int]], seed: int = 1) -> dict[str, Any]:
    """What the processor of such a model makes of prompts with `PICTURE`s, padded on the left: ids, mask, token types
    and pixels, which the seed says."""
    noise = torch.Generator().manual_seed(seed)
    total = sum(row.count(PICTURE) for row in rows)
    grids = [GRIDS[number % 2] for number in range(total)]
    gridded = name.startswith(("Qwen", "Glm", "Ernie"))
    sizes = [h * w // 4 if gridded else 1 if name == "InternVL" else 4 for _, h, w in grids]
    left = iter(sizes)
    texts = [[each for token in row for each in spread(token, left)] for row in rows]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    types = (ids == PLACEHOLDER).int()
    if name in ("Gemma3", "PaliGemma"):
        found["token_type_ids"] = types
    if gridded:
        found |= {"mm_token_type_ids": types} | ({"moe_mm_token_type_ids": types} if name.startswith("Ernie") else {})
    if not total:
        return found
    if gridded:
        patches = sum(h * w for _, h, w in grids)
        pixels = torch.randn(patches, PATCH.get(name, 1176), generator=noise)
        return found | {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
    side = 56 if name in ("SmolVLM", "Idefics3", "Mistral3") else 28
    pixels = torch.randn(total, 3, side, side, generator=noise)
    if name in ("SmolVLM", "Idefics3"):  # `[B, pictures, ...]`, where zeros are no picture
        each, most = iter(pixels), max(row.count(PICTURE) for row in rows)
        pixels = torch.zeros(len(rows), most, 3, side, side)
        for place, row in enumerate(rows):
            for number in range(row.count(PICTURE)):
                pixels[place, number] = next(each)
    if name == "Mistral3":
        found["image_sizes"] = torch.tensor([[side, side]] * total)
    return found | {"pixel_values": pixels}


def spread(token: int, sizes: Iterator[int]) -> list[int]:
    """A token, or the placeholders of the next picture."""
    return [PLACEHOLDER] * next(sizes) if token == PICTURE else [token]
