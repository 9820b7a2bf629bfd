"""The least that a plain step takes: what it must read, over how fast this machine reads."""

from __future__ import annotations

import statistics
import time
from typing import cast

import torch
from transformers import PreTrainedConfig

from ctc_drafter.target.model import Target

SAMPLE = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes: more than caches hold
ROUNDS = 5


def step_bytes(target: Target, rows: int, context: int) -> int:
    """Bytes that a plain step reads: weights, of the embedding only the rows' tokens, and cached keys and values."""
    config, model = target.config, target.model
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    embedding = cast(torch.Tensor, target.embed.weight)
    if embedding is not target.head.weight:
        weights[id(embedding)] = rows * embedding.shape[1] * embedding.element_size()
    return sum(weights.values()) + rows * context * cached_bytes(config, target.dtype)


def cached_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    if getattr(config, "is_heterogeneous", False):
        return sum(2 * layer_width(layer) * dtype.itemsize for layer in config.per_layer_config)
    per_token: int = 2 * config.num_hidden_layers * layer_width(config) * dtype.itemsize
    return per_token


def layer_width(config: PreTrainedConfig) -> int:
    """Numbers of a token's keys in one layer."""
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size(config)


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second: the median of a few sums over more memory than the caches hold."""
    sample = torch.ones(SAMPLE.get(device.type, SAMPLE["cpu"]) // 4, device=device)
    taken = []
    for _ in range(ROUNDS):
        wait_for(device)
        begin = time.perf_counter()
        sample.sum()
        wait_for(device)
        taken.append(time.perf_counter() - begin)
    return sample.numel() * 4 / statistics.median(taken)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
