"""Which targets are refused, by configuration, signature and cache; loading of complete checkpoints."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from ctc_drafter.target.rope import grows_with_length
from ctc_drafter.types import UserError, first_line, missing_extra

# Static checks of a target: on configuration, signature, kernel and cache, none on a model's name.
#
# They rule out what is known to be impossible over a tree; `self_test.py` then tries the rest. What no tree can be
# verified by is tried on a chain, in `chain_test.py`.

KERNELS = ("sdpa", "eager")
ATTENTION = {"full_attention", "sliding_attention"}
STATELESS = ATTENTION | {"mlp", "moe"}  # the last two keep nothing between tokens
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
GATHERABLE = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
CHOOSING = ("keep_window_size", "index_topk")  # settings of attention that picks keys by their content
OF_THE_CHECKPOINT = (
    "gguf_file",
    "revision",
    "trust_remote_code",
)  # options of `from_pretrained` that say which configuration is meant
MOST_LAYERS = 1024
LONGEST_OFFSET = 8  # entries that a table of positions may have before position 0


def refuse_size(config: PreTrainedConfig) -> None:
    """Refuses a configuration that would take hours to build, before anything is built. Raises `UserError`."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"the configuration says {layers} layers, and at most {MOST_LAYERS} are built; it is damaged")


def refuse_kind(config: PreTrainedConfig) -> None:
    """Refuses what can be no target at all, by configuration alone. Raises `UserError` with the reason."""
    if config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model; targets must be decoder-only causal LMs")
    refuse_size(config)


def refuse_kernel(model: PreTrainedModel) -> None:
    """Refuses attention kernels that take no masks of ours. Raises `UserError`."""
    name, kernel = type(model).__name__, model.config._attn_implementation
    if kernel not in KERNELS:
        raise UserError(f"{name} runs {kernel} attention, which takes no tree mask; load it with sdpa or eager")


def refuse_config(config: PreTrainedConfig) -> None:
    """Refuses targets that can follow no tree, by configuration alone. Raises `UserError` with the reason."""
    refuse_kind(config)
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
    kinds = set(getattr(text, "layer_types", None) or ()) - STATELESS
    if kinds:
        reason = "whose state cannot follow a tree" if kinds & RECURRENT else "which take no tree mask"
        raise UserError(
            f"{config.model_type} has {', '.join(sorted(kinds))} layers, {reason}; "
            "use a target with full or sliding softmax attention in every layer"
        )


def plain_model(model: Any) -> PreTrainedModel:
    """The model; of one with adapters (`PeftModel`) the one inside, which has the adapters in its layers.

    Raises `UserError` for what is no model, and for prompts that were learnt (prompt tuning, prefix tuning).
    """
    inside = getattr(model, "get_base_model", None)
    if inside is not None and not isinstance(model, PreTrainedModel):
        active = getattr(model, "active_peft_config", None)
        if active is not None and active.is_prompt_learning:
            kind = str(getattr(active.peft_type, "value", active.peft_type)).lower().replace("_", " ")
            raise UserError(f"{kind} puts vectors before the text, which a drafter cannot read; use LoRA, or merge it")
        model = inside()
    if not isinstance(model, PreTrainedModel):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UserError(f"a {name} is no model; give a causal LM of transformers")
    return model


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Static checks of what a tree needs: configuration, signature, cache and kernel. Raises `UserError` with the
    reason."""
    name = type(model).__name__
    refuse_config(model.config)
    # The class says what its layers may be; the configuration, where it lists them, what they are.
    listed = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if getattr(model, "_is_stateful", False) and not listed:
        raise UserError(f"{name} keeps a recurrent state, which cannot follow a tree; use a softmax-attention target")
    accepted = inspect.signature(model.forward).parameters
    missing = [key for key in ("position_ids", "past_key_values") if key not in accepted]
    if missing:
        raise UserError(f"{name}.forward takes no {' or '.join(missing)}, which a token tree needs; use another target")
    refuse_kernel(model)
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError as error:
        raise UserError(f"{name} does not say what it caches ({error}); use a decoder-only causal LM") from error
    unknown = {type(layer).__name__ for layer in layers} - GATHERABLE
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


LOG = logging.getLogger(__name__)


def load_causal_lm(name: str, on: str = "cuda", **options: Any) -> PreTrainedModel:
    """A causal LM of a folder or hub id, every weight of which was in its checkpoint. options: of `from_pretrained`;
    with dtype "auto" weights are as in the checkpoint, but on="cpu" as `cpu_dtype` says. Of a folder with a LoRA
    adapter it is the model that the adapter names, with the adapter in its layers.

    transformers fills in what a checkpoint lacks with random numbers, and says so in a warning that nobody may see.
    Raises `UserError`, one line, for whatever cannot be loaded whole; tensors that have no place are named in the log.
    """
    options.setdefault("trust_remote_code", False)  # transformers would ask, and take "y" from any pipe
    if (base := adapter_base(name)) is not None:
        return adapted(load_causal_lm(base, on, **options), name)
    if is_missing(name):
        raise UserError(f"no causal LM could be loaded from {name}: there is no such folder; give one, or a hub id")
    source = {key: options[key] for key in OF_THE_CHECKPOINT if key in options}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    config = None
    try:
        config = options.get("config") or AutoConfig.from_pretrained(name, **source)
        refuse_kind(config)
        if options.get("dtype") == "auto" and on == "cpu":
            options["dtype"] = cpu_dtype(config)
        model, report = AutoModelForCausalLM.from_pretrained(name, **options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        lacking = missing_extra(error) or first_line(error)
        elsewhere = quantised_elsewhere(name, config, lacking)
        raise UserError(elsewhere or f"{name} needs a library that is missing: {lacking}") from error
    except UnpicklingError as error:  # torch's own words advise to run the file
        raise UserError(f"the checkpoint in {name} holds more than tensors, which is never run; convert it") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        elsewhere = quantised_elsewhere(name, config, first_line(error)) if type(error) is RuntimeError else None
        if elsewhere is not None:  # it wants a GPU, say
            raise UserError(elsewhere) from error
        raise UserError(f"the checkpoint in {name} is corrupt ({first_line(error)}); download it again") from error
    except Exception as error:  # configurations fail wherever the model's own code meets them
        raise UserError(f"no causal LM could be loaded from {name}: {why_not_loaded(error)}") from error
    refuse_incomplete(name, model, report)
    return model


def quantised_elsewhere(name: str, config: PreTrainedConfig | None, reason: str) -> str | None:
    """The line for a quantised checkpoint that cannot be loaded here, since a library or a GPU is missing; None for one
    that is not quantised."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return None
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    return f"{name} is quantised by {getattr(method, 'value', method)}, which cannot be loaded here: {reason}"


def cpu_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The fastest dtype on this CPU that keeps the checkpoint's weights: bfloat16 for those that are in bfloat16 where
    there are instructions for its matrix products (AVX512_BF16 or AMX), else float32."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if str(stated).endswith("bfloat16") and products else torch.float32


ADAPTER = "adapter_config.json"


def adapter_base(name: str) -> str | None:
    """The model that the LoRA adapter in a folder was made for; None where there is no adapter, or a whole model beside
    it. Raises `UserError` for an adapter that names none."""
    file = Path(name) / ADAPTER
    if not file.is_file() or (Path(name) / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{file} names no base_model_name_or_path; write there which model the adapter is for")
    return base


def adapted(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter of a folder in its layers. Raises `UserError` for an adapter that does not fit."""
    from peft import PeftModel

    try:
        return plain_model(PeftModel.from_pretrained(model, folder).eval())
    except UserError:
        raise
    except Exception as error:  # peft's own, torch's of shapes, safetensors'
        raise UserError(f"the adapter in {folder} could not be loaded: {first_line(error)}") from error


def is_missing(name: str) -> bool:
    """Whether a name can only be that of a folder, by its slashes, and there is none."""
    local = Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.endswith("/") or name.count("/") > 1
    return local and not Path(name).is_dir()


def why_not_loaded(error: Exception) -> str:
    """One line; of a model that brings its own code what would let it run."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is not run unasked; read it, then give --trust-remote-code"
    return first_line(error)


def refuse_incomplete(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises `UserError` for weights that were missing or of another shape, by transformers' `report` of a loading.

    It lists no tied weights whose other name is there, none that the class need not have, no buffers that are never
    saved. Other buffers hold what the class computed, unless weights lie in buffers as quantised ones may.
    """
    missing = set(report["missing_keys"])
    buffers = set() if getattr(model, "hf_quantizer", None) else dict(model.named_buffers()).keys() & missing
    if missing - buffers:
        lost = listed(missing - buffers, "missing")
        raise UserError(f"the checkpoint in {name} is incomplete: {lost}; download it again")
    wrong = sorted(report["mismatched_keys"], key=lambda each: str(each[0]))
    if wrong:
        key, theirs, ours = wrong[0]
        raise UserError(
            f"the checkpoint in {name} does not fit its config.json: {key} is {tuple(theirs)} instead of {tuple(ours)}"
            "; download both again"
        )
    if buffers:
        LOG.warning("%s: %s", name, listed(buffers, "computed, since not stored"))
    if report["unexpected_keys"]:
        LOG.warning("%s: %s", name, listed(report["unexpected_keys"], "stored, but not used"))


def listed(names: Collection[str], what: str) -> str:
    """How many tensors are what, and a few of their names."""
    first = sorted(names)
    if len(first) == 1:
        return f"{first[0]} is {what}"
    return f"{len(first)} tensors are {what} ({', '.join(first[:3])}{', ...' if len(first) > 3 else ''})"


# A drafter beside its target: loaded, on the same device, in the same dtype.


def refuse_unloaded(drafter: Any) -> None:
    """Raises `UserError` for a drafter that was made on the meta device."""
    if isinstance(drafter, nn.Module) and any(weight.is_meta for weight in drafter.parameters()):
        raise UserError(
            f"the {type(drafter).__name__} has no weights yet, only shapes (meta device); load it with from_pretrained"
        )


def check_placement(model: PreTrainedModel, drafter: Any) -> None:
    """Raises `UserError` for a drafter whose weights are not where and what the model's are. Nothing is moved."""
    if not isinstance(drafter, nn.Module):
        return
    refuse_unloaded(drafter)
    kind = type(drafter).__name__
    for weight in drafter.parameters():
        if weight.device != model.device and model.device.type != "meta":  # offloaded models say meta
            raise UserError(
                f"the {kind} is on {weight.device}, the model on {model.device}; call drafter.to(model.device)"
            )
        if weight.is_floating_point() and weight.dtype != model.dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (weight.dtype, model.dtype)]
            raise UserError(f"the {kind} is in {names[0]}, the model in {names[1]}; call drafter.to(model.dtype)")
