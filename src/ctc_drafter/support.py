"""What a target must offer: checks on configuration, signature, kernel and cache, none on a model's name.

They rule out what is known to be impossible; `selftest.py` then tries the rest.
"""

from __future__ import annotations

import inspect

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ctc_drafter.rope import grows_with_length
from ctc_drafter.types import UserError

KERNELS = ("sdpa", "eager")
ATTENTION = {"full_attention", "sliding_attention"}
GATHERABLE = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
CHOOSING = ("keep_window_size", "index_topk")  # settings of attention that picks keys by their content
LONGEST_OFFSET = 8  # entries that a table of positions may have before position 0


def refuse_config(config: PreTrainedConfig) -> None:
    """What the configuration alone rules out. Raises `UserError` with the reason."""
    if config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model; targets must be decoder-only causal LMs")
    text = config.get_text_config(decoder=True)
    attention = getattr(text, "attn_config", None)
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        raise UserError(f"{config.model_type} uses alibi, which ignores tree positions; use a target with rotary ones")
    chosen = [name for name in CHOOSING if getattr(text, name, None)]
    if chosen:
        raise UserError(
            f"{config.model_type} attends to the best {chosen[0]} of all keys, drafted ones among them; "
            "use a target that attends to all, or to a window"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - ATTENTION
    if kinds:
        raise UserError(
            f"{config.model_type} has {', '.join(sorted(kinds))} layers, whose state cannot follow a tree; "
            "use a target with softmax attention in every layer"
        )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Static checks on configuration, signature, cache and kernel. Raises `UserError` with the reason."""
    name = type(model).__name__
    refuse_config(model.config)
    if getattr(model, "_is_stateful", False):
        raise UserError(f"{name} keeps a recurrent state, which cannot follow a tree; use a softmax-attention target")
    accepted = inspect.signature(model.forward).parameters
    missing = [key for key in ("position_ids", "past_key_values") if key not in accepted]
    if missing:
        raise UserError(f"{name}.forward takes no {' or '.join(missing)}, which a token tree needs; use another target")
    kernel = model.config._attn_implementation
    if kernel not in KERNELS:
        raise UserError(f"{name} runs {kernel} attention, which takes no tree mask; load it with sdpa or eager")
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    unknown = layers - GATHERABLE
    if unknown:
        raise UserError(
            f"{name} caches {', '.join(sorted(unknown))}, which cannot be gathered after a tree; use another target"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions that a model has and cannot go beyond; None where positions are computed (rotary ones).

    Tables of learned positions, and buffers of as many entries (masks, sines), are as long as the context or a few
    entries longer, for the offset that some families add. Frequencies that grow with each token beyond the context
    (dynamic NTK) depend on the length of every forward and on texts read before, so that range counts as none.
    """
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if not context:
        return None
    if grows_with_length(config):
        return context
    words = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    sizes = [*tables, *(size for buffer in model.buffers() for size in buffer.shape)]
    return context if any(context <= size <= context + LONGEST_OFFSET for size in sizes) else None
