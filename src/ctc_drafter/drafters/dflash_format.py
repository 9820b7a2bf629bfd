"""The config.json of published DFlash and DFlash 2 drafters.

Source: z-lab/dflash on GitHub (`DFlashDraftModel`, `DFlash2DraftModel`; tensors as in `layers.py` and
`baselines/dflash2.py`). `block_size` counts the root; it stands at the top or, in DFlash 2, in `dflash_config`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ctc_drafter.types import UserError

logger = logging.getLogger(__name__)

# What another method may take over with the draft layers.
SHARED = {
    *("target_layer_ids", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "mask_token_id"),
    *("carry", "carry_rank", "carry_root"),
}
DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


def is_dflash(config: Mapping[str, Any]) -> bool:
    named = {"DFlashDraftModel", "DFlash2DraftModel"} & set(config.get("architectures") or ())
    return "dflash_config" in config or bool(named)


def is_dflash2(config: Mapping[str, Any]) -> bool:
    return "DFlash2DraftModel" in (config.get("architectures") or ()) or "selector_rank" in _own(config)


def _own(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a DFlash config.json says of drafting."""
    own = config.get("dflash_config")
    return own if isinstance(own, Mapping) else {}


def dflash_sizes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a `DFlashConfig`. Raises `UserError` for a config.json of something else, also of a CTC drafter that was
    exported for engines: its frames are not a token each."""
    own = _own(config)
    if "ctc_config" in config:
        raise UserError(f"{name} was exported for other engines; give the folder of the drafter that it was made of")
    if own.get("causal") or config.get("is_causal"):
        logger.warning("%s has causal blocks, whose places see each other both ways here", name)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        logger.warning("%s scales its rotary positions, which is left out here", name)
    if "sliding_attention" in (config.get("layer_types") or ()):
        logger.warning("%s has sliding layers, which see everything here", name)
    sizes = {key: config[key] for key in (SHARED | {"vocab_size", "hidden_size"}) & config.keys()}
    try:
        sizes |= {key: own.get(key, config.get(key)) for key in ("target_layer_ids", "mask_token_id")}
        sizes |= {
            "target_num_layers": config["num_target_layers"],
            "draft_length": own.get("block_size", config.get("block_size")) - 1,
        }
        sizes["rope_theta"] = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}'s config.json is not DFlash's: {error!r} is missing or wrong") from error
    if None in sizes.values():
        missing = next(key for key, value in sizes.items() if value is None)
        raise UserError(f"{name}'s config.json is not DFlash's: {missing} is missing")
    return sizes | {"carry": False, "carry_rank": 0, "carry_root": False}


def dflash2_sizes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """As `dflash_sizes`, with convolutions and selector. Raises `UserError` for blocks that see one way only."""
    own = dict(config) | dict(_own(config))
    if own.get("is_causal") or own.get("causal"):
        raise UserError(
            f"{name} is a DFlash 2 drafter with causal blocks, which cannot be read yet; use another drafter"
        )
    missing = next((key for key in DFLASH2_KEYS if not isinstance(own.get(key), int)), None)
    if missing:
        raise UserError(f"{name}'s config.json is not DFlash 2's: {missing} is missing or wrong")
    return dflash_sizes(name, config) | {key: own[key] for key in DFLASH2_KEYS}
