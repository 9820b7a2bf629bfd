"""What the answers of a distillation will cost, from configurations alone.

Reading a prompt is bound by operations. Writing is bound by memory where few rows are written at a time: each step
reads all weights and the cache of its rows. Both are counted on fake tensors, a forward pass each.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Answers:
    """prompts: how many. prompt_tokens, new_tokens: of each. rows: that are written at a time."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    rows: int


@dataclass(frozen=True)
class DistillCost:
    """Of all answers: operations of reading the prompts and of writing, bytes of weights and caches read in writing."""

    reading_flops: float
    writing_flops: float
    writing_bytes: float

    def hours(self, rate: float, bandwidth: float) -> float:
        """At so many operations and bytes per second."""
        return (self.reading_flops / rate + max(self.writing_flops / rate, self.writing_bytes / bandwidth)) / 3600


def distill_cost(config: PreTrainedConfig, dtype: torch.dtype, answers: Answers) -> DistillCost:
    """As if every prompt and answer were as long as `answers` says, each with the cache of half its answer.

    Attention adds bytes of the cache, and no operations.
    """
    half = answers.prompt_tokens + answers.new_tokens // 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as reading:
            _forward(model, answers.prompt_tokens)
        with FlopCounterMode(display=False) as writing:
            _forward(model, 1)
        cache = _cache_bytes(_forward(model, half))
    weights = sum(weight.nbytes for weight in model.parameters())
    steps = math.ceil(answers.prompts / answers.rows) * answers.new_tokens
    return DistillCost(
        reading_flops=float(reading.get_total_flops()) * answers.prompts,
        writing_flops=float(writing.get_total_flops()) * answers.prompts * answers.new_tokens,
        writing_bytes=float(steps * weights + answers.prompts * answers.new_tokens * cache),
    )


@torch.no_grad()
def _forward(model: PreTrainedModel, length: int) -> Any:
    """The cache after a row of so many tokens, whose last logits are computed; the mask is given, because making one
    looks at values."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    mask = torch.zeros(1, 1, length, length, dtype=model.dtype)
    given = {"input_ids": tokens, "position_ids": torch.arange(length)[None], "attention_mask": mask}
    return model(**given, use_cache=True, logits_to_keep=1).past_key_values


def _cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def describe_distillation(
    cost: DistillCost, answers: Answers, rate: float, bandwidth: float, source: str
) -> tuple[str, str]:
    """A line of a table, as `estimate.describe` gives them."""
    much = f"{cost.hours(rate, bandwidth):,.1f} hours for {answers.prompts:,} answers of {answers.new_tokens:,} tokens"
    at = f"{rate / 1e12:.3g} TFLOP/s and {bandwidth / 1e9:,.0f} GB/s ({source})"
    return f"distillation, {answers.rows} rows at a time", f"{much} at {at}"


def measured_bandwidth(device: str, seconds: float = 0.5) -> float:
    """Bytes per second that this machine reads and writes in a copy, what no step of decoding exceeds."""
    origin = torch.zeros(2**26, device=device)
    copy = torch.empty_like(origin)
    copy.copy_(origin)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds or not done:
        copy.copy_(origin)
        float(copy[0])  # waits for the device
        done += 1
    return done * 2 * origin.nbytes / (time.perf_counter() - begin)
