"""Any Hugging Face causal LM as a target: one forward for prefill, plain steps and trees.

The model is used as it is: explicit 4-D masks, explicit positions, a `Cache` that the caller owns. Nothing is
stored on it. Cache slot s of a row holds the token at position s as long as s is below the row's length; what
lies beyond is garbage that masks hide, so ragged rows need no padding on the left.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from ctc_drafter.layout import GrowingLayer, columns_first
from ctc_drafter.types import UserError, Verification

UNLIMITED_CONTEXT = 1 << 30
FORCE_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


@dataclass(frozen=True)
class Target:
    """A causal LM whose output must not change. Build it with `Target.load` or `Target.wrap`."""

    model: PreTrainedModel

    @classmethod
    def wrap(cls, model: PreTrainedModel) -> Target:
        """Takes a loaded model. Raises `UserError` when its cache or masks cannot serve a token tree."""
        refuse_unsupported(model)
        return cls(model)

    @classmethod
    def load(cls, name: str, dtype: str = "float32", device: str = "cpu") -> Target:
        """Loads a folder or hub id. Raises `UserError` for missing, corrupt or unsupported checkpoints."""
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise UserError(f"no causal LM could be loaded from {name}: there is no such folder; give one, or a hub id")
        try:
            config = AutoConfig.from_pretrained(name)
            refuse_config(config)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise UserError(f"the checkpoint in {name} is corrupt ({first_line(error)}); download it again") from error
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"no causal LM could be loaded from {name}: {first_line(error)}") from error
        model = model.to(device).eval()
        columns_first(model)
        return cls.wrap(model)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    @property
    def embed(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def norm_scale(self) -> torch.Tensor | None:
        """What the final norm multiplies by, `[H]`; None where the model has no RMS norm called `norm`."""
        norm = getattr(self.model.base_model, "norm", None)
        if norm is None or getattr(norm, "bias", None) is not None:
            return None
        with torch.no_grad():
            return norm(torch.ones(self.hidden_size, dtype=self.dtype, device=self.device))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context(self) -> int:
        """Tokens that fit: prompt and answer together."""
        return getattr(self.config, "max_position_embeddings", None) or UNLIMITED_CONTEXT

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def new_cache(self) -> Cache:
        """An empty cache whose layers all keep every token, sliding ones too: their window is in the mask."""
        return Cache(layer_class_to_replicate=GrowingLayer)

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        allowed: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        layers: Sequence[int] = (),
        keep: torch.Tensor | None = None,
    ) -> Verification:
        """Runs tokens `int64 [B, T]` at `positions [B, T]` and appends their keys and values to the cache.

        allowed `bool [B, T, S]` says which of the S cached and new tokens each token sees, with their
        positions in key_positions `int64 [B, S]`; without it, rows are plain causal text. Features of the
        blocks in `layers` come back concatenated, `[B, T, K]`. With keep `int64 [R]` logits are computed
        for those columns only.
        """
        options: dict[str, Any] = {}
        if allowed is not None:
            assert key_positions is not None
            options["attention_mask"] = self._masks(allowed, positions, key_positions)
        slices = keep is not None and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        if slices:
            options["logits_to_keep"] = keep
        with captured(self.model, layers) as outputs, grouped_heads(tokens.device):
            result = self.model(
                input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, **options
            )
        logits = result.logits if keep is None or slices else result.logits[:, keep]
        return Verification(logits, concatenate(outputs, layers))

    @torch.no_grad()
    def hidden_features(self, tokens: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """Features `[B, T, K]` of right-padded rows `int64 [B, T]`, without a cache or logits; for training."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        with captured(self.model, layers) as outputs:
            self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        features = concatenate(outputs, layers)
        assert features is not None
        return features

    def _masks(self, allowed: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor) -> Any:
        """Additive 4-D masks: one, or one per layer type where the model tells its layers apart."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None:
            near = positions.unsqueeze(2) - key_positions.unsqueeze(1) < window
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return self._additive(allowed if window is None else allowed & near)
        full = self._additive(allowed)
        if "sliding_attention" not in kinds:
            return {"full_attention": full}
        return {"full_attention": full, "sliding_attention": self._additive(allowed & near)}

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        # finfo.min, not -inf: a row that sees nothing must not turn into NaN and spread.
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min).unsqueeze(1)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: the first module list as long as the model is deep."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"no list of {depth} decoder layers found in {type(model).__name__}; it cannot be a target")


@contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While open, the outputs of these blocks (before the final norm) land in the dictionary."""
    outputs: dict[int, torch.Tensor] = {}
    if not layers:
        yield outputs
        return

    def keeper(layer: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    blocks = decoder_blocks(model)
    handles = [blocks[layer].register_forward_hook(keeper(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def grouped_heads(device: torch.device) -> Iterator[None]:
    """On a CPU, lets attention under a mask read grouped keys as they are. transformers would first repeat them for
    each head, which takes longer than the attention; its switch for that is this variable of the environment."""
    before = os.environ.get(FORCE_GROUPED)
    if device.type != "cpu" or before is not None:
        yield
        return
    os.environ[FORCE_GROUPED] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE_GROUPED]


def concatenate(outputs: dict[int, torch.Tensor], layers: Sequence[int]) -> torch.Tensor | None:
    return torch.cat([outputs[layer] for layer in layers], -1) if layers else None


def refuse_config(config: PreTrainedConfig) -> None:
    """What the configuration alone rules out."""
    if config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model; targets must be decoder-only causal LMs")
    text = config.get_text_config(decoder=True)
    attention = getattr(text, "attn_config", None)
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        raise UserError(f"{config.model_type} uses alibi, which ignores tree positions; use a target with rotary ones")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
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
        raise UserError(f"{name}.forward takes no {' or '.join(missing)}, which a token tree needs")
    kernel = model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UserError(f"{name} runs {kernel} attention, which takes no tree mask; load it with sdpa or eager")
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    unknown = layers - {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    if unknown:
        raise UserError(f"{name} caches {', '.join(sorted(unknown))}, which cannot be gathered after a tree")
