"""Tiny random models of every causal LM in transformers, with low length thresholds.

One table of small sizes, filtered by what a configuration class declares, builds most types; `family_table.py` has
what is left. Sliding windows, chunks and original contexts of scaled rotary embeddings are shorter than the texts that
`families.py` decodes, so that whatever a model does differently beyond them shows.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.family_table import CHUNK, CONTEXT, LAYERS, OVERRIDES, VOCABULARY, WINDOW, Family

SPREAD = 0.5
CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PICTURES: dict[str, str] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
LARGEST = 20_000_000  # parameters: what stays larger is not small

# By the name of the field, whatever the class.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "intermediate_size_mlp", "dff", "dim_ff"), 48),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "dim_head", "d_head"), 8),
    **dict.fromkeys(("swa_head_dim", "index_head_dim", "global_head_dim", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), CONTEXT),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("local_attention",), 2 * WINDOW),
    **dict.fromkeys(("keep_window_size",), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "mamba_chunk_size"), CHUNK),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), CHUNK),
    "attn_scale": 1.0,
    "log_scaling_alpha": 1.0,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "index_n_heads": 2,
    "index_topk": WINDOW,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "projector_hidden_size": 32,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 4,
    "mamba_d_state": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied ones repeat the last token
    "is_decoder": True,
}
# Text comes alone, so towers for pictures and sound need only exist.
TOWER: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "depth": 1,
    "num_hidden_layers": 1,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim", "embed_dim"), 32),
    **dict.fromkeys(("base_channels", "latent_channels", "num_embeddings"), 32),
}


def declared(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Fields of a configuration class, with defaults."""
    if dataclasses.is_dataclass(kind):
        return {entry.name: entry.default for entry in dataclasses.fields(kind)}
    return {name: entry.default for name, entry in inspect.signature(kind.__init__).parameters.items()}


def cycle(kinds: Iterable[Any]) -> list[Any]:
    """The distinct entries of a list that has one a layer, in turn for the layers there are."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[layer % len(distinct)] for layer in range(LAYERS)]


def small(kind: type[PreTrainedConfig], sizes: dict[str, Any], tower: bool = False) -> PreTrainedConfig:
    """A small configuration of a class; `sizes` come last, those of parts as dictionaries under the part's name."""
    fields = declared(kind)
    default = kind()
    sizes = OVERRIDES.get(kind.model_type, {}) | sizes
    chosen = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has no groups
        chosen |= {"num_key_value_heads": 4}
    if tower:
        chosen |= {name: value for name, value in TOWER.items() if name in fields}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        if name in fields and getattr(default, name, None) and not tower:
            chosen[name] = cycle(getattr(default, name))
    parts = getattr(kind, "sub_configs", {})
    for name in parts:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            chosen[name] = small(type(part), sizes.get(name, {}), tower or "text" not in name)
    chosen |= {name: value for name, value in sizes.items() if name not in parts or name not in chosen}
    return kind(**copy.deepcopy(chosen))  # some configurations write into the dictionaries that they are given


def small_config(family: Family) -> PreTrainedConfig:
    """The small configuration of a family. Raises what its class raises where it cannot be built."""
    kind = CONFIG_MAPPING[family.model_type]
    return small(kind, family.sizes)


def small_model(family: Family, kernel: str | None = None) -> PreTrainedModel:
    """A small model with large random weights, the same each time. Raises whatever its class raises."""
    names = PICTURES if family.multimodal else CAUSAL
    kind = getattr(transformers, names[family.model_type])
    config = small_config(family)
    if not isinstance(config, kind.config_class):  # the text half of a larger model
        config = config.get_text_config(decoder=True)
    options = {} if kernel is None else {"attn_implementation": kernel}
    with torch.device("meta"):
        count = kind._from_config(config, **options).num_parameters()
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.1f} million parameters are not small")
    torch.manual_seed(2)
    model = kind._from_config(config, **options).eval()
    model.generation_config = GenerationConfig()  # some force or suppress tokens of their real vocabulary
    shake(model)
    return model


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """Redraws every matrix large and every vector a little: what a token sees must show in its logits."""
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim > 1:
            parameter.copy_(SPREAD * noise)
        elif parameter.is_floating_point():
            parameter.add_(0.1 * noise)
