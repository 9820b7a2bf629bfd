"""Rotary embeddings whose factors depend on text length: longrope (Phi-3, Phi-4), dynamic NTK.

Up to `original_max_position_embeddings` tokens ("the switch") such a model rotates by its short factors, beyond by its
long ones. transformers decides by the largest position of a forward, which is the text's own length only where a
forward is one row and no draft. Here each token is rotated as stock `generate` of its row alone would: a prompt longer
than the switch by the long factors, whatever the chunk; a decoded token by those of its position. Some classes (Phi-3)
drop their cache at the switch and read the text anew with the long factors, see `rereads`.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ctc_drafter.target.features import HOOKS

CHANGING = "longrope"


def rope_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The settings of every rotary embedding that a text configuration names: one, or one per layer type."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict) and found:
            nested = [each for each in found.values() if isinstance(each, dict)]
            return nested or [found]
    return []


def rope_type(settings: dict[str, Any]) -> str:
    return settings.get("rope_type") or settings.get("type") or "default"


def switch_length(config: PreTrainedConfig) -> int | None:
    """Tokens that a text may have under the short factors; None where factors do not depend on the length."""
    for settings in rope_settings(config):
        if rope_type(settings) == CHANGING:
            original = settings.get("original_max_position_embeddings")
            return original or getattr(config, "original_max_position_embeddings", None)
    return None


def grows_with_length(config: PreTrainedConfig) -> bool:
    """Whether the frequencies change with every token beyond the context (dynamic NTK), and with texts read before."""
    return any("dynamic" in rope_type(settings) for settings in rope_settings(config))


def scaled_context(config: PreTrainedConfig) -> int:
    """The context that a scaling (YaRN) is made for, which configurations need not repeat; 0 if none says so."""
    found = [0]
    for settings in rope_settings(config):
        original, factor = settings.get("original_max_position_embeddings"), settings.get("factor")
        if rope_type(settings) == "yarn" and original and factor:
            found.append(int(original * factor))
    return max(found)


def rereads(model: PreTrainedModel) -> bool:
    """Whether stock `generate` reads a text anew that outgrows the short factors: the class looks at that length when
    it prepares a step."""
    prepare = getattr(type(model).prepare_inputs_for_generation, "__code__", None)
    config = model.config.get_text_config(decoder=True)
    name = "original_max_position_embeddings"
    return prepare is not None and name in prepare.co_names and getattr(config, name, None) is not None


def rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that compute cosines and sines by changing factors."""

    def changes(module: nn.Module) -> bool:
        kind = getattr(module, "rope_type", None)
        return CHANGING in (kind.values() if isinstance(kind, dict) else [kind])

    return [module for module in model.modules() if changes(module)]


@contextmanager
def factors_by_token(model: PreTrainedModel, switch: int | None, long: torch.Tensor | None) -> Iterator[None]:
    """While open, forwards of this thread rotate the tokens in `long bool [B, T]` by the long factors, others by the
    short ones."""
    if switch is None or long is None:
        yield
        return
    thread, limit, mask = threading.get_ident(), switch, long.unsqueeze(-1)

    def choose(module: nn.Module, args: Any, kwargs: Any, _output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        positions = given.arguments["position_ids"]
        beyond = torch.full_like(positions[..., :1], limit)
        short = rotated(module, given, positions.clamp(max=limit - 1))
        far = rotated(module, given, torch.cat([positions, beyond], -1))
        return tuple(
            torch.where(mask, longer[..., :-1, :], shorter) for longer, shorter in zip(far, short, strict=True)
        )

    with HOOKS:
        handles = [module.register_forward_hook(choose, with_kwargs=True) for module in rotary_modules(model)]
    try:
        yield
    finally:
        with HOOKS:
            for handle in handles:
                handle.remove()


def rotated(module: nn.Module, given: inspect.BoundArguments, positions: torch.Tensor) -> Any:
    """Cosines and sines `[B, T, dim]` at `positions`, by a copy: a forward stores its factors in the module, which
    another thread may be running."""
    twin = copy.copy(module)
    twin._buffers = OrderedDict((name, None if b is None else b.clone()) for name, b in module._buffers.items())
    changed = {**given.arguments, "self": twin, "position_ids": positions}
    bound = inspect.BoundArguments(given.signature, OrderedDict(changed))
    return type(module).forward(*bound.args, **bound.kwargs)
