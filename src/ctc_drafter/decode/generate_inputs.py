"""What `generate` prepared for the model, checked before it is read: mask, positions, cache, pictures."""

from __future__ import annotations

import inspect
from collections.abc import Sized
from typing import Any

import torch
from transformers import PreTrainedModel

from ctc_drafter.types import UserError

# What `generate` prepares for every callable, and we make ourselves.
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
TEXT_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 says "text" in multimodal models
# Main inputs of the encoders that `generate` has run by then: image and video features lie under these names.
ENCODED = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
VISUAL = ("pixel_", "image", "video")
BESIDE_PICTURES = {*TEXT_TYPES, "moe_mm_token_type_ids", "mm_encoder_outputs", "second_per_grid_ts"}
SOUND = ("audio", "input_features", "input_values", "feature_attention_mask")


def refuse_inputs(model: PreTrainedModel, input_ids: torch.Tensor, prepared: dict[str, Any]) -> torch.Tensor:
    """The mask `int64 [B, T]` of the prompts' tokens. Raises `UserError` for inputs other than ids from position 0 on,
    and pictures in them.

    What asks for nothing is let through: None, what is empty, and token types that say "text" everywhere.
    """
    if given(prepared.get("inputs_embeds")) or not input_ids.numel():
        raise UserError("speculate reads token ids, not embeddings; call generate with input_ids")
    pictures = has_pictures(prepared)
    for name in sorted(prepared.keys() - PREPARED):
        beside = pictures and (name in BESIDE_PICTURES or name.startswith(VISUAL))
        if asks(model, name, prepared[name]) and not beside:
            raise refusal(model, name, pictures)
    cache = prepared.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UserError("speculate reads the whole prompt itself; leave out past_key_values")
    mask = prompt_mask(input_ids, prepared.get("attention_mask"))
    if not pictures:
        refuse_positions(prepared.get("position_ids"), mask)
    return mask


def refuse_encoder(model: PreTrainedModel) -> None:
    """Raises `UserError` for encoder-decoder models, before their other inputs are looked at."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UserError(f"{kind} is an encoder-decoder model; speculate needs a decoder-only causal LM")


def has_pictures(prepared: dict[str, Any]) -> bool:
    """Whether there are images or videos: their pixels, or what the model's encoders made of them."""
    return any(given(prepared.get(name)) for name in (*ENCODED, "mm_encoder_outputs"))


def given(value: Any) -> bool:
    """Whether an input is given and not empty."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, dict):
        return any(given(part) for part in value.values())
    return value is not None and not (isinstance(value, Sized) and not len(value))


def asks(model: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether this input would change what the model reads."""
    if name in TEXT_TYPES and isinstance(value, torch.Tensor):
        multimodal = model.config.get_text_config(decoder=True) is not model.config
        return bool(value.any()) or (name == "token_type_ids" and not multimodal)
    return given(value) and not (value is False and name.startswith("output_"))


def refusal(model: PreTrainedModel, name: str, pictures: bool) -> UserError:
    """Error message for an input that cannot be honoured."""
    if name.startswith(SOUND):
        return UserError(f"speculate reads text and pictures, no sound; leave out {name}")
    if pictures:
        return UserError(f"speculate cannot hand {name} to {type(model).__name__} beside pictures; leave it out")
    return UserError(f"speculate cannot hand {name} to the model; leave it out")


def passed_name(model: PreTrainedModel, inputs: dict[str, Any]) -> str:
    """The name that the user passed pictures by, of which `generate` may have made something else by now."""
    found = next((name for name in ENCODED if given(inputs.get(name))), None)
    if found is not None:
        return found
    encoded = inputs.get("mm_encoder_outputs") or {}
    kind = next((key for key, part in encoded.items() if given(part)), "image")
    encoder = getattr(model.base_model, f"get_{kind}_features", None)
    accepted = inspect.signature(encoder).parameters if encoder is not None else {}
    return next((main for main in ENCODED if main in accepted), "mm_encoder_outputs")


def prompt_mask(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`int64 [B, T]`, 1 for tokens and 0 for padding. Raises `UserError` where the last column is padding.

    There stock `generate` warns, and goes on from what the model says of a pad token.
    """
    if mask is None:
        return torch.ones_like(input_ids)
    mask = mask.to(input_ids.device)
    if mask.shape != input_ids.shape:
        shapes = f"{list(mask.shape)}, that of input_ids {list(input_ids.shape)}"
        raise UserError(f"the shape of attention_mask is {shapes}; give a 0 or 1 for each token")
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("attention_mask holds other values than 0 and 1; give a 1 for each token, 0 for padding")
    empty, ended = (mask == 0).all(1), mask[:, -1] == 0
    if empty.any():
        raise UserError(f"the attention mask of row {int(empty.int().argmax())} is all zeros; give it a token")
    if ended.any():
        raise UserError(
            f"row {int(ended.int().argmax())} is padded on the right: its attention mask, given or made from pad "
            'tokens, ends in 0; pad on the left (tokenizer.padding_side = "left")'
        )
    return mask.long()


def refuse_positions(positions: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Raises `UserError` unless positions `[B, T]`, or each of several planes `[P, B, T]`, count tokens from 0.

    Models whose positions tell time, height and width apart get such planes, which are all the same for text.
    """
    if positions is None:
        return
    usual = mask.cumsum(-1) - 1
    planes = positions.to(usual)
    fits = planes.shape[-1] == usual.shape[1] and planes.shape[-2] in (1, len(usual)) and planes.dim() in (2, 3)
    if not fits or not ((planes == usual) | (mask == 0)).all():
        raise UserError("speculate counts positions from 0; leave out position_ids")
