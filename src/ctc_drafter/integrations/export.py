"""Exports drafters in the `speculators` format: CTC drafters for vLLM with our plugin, DFlash drafters for plain vLLM.

Source of the format: vLLM, `transformers_utils/configs/speculators`. Beside its keys stand those of a plain DFlash
checkpoint, which SGLang reads: one folder serves both. Tensors keep their names and their dtype; those that
no engine knows (the copying bias) stay out, drafts are then made without them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from ctc_drafter.drafters.baselines.dflash import DFlashDrafter
from ctc_drafter.drafters.block import BlockModel
from ctc_drafter.drafters.ctc import COPYING, CTCDrafter
from ctc_drafter.drafters.registry import method_of
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.integrations.settings import ARCHITECTURE, FORMAT, HeadSettings
from ctc_drafter.types import UserError, own_code

# Of the draft layers (DFlash's) and of the head; see `docs/design.md`.
PARTS = {"fc", "hidden_norm", "layers", "norm", "blank_head", "predictor", "joint", "carry", "carry_root", "d2t"}


def export(drafter: TrainableDrafter, target: PreTrainedConfig, name: str, out: Path, width: int = 8) -> list[str]:
    """Writes `config.json` and `model.safetensors`; returns the parts of the drafter that stay out.

    name: where engines find the target. width: prefixes of each length that the search of a CTC drafter keeps. Raises
    `UserError` when the folder holds something, for drafters of other methods than ctc and dflash and those with parts
    that no engine runs, or when the target's embedding does what engines would not repeat.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give --out a new folder")
    if isinstance(drafter, BlockModel) and drafter.config.convolution:
        raise UserError("no engine runs a drafter with convolutions yet; train one with --no-convolution")
    if type(drafter) is CTCDrafter:
        config = ctc_config(drafter, target, name, width)
    elif isinstance(drafter, DFlashDrafter):
        config = dflash_config(drafter, target, name)
    else:
        raise UserError(f"drafters of methods ctc and dflash can be exported, and this one is of {method_of(drafter)}")
    tensors = {key: tensor.contiguous() for key, tensor in drafter.state_dict().items()}
    whole = {key: tensor for key, tensor in tensors.items() if not key.startswith(COPYING)}
    known = {key: tensor for key, tensor in whole.items() if key.split(".")[0] in PARTS}
    out.mkdir(parents=True, exist_ok=True)
    try:
        save_file(known, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        for half in ("model.safetensors", "config.json"):  # the folder must be empty for the next try
            (out / half).unlink(missing_ok=True)
        raise
    copies = {COPYING.rstrip(".")} if len(whole) < len(tensors) else set()
    return sorted({key.split(".")[0] for key in whole.keys() - known.keys()} | copies)


def ctc_config(drafter: CTCDrafter, target: PreTrainedConfig, name: str, width: int) -> dict[str, Any]:
    """The whole `config.json` of a CTC drafter, which our plugin reads."""
    own = drafter.config
    copied = {key: getattr(own, key) for key in HeadSettings.__dataclass_fields__ if hasattr(own, key)}
    head = HeadSettings(**copied, embedding_scale=embedding_scale(target), width=width)
    config = speculators_config(drafter, target, name)
    return config | named(FORMAT, ARCHITECTURE, config) | {"ctc_config": asdict(head)}


def dflash_config(drafter: DFlashDrafter, target: PreTrainedConfig, name: str) -> dict[str, Any]:
    """The whole `config.json` of a DFlash drafter, as vLLM's own class reads it, without our plugin.

    Raises `UserError` for parts that class has not.
    """
    if drafter.config.carry:
        raise UserError("vLLM's own DFlash class carries nothing into the block; train one with --no-carry")
    if (scale := embedding_scale(target)) != 1:
        raise UserError(
            f"the target multiplies its embeddings by {scale:g}, which vLLM's own DFlash class does not repeat; "
            "train --method ctc, which our plugin runs"
        )
    config = speculators_config(drafter, target, name)
    return config | named("dflash", "DFlashDraftModel", config)


def named(format_name: str, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config that say whose class runs the drafter."""
    algorithm = config["speculators_config"] | {"algorithm": format_name}
    return {
        "architectures": [architecture],
        "speculators_model_type": format_name,
        "speculators_config": algorithm,
    }


def speculators_config(drafter: BlockModel, target: PreTrainedConfig, name: str) -> dict[str, Any]:
    """What the configs of all block drafters have.

    The `speculators` format counts a feature by the block that it goes into, `dflash_config` by the one that it leaves.
    """
    own = drafter.config
    if own.target_layer_ids != sorted(set(own.target_layer_ids)):
        raise UserError(
            f"engines sort the target's layers, and the drafter reads {own.target_layer_ids}; train another"
        )
    layers = Qwen3Config(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads,
        num_key_value_heads=own.num_key_value_heads,
        head_dim=own.head_dim,
        rms_norm_eps=own.rms_norm_eps,
        max_position_embeddings=own.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": own.rope_theta},
        tie_word_embeddings=False,
        dtype=drafter.dtype,
    )
    proposal = {"proposal_type": "greedy", "speculative_tokens": drafter.frames}
    dflash = {"mask_token_id": own.mask_token_id, "target_layer_ids": own.target_layer_ids}
    return {
        **layers.to_dict(),
        "model_type": layers.model_type,
        "num_target_layers": own.target_num_layers,
        "block_size": 1 + drafter.frames,
        "dflash_config": dflash,
        "speculators_config": {
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": name, "architectures": target.architectures or []},
        },
        "transformer_layer_config": layers.to_dict(),
        "aux_hidden_state_layer_ids": [layer + 1 for layer in own.target_layer_ids],
        "mask_token_id": own.mask_token_id,
    }


def embedding_scale(target: PreTrainedConfig) -> float:
    """Factor that the target's embedding module applies, as Gemma's does. vLLM does so outside of the module."""
    with torch.device("meta"):
        text = target.get_text_config(decoder=True)
        embed = AutoModelForCausalLM.from_config(text, trust_remote_code=own_code(text)).get_input_embeddings()
    if type(embed) is torch.nn.Embedding:
        return 1.0
    scale = getattr(embed, "scalar_embed_scale", None)
    if scale is None:
        raise UserError(f"the target's embedding is a {type(embed).__name__}, which cannot be exported")
    return float(scale)
