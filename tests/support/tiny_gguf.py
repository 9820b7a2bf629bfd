"""GGUF files of tiny random models, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from helpers import tiny_config
from tiny_models import SPECIAL, tiny_tokenizer

# llama.cpp's names of the parts of a decoder block.
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def tiny_model(kind: str, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """A random `llama` or `qwen2`, whose biases (qwen2) are not zero."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 280, "num_hidden_layers": 2, "max_position_embeddings": 256, "tie_word_embeddings": tied}
    config = tiny_config(**sizes, bos_token_id=0, eos_token_id=1)
    if kind == "qwen2":
        settings = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "head_dim")}
        config = Qwen2Config(**settings | {"architectures": None})
    model = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[kind](config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def write_gguf(model: PreTrainedModel, file: Path, quantised: bool = True, **fields: Any) -> PreTrainedModel:
    """Writes the model with the tiny tokenizer, its matrices in Q8_0; it has the weights of the file from then on.

    fields: more metadata; `architecture` is another name for the model's.
    """
    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(file, fields.pop("architecture", kind))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    for name, value in fields.items():
        writer.add_uint32(name.replace("__", "."), value)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            add_weight(writer, config, name, weight, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_weight(writer: gguf.GGUFWriter, config: Any, name: str, weight: torch.nn.Parameter, quantised: bool) -> None:
    owner, _, what = name.rpartition(".")
    if owner.startswith("model.layers."):
        number, _, part = owner.removeprefix("model.layers.").partition(".")
        called = f"blk.{number}.{PARTS[part]}.{what}"
    else:
        called = f"{OUTER[owner]}.{what}"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(owner.rpartition(".")[2])
    kind = Q8 if quantised and weight.ndim == 2 else F32
    packed = gguf.quants.quantize(weight.numpy(), kind)
    weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()))
    if heads and config.model_type == "llama":  # llama.cpp turns pairs that lie side by side
        sides = weight.numpy().reshape(heads, 2, weight.shape[0] // heads // 2, -1)
        packed = gguf.quants.quantize(np.ascontiguousarray(sides.swapaxes(1, 2)).reshape(weight.shape), kind)
    writer.add_tensor(called, packed, raw_dtype=kind)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    saved = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(saved["vocab"], key=saved["vocab"].get)
    words += [f"<|unused{number}|>" for number in range(280 - len(words))]
    kinds = [gguf.TokenType.CONTROL if word in SPECIAL else gguf.TokenType.NORMAL for word in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in saved["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
