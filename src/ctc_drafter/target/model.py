"""`Target`: the forward pass of any causal LM for prefill, plain steps and token trees."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ctc_drafter.target.cache import GrowingLayer, reserve, static_cache
from ctc_drafter.target.chain_test import Chain, find_chain
from ctc_drafter.target.checks import (
    load_causal_lm,
    plain_model,
    position_limit,
    refuse_kernel,
    refuse_kind,
    refuse_unsupported,
)
from ctc_drafter.target.devices import reachable_from, refuse_offloaded
from ctc_drafter.target.features import captured, check_layers, concatenate, decoder_stack, final_norm, norm_scale
from ctc_drafter.target.layout import columns_first, grouped_heads
from ctc_drafter.target.names import resolve
from ctc_drafter.target.rope import factors_by_token, rereads, scaled_context, switch_length
from ctc_drafter.target.self_test import self_test
from ctc_drafter.target.stepped import stepped
from ctc_drafter.types import UserError, Verification, listed_ids

# Any Hugging Face causal LM as a target: one forward for prefill, plain steps and trees.
#
# The model is used as it is: explicit 4-D masks, explicit positions, a `Cache` that the caller owns. Nothing is
# stored on it. Cache slot s of a row holds the token at position s as long as s is below the row's length; what
# lies beyond is garbage that masks hide, so ragged rows need no padding on the left.

UNLIMITED_CONTEXT = 1 << 30
CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class Target:
    """A causal LM whose output must not change. Build it with `Target.load` or `Target.wrap`."""

    compiled: ClassVar[bool] = False
    own_threads: ClassVar[bool] = False  # whether forwards run in threads that are not PyTorch's
    alone: ClassVar[bool] = False  # whether prompts must be read one by one
    profile_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64)  # tree sizes between which times change evenly

    model: PreTrainedModel
    cache: str = "dynamic"
    chain: Chain | None = None  # how it follows a chain where it can follow no tree

    @classmethod
    def wrap(cls, model: PreTrainedModel, cache: str = "dynamic") -> Target:
        """Takes a loaded model; `cache` is `dynamic`, or `static` for fixed tensors that are written in place.

        Of a `PeftModel` it takes the model inside, which has the adapters in its layers.

        Whether its drafts are trees, or chains where it can follow no tree, is found out: by what it says of itself
        (`checks.py`), and by trials of a few short forwards (`self_test.py`, `chain_test.py`). Raises `UserError` when
        it can serve neither.
        """
        if cache not in CACHES:
            raise UserError(f"a {cache} cache cannot be gathered after a tree; use {' or '.join(CACHES)}")
        model = plain_model(model)
        refuse_offloaded(model)
        refuse_kind(model.config)
        refuse_kernel(model)
        try:
            refuse_unsupported(model)
            target = cls(model, cache)
            self_test(target)
            return target
        except UserError as no_tree:
            if cache != "dynamic":
                raise
            return cls(model, cache, find_chain(lambda chain: cls(model, cache, chain), no_tree))

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "cpu",
        cache: str = "dynamic",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Target:
        """Loads a folder, GGUF file or hub id, `smollm2` or `tiny`; `options` go to `from_pretrained`, such as a
        `quantization_config`. A folder may hold a LoRA adapter. dtype: `auto` is the checkpoint's, but see `cpu_dtype`.
        device: of torch. revision: branch, tag or commit of a hub id. trust_remote_code: whether Python code that the
        model brings along may run.

        Raises `UserError` for missing, incomplete, corrupt or unsupported checkpoints.
        """
        options |= {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        model = load_causal_lm(resolve(name, revision), torch.device(device).type, dtype=wanted, **options)
        if "device_map" not in options:  # else it is where it belongs, and 8-bit weights refuse to be moved
            model = model.to(device)
        model = model.eval()
        columns_first(model)
        return cls.wrap(model, cache)

    @property
    def engine(self) -> str:
        """What computes its forwards, in a word or two."""
        return "compiled" if self.compiled else "exact" if self.alone else "PyTorch"

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    @property
    def embed(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @cached_property
    def draft_modules(self) -> tuple[nn.Module, nn.Module]:
        """Embedding and LM head for a drafter, which calls them from the embedding's device."""
        return self.embed, reachable_from(self.device, self.head)

    @property
    def norm_scale(self) -> torch.Tensor | None:
        """Scale of the final norm, `[H]`; None where no norm was found."""
        norm = final_norm(self.model)
        return None if norm is None else norm_scale(norm, self.hidden_size, self.dtype, self.device)

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
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text by the model's generation config; empty where it names none."""
        listed = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return frozenset(listed_ids(listed))

    @property
    def context(self) -> int:
        """Tokens, prompt and answer together, that the model is made for. It may go on beyond, as in `generate`, up to
        `limit`."""
        stated = getattr(self.config, "max_position_embeddings", None) or UNLIMITED_CONTEXT
        return max(stated, scaled_context(self.config))

    @cached_property
    def limit(self) -> int:
        """Positions that exist: beyond them the model has no embedding, or none that depends on the text alone."""
        found = position_limit(self.model)
        return UNLIMITED_CONTEXT if found is None else found

    @cached_property
    def switch(self) -> int | None:
        """Tokens of a text beyond which rotary factors change (longrope); None where they do not."""
        return switch_length(self.config)

    @cached_property
    def reread_at(self) -> int | None:
        """Tokens of a text at which stock `generate` drops the cache and reads it all anew; None if it never does."""
        return self.switch if rereads(self.model) else None

    @cached_property
    def window(self) -> int | None:
        """Tokens that a sliding layer sees, its own included; None when no layer slides."""
        return (getattr(self.config, "sliding_window", None) or None) if self.slides else None

    @cached_property
    def slides(self) -> bool:
        kinds = getattr(self.config, "layer_types", None)
        return kinds is None or "sliding_attention" in kinds

    @cached_property
    def accepted(self) -> frozenset[str]:
        """Arguments that `forward` of the model takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def slices_logits(self) -> bool:
        """Whether the model computes the logits of chosen columns alone."""
        return "logits_to_keep" in self.accepted

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def new_cache(self, slots: int = 0) -> Any:
        """An empty cache with room for `slots` tokens, more if need be: a `Cache`, or a `ChainCache` of one row for
        targets that follow chains.

        The layers of a `Cache` all keep every token, sliding ones too: their window is in the mask.
        """
        if self.chain is not None:
            return self.chain.new_cache(self.model.config, 1)
        if self.cache == "static":
            return static_cache(self.num_layers, slots)
        return Cache(layer_class_to_replicate=GrowingLayer)

    def check_drafter(self, drafter: Any) -> None:
        """Raises `UserError` for a drafter that could not read this model's blocks, embedding or LM head."""
        check_layers(self.model, drafter.feature_layers)
        check = getattr(drafter, "check_modules", None)
        if check is not None:
            check(self.embed, self.head)

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
        long: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> Verification:
        """Runs tokens `int64 [B, T]` at `positions [B, T]` and appends their keys and values to the cache.

        allowed `bool [B, T, S]` says which of the S cached and new tokens each token sees, with their
        positions in key_positions `int64 [B, S]`; without it, rows are plain causal text. Features of the
        blocks in `layers` come back concatenated, `[B, T, K]`. With keep `int64 [R]` logits are computed
        for those columns only. long `bool [B, T]`: tokens of longrope targets that are rotated by the long factors;
        those at positions from the switch on if it is not given. shift `int64 [B]` or `[P, B]`: what the positions that
        the model is told, in each of P planes, are beyond these, since a picture takes more or fewer than its tokens.

        Of targets that follow chains the cache is one of their own kind, rows are padded on the left, and allowed
        `bool [B, S]` says which slots hold tokens.
        """
        if self.chain is not None:
            return self._read_chain(tokens, positions, cache, allowed, layers, keep)
        options: dict[str, Any] = {}
        if self.cache == "static":
            allowed, key_positions = padded(reserve(cache, tokens.shape[1]), allowed, key_positions)
        if allowed is not None:
            assert key_positions is not None
            options["attention_mask"] = self._masks(allowed, positions, key_positions)
        slices = keep is not None and self.slices_logits
        if slices:
            options["logits_to_keep"] = keep
        if long is None and self.switch is not None:
            long = positions >= self.switch
        factors = factors_by_token(self.model, self.switch, long)
        grouped = grouped_heads(tokens.device, tokens.shape[1] == 1)
        told = positions if shift is None else positions + shift.unsqueeze(-1)
        with captured(self.model, layers) as outputs, grouped, factors:
            result = self.model(input_ids=tokens, position_ids=told, past_key_values=cache, use_cache=True, **options)
        logits = result.logits if keep is None or slices else result.logits[:, keep]
        return Verification(logits, concatenate(outputs, layers, tokens.device))

    def _read_chain(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        there: torch.Tensor | None,
        layers: Sequence[int],
        keep: torch.Tensor | None,
    ) -> Verification:
        """`forward` as transformers' own `generate` calls the model: its own masks and cache."""
        assert self.chain is not None
        options: dict[str, Any] = {"cache_params" if "cache_params" in self.accepted else "past_key_values": cache}
        if self.chain.positions and "position_ids" in self.accepted:
            options["position_ids"] = positions
        if there is not None:
            options["attention_mask"] = there.long()
        if keep is not None and self.slices_logits:
            options["logits_to_keep"] = keep
        steps = stepped(self.model, cache) if self.chain.stepped else nullcontext()
        with captured(self.model, layers) as outputs, steps:
            result = self.model(input_ids=tokens, use_cache=True, **options)
        logits = result.logits if keep is None or self.slices_logits else result.logits[:, keep]
        return Verification(logits, concatenate(outputs, layers, tokens.device))

    def hidden_features(self, tokens: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """Features `[B, T, K]` of right-padded rows `int64 [B, T]`, without a cache or logits; for training."""
        return self.hidden_states(tokens, layers)[0]

    @torch.no_grad()
    def hidden_states(self, tokens: torch.Tensor, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden_features`, and what the LM head reads after each token: the last states `[B, T, H]`, normed."""
        options: dict[str, Any] = {}
        if "position_ids" in self.accepted and (self.chain is None or self.chain.positions):
            options["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        with captured(self.model, layers) as outputs:
            whole = self.model.base_model is self.model  # a class whose parts have other names than it says (Llama 4)
            decoder = decoder_stack(self.model)[0] if whole else self.model.base_model
            result = decoder(input_ids=tokens, use_cache=False, **options)
        features = concatenate(outputs, layers, tokens.device)
        assert features is not None
        return features, result.last_hidden_state

    def _masks(self, allowed: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor) -> Any:
        """Additive 4-D masks: one, or one per layer type where the model tells its layers apart."""
        near = allowed
        if self.window is not None:
            near = allowed & (positions.unsqueeze(2) - key_positions.unsqueeze(1) < self.window)
        if getattr(self.config, "layer_types", None) is None:
            return self._additive(near)
        full = {"full_attention": self._additive(allowed)}
        return full if self.window is None else full | {"sliding_attention": self._additive(near)}

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        # finfo.min, not -inf: a row that sees nothing must not turn into NaN and spread.
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min).unsqueeze(1)


def padded(
    slots: int, allowed: torch.Tensor | None, key_positions: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Widens `allowed [B, T, S]` and `key_positions [B, S]` to `slots` columns that nobody sees."""
    if allowed is None or key_positions is None:
        return None, None
    missing = (0, slots - allowed.shape[2])
    return nn.functional.pad(allowed, missing), nn.functional.pad(key_positions, missing)
