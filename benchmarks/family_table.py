"""Model types and configurations of the family sweep, with sizes that differ from the generic ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 97
WINDOW = 8
CHUNK = 16
ORIGINAL = 24  # context before rotary embeddings are scaled
WIDER = 24  # the same for windows
CONTEXT = 512
LAYERS = 3


@dataclass(frozen=True)
class Family:
    """One configuration of one model type.

    name: on the page. sizes: set beside the generic ones. multimodal: the class for pictures, given text alone.
    short: texts end before `ORIGINAL`, the largest context that this configuration has.
    """

    name: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    multimodal: bool = False
    short: bool = False


KINDS = ("full_attention", "sliding_attention")
ALL_FULL: dict[str, Any] = {"layer_types": ["full_attention"] * LAYERS}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
MROPE: dict[str, Any] = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": ORIGINAL,
    },
    "original_max_position_embeddings": ORIGINAL,
}
MSCALED: dict[str, Any] = {"rope_parameters": LONGROPE["rope_parameters"] | {"short_mscale": 1.1, "long_mscale": 1.2}}
YARN: dict[str, Any] = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3: dict[str, Any] = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UPPER_SLIDE: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 1}
SPARSE = ("minimax_m3_sparse", "full_attention")
DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
SCANNED: dict[str, Any] = {"chunk_size": CHUNK}  # texts are padded to whole chunks, which are 256 wide by default
SHARED: dict[str, Any] = {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8}
PICTURE_TOKEN: dict[str, Any] = {"vocabulary_map": {"<image>": VOCABULARY - 1}}

# Sizes that differ from the generic ones, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "chameleon": PICTURE_TOKEN,
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {kind: ROPE | {"mrope_section": [2, 1, 1]} for kind in KINDS},
    },
    "cohere2_vision": {"alignment_intermediate_size": 32},
    "cosmos3_edge_text": MROPE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": DENSE_FIRST,
    "dots3_note_text": {
        "num_key_value_heads": 4,
        **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "emu3": PICTURE_TOKEN,
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "florence_vision": {"patch_size": [7, 3, 3, 3], "embed_dim": [32, 32, 32, 32], "num_heads": [4, 4, 4, 4]},
    "gemma3n_text": SHARED | {"laurel_rank": 8},
    "glm4v_text": MROPE,
    "glm4v_moe_text": {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
    "glm_ocr_text": MROPE,
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    # As declared, attention hardly counts beside the embedding, and positions would not show in a text.
    "granite_docling_text": {"attention_multiplier": 8**-0.5, "residual_multiplier": 1.0},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_vl_text": MROPE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "janus_vision_model": {"projection_dim": 32},
    "janus_vqgan": {
        **dict.fromkeys(("projection_dim", "image_token_embed_dim"), 32),
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 2},
    "kosmos_2_text_model": {"embed_dim": 32, "layers": LAYERS},
    "kosmos_2_5_text_model": {"embed_dim": 32, "layers": LAYERS},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": SCANNED | {"head_dim": 16, "n_groups": 1},
    "molmo2_adapter": {"vision_feature_layer": [0]},
    "molmo2_vision": {"image_size": [16, 16]},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    "nemotron_h": SCANNED | {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 4},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "heads_per_ngram": 2,
        "ple_embed_dim": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_shape": (16, 32), "axial_pos_embds_dim": (16, 16), "attention_head_size": 8},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},  # with them it repeats one token
    "xlstm": {"hidden_size": 128},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba2": SCANNED,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

# Types whose configurations differ in kind: beside the one that the generic sizes make.
VARIANTS: tuple[Family, ...] = (
    Family("mistral, not sliding", "mistral", {"sliding_window": None}),
    Family("mixtral, not sliding", "mixtral", {"sliding_window": None}),
    Family("starcoder2, not sliding", "starcoder2", {"sliding_window": None}),
    Family("phi3, not sliding", "phi3", {"sliding_window": None}),
    Family("phi3, longrope", "phi3", {"sliding_window": None} | LONGROPE),
    Family("phi3, longrope and sliding", "phi3", LONGROPE),
    Family("phimoe, longrope", "phimoe", {"sliding_window": None} | MSCALED),
    Family("minicpm3, longrope", "minicpm3", LONGROPE),
    *(Family(f"{kind}, sliding from the second layer", kind, UPPER_SLIDE) for kind in ("qwen2", "qwen3")),
    *(Family(f"{kind}, sliding from the second layer", kind, UPPER_SLIDE) for kind in ("qwen2_moe", "dots1")),
    *(Family(f"{kind}, sliding", kind, {"use_sliding_window": True}) for kind in ("qwen3_moe", "smollm3")),
    Family("qwen2, yarn", "qwen2", {"rope_parameters": YARN}),
    Family("qwen3, yarn", "qwen3", {"rope_parameters": YARN}),
    Family("gpt_oss, yarn", "gpt_oss", {"rope_parameters": YARN}),
    Family("deepseek_v3, yarn", "deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    Family("ministral3, scaled by position", "ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 1.0}}),
    Family("llama, llama3 rope", "llama", {"rope_parameters": LLAMA3}),
    Family("llama, yarn", "llama", {"rope_parameters": YARN}),
    Family("llama, linear rope", "llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    Family("llama, longrope", "llama", LONGROPE),
    Family(
        "llama, dynamic rope",
        "llama",
        {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": ORIGINAL},
        short=True,
    ),
    Family("llama4_text, without chunks, scaled by position", "llama4_text", ALL_FULL | {"no_rope_layers": [1, 0, 1]}),
    Family("falcon, alibi", "falcon", {"alibi": True}),
    Family("falcon, new architecture", "falcon", {"new_decoder_architecture": True}),
    Family("granitemoehybrid, all attention", "granitemoehybrid", {"layer_types": ["attention"] * LAYERS}),
    Family(
        "granitemoehybrid, all attention, rotary",
        "granitemoehybrid",
        {"layer_types": ["attention"] * LAYERS, "position_embedding_type": "rope"},
    ),
    Family("bamba, all attention", "bamba", {"attn_layer_indices": list(range(LAYERS))}),
    Family("jamba, all attention", "jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    *(
        Family(f"{kind}, all attention", kind, ALL_FULL)
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "lfm3")
    ),
    *(Family(f"{kind}, all attention", kind, ALL_FULL) for kind in ("minimax", "kimi_linear", "bailing_hybrid")),
    Family("nemotron_h, all attention", "nemotron_h", {"layers_block_type": ["attention"] * LAYERS}),
    *(
        Family(
            f"nemotron_h, attention and {kind}", "nemotron_h", {"layers_block_type": ["attention", kind, "attention"]}
        )
        for kind in ("mlp", "moe")
    ),
    Family("gemma3_text, bidirectional", "gemma3_text", {"use_bidirectional_attention": True}),
    Family("gemma3_text, soft caps", "gemma3_text", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    Family("gemma4_text, shared keys", "gemma4_text", SHARED),
    Family("gpt_neo, all global", "gpt_neo", {"attention_types": [[["global"], LAYERS]]}),
    # The trial at load reads 18 tokens; what it does not reach must be known from the configuration.
    Family("gpt_neo, wider window", "gpt_neo", {"window_size": WIDER}),
    Family("doge, wider window", "doge", {"keep_window_size": WIDER}),
    Family("mistral, wider window", "mistral", {"sliding_window": WIDER}),
    Family("gemma3_text, wider window", "gemma3_text", {"sliding_window": WIDER}),
    Family(
        "llama4_text, without chunks, scaled late",
        "llama4_text",
        ALL_FULL | {"no_rope_layers": [1, 0, 1], "floor_scale": WIDER},
    ),
    Family("minimax_m3_vl_text, sparse", "minimax_m3_vl_text", {"layer_types": ["full_attention", *SPARSE]}),
    Family("doge, experts", "doge", {"is_moe": True}),
    Family("doge, window not reached", "doge", {"keep_window_size": CONTEXT}),
    Family("opt, as 350m", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    Family("gpt_bigcode, several heads", "gpt_bigcode", {"multi_query": False}),
    Family("gpt_neox, not parallel", "gpt_neox", {"use_parallel_residual": False}),
    Family("stablelm, parallel", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    Family("bert, bidirectional", "bert", {"is_decoder": False}),
)

# What is not tried, by the name that `every_family` would give it, and why.
TIMM = "needs the timm library"
PICTURE = "takes no text without a picture"
CODES = "continues several audio codes a step, not text"
UNBUILT: dict[str, str] = {
    "gemma3n": TIMM,
    "fast_vlm, text alone": TIMM,
    "perception_lm, text alone": TIMM,
    "inkling_mm_model, text alone": "needs the scipy library",
    "gemma4_assistant": "drafts for another model, whose keys it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys it reads",
    "blt": "transformers' own generate fails on its configuration",
    "musicgen": CODES,
    "musicgen_melody": CODES,
    "moss_transcribe_diarize": "takes no text without sound",
    **dict.fromkeys(("blip, text alone", "blip-2, text alone", "instructblip, text alone"), PICTURE),
    **dict.fromkeys(("instructblipvideo, text alone", "idefics, text alone", "kosmos-2, text alone"), PICTURE),
    "evolla, text alone": "takes no text without a protein",
    "pi0, text alone": "moves a robot, writes no text",
    "diffusion_gemma, text alone": "writes whole blocks by diffusion, not token after token",
    "glmga, text alone": "the class of glm46v under another name",
    "pp_chart2table, text alone": "the class of got_ocr2 under another name",
    "shieldgemma2, text alone": "the class of gemma3 under another name",
}
