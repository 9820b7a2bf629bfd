"""Targets of unusual shapes: every method's drafter is made for them and exact, or one line says no before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from benchmarks.steps import cached_bytes
from ctc_drafter import speculate
from ctc_drafter.decode.generate import generate
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import TRAINED, fresh_drafter, open_drafter
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.target.features import decoder_blocks, decoder_stack, final_norm
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer

VOCABULARY = 97
PROMPT, NEW = [3, 1, 4, 1, 5, 9, 2, 6], 8
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
SMALL = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FLASH = {
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    # head_dim differs by layer
    "gemma4_text": GROUPED | SLIDING | SMALL | {"global_head_dim": 16},
    # the width of the MLP is a list, blocks hand on several streams
    "gemma3n_text": GROUPED
    | SLIDING
    | SMALL
    | {"intermediate_size": [48, 64, 48], "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": None},
    # two of what counts as a layer are one block
    "longcat_flash": COMMON | LATENT | FLASH | {"num_layers": 3, "head_dim": 8, "num_key_value_heads": 4},
}
NARROW: dict[str, dict[str, Any]] = {
    "opt": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.5},
    "rembert": COMMON | {"input_embedding_size": 16, "output_embedding_size": 48, "is_decoder": True},
    "electra": COMMON | {"embedding_size": 16, "is_decoder": True},
}
CYCLES = GROUPED | {"H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 2}


def built(kind: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {key: value for key, value in sizes.items() if kind != "longcat_flash" or key != "num_hidden_layers"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


@cache
def model_of(kind: str) -> PreTrainedModel:
    return built(kind, {**SIZES, **NARROW, "hrm_text": CYCLES}[kind])


@cache
def expected(kind: str) -> list[int]:
    return continued(model_of(kind))


def continued(model: PreTrainedModel, **options: Any) -> list[int]:
    row = torch.tensor([PROMPT])
    fixed = {"attention_mask": torch.ones_like(row), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(row, max_new_tokens=NEW, **fixed, **options)[0, len(PROMPT) :].tolist()


def made(method: str, model: PreTrainedModel) -> TrainableDrafter:
    torch.manual_seed(1)
    short = {"frames": 5, "draft_length": 4} if method.startswith("ctc") else {"draft_length": 3}
    trained = TRAINED[method]
    return trained.drafter.for_target(model.config, **{**trained.usual, **trained.sizes, **short}).eval()


@pytest.mark.sparing(9)
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("kind", SIZES)
def test_a_drafter_is_made_saved_loaded_and_exact(kind: str, method: str, tmp_path: Path) -> None:
    model = model_of(kind)
    made(method, model).save_pretrained(tmp_path)
    drafter = open_drafter(str(tmp_path))
    assert continued(model, custom_generate=speculate(drafter, nodes=6, min_probability=0.0)) == expected(kind)


@pytest.mark.parametrize("kind", SIZES)
def test_a_fresh_drafter_reads_blocks_that_are_there(kind: str) -> None:
    """As `train` makes it, and its features are one state a token."""
    target = Target.wrap(model_of(kind))
    drafter = fresh_drafter(target, tiny_tokenizer(), 0)
    blocks = decoder_blocks(target.model)
    assert all("DecoderLayer" in type(block).__name__ for block in blocks)
    assert max(drafter.feature_layers) < len(blocks)
    features, last = target.hidden_states(torch.tensor([PROMPT, PROMPT]), drafter.feature_layers)
    assert features.shape == (2, len(PROMPT), 32 * len(drafter.feature_layers))
    assert last.shape == (2, len(PROMPT), 32)


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("kind", NARROW)
def test_embeddings_of_another_width_are_refused_before_anything_is_computed(kind: str, method: str) -> None:
    model = model_of(kind)
    drafter = made(method, model)
    decode = speculate(drafter)
    with pytest.raises(UserError, match=r"(embeddings|LM head)"):
        continued(model, custom_generate=decode)
    with forwards_of(model) as seen, pytest.raises(UserError, match=r"(embeddings|LM head)"):
        continued(model, custom_generate=decode)  # the target was tried in the first call
    assert seen == []
    with pytest.raises(UserError, match=r"(embeddings|LM head)"):
        drafter.begin(model.get_input_embeddings(), model.get_output_embeddings(), 1)


@contextmanager
def forwards_of(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """The model once for each of its forwards."""
    seen: list[nn.Module] = []
    handle = model.register_forward_pre_hook(lambda module, _: seen.append(module))
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", [*NARROW, "hrm_text"])
def test_prompt_lookup_needs_neither_features_nor_embeddings(kind: str) -> None:
    model = model_of(kind)
    assert continued(model, custom_generate=speculate(PromptLookup(), nodes=6, min_probability=0.0)) == expected(kind)


@pytest.mark.parametrize("method", TRAINED)
def test_blocks_that_cannot_be_told_are_refused_before_anything_is_computed(method: str) -> None:
    """Two stacks that run in turns: no list is as long as the model is deep."""
    model = model_of("hrm_text")
    decode = speculate(made(method, model))
    for forwards in (True, False):  # of the trial, in the first call
        with forwards_of(model) as seen, pytest.raises(UserError, match="decoder layers"):
            continued(model, custom_generate=decode)
        assert bool(seen) == forwards
    with pytest.raises(UserError, match="decoder layers"):
        fresh_drafter(Target.wrap(model), tiny_tokenizer(), 0, method)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # as deep as the text part
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
VISION_QWEN = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
PLANES = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
IMAGES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
PICTURES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": GROUPED | SLIDING,
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "llava": {
        "text_config": GROUPED | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 90,
    },
    "mistral3": {
        "text_config": GROUPED | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 90,
    },
    "qwen2_5_vl": {"text_config": GROUPED | PLANES, "vision_config": VISION_QWEN | {"patch_size": 4}, **IMAGES},
}


@pytest.mark.parametrize("kind", PICTURES)
def test_blocks_norm_and_embedding_are_those_of_the_text_part(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **PICTURES[kind], tie_word_embeddings=False)
    target = Target.wrap(AutoModelForImageTextToText.from_config(config).eval())
    holder, blocks = decoder_stack(target.model)
    assert holder is target.model.get_decoder()
    assert len(blocks) == 3
    assert final_norm(target.model) is holder.norm
    drafter = fresh_drafter(target, tiny_tokenizer(), 0, frames=5, draft_length=4).eval()
    found = generate(target, drafter, [PROMPT], max_new_tokens=NEW, nodes=6, min_probability=0.0, eos=()).tokens
    assert found == [continued(target.model)]


def test_a_token_s_keys_and_values_are_counted_layer_by_layer() -> None:
    """Two sliding layers with heads of 8 numbers and a full one with heads of 16, 2 heads each, keys and values."""
    config = model_of("gemma4_text").config
    assert cached_bytes(config, torch.float32) == 4 * 2 * 2 * (8 + 8 + 16)
