"""`TrainableDrafter` and `DrafterConfig`: what trained drafters share; creation, loading, saving."""

from __future__ import annotations

import difflib
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.base import Drafter, DraftSession, refuse_call
from ctc_drafter.drafters.lm_head import DraftHead, usual_chunk
from ctc_drafter.types import Candidates, UserError, first_line

# What a drafter learns from. Shapes: B rows, T tokens, A anchors of a row, N of a batch, U labels, H hidden size.


@dataclass(frozen=True)
class Anchors:
    """positions: int64 [B, A], index of each root. used: bool [B, A], false for padding; None if all are used.

    prefixes: int64 [B, A, 1+U], the root and the tokens after it. valid: bool [B, A, U], label within the text.
    """

    positions: torch.Tensor
    used: torch.Tensor | None
    prefixes: torch.Tensor
    valid: torch.Tensor

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[B, A, ...]` of the used anchors, `[N, ...]`."""
        return values.flatten(0, 1) if self.used is None else values[self.used]


@dataclass(frozen=True)
class LossOptions:
    """loss: by its name in the training settings; a later token of a draft weighs `decay` times the one before.

    chunk: anchors whose logits are in memory at a time; by default `usual_chunk`. recompute: draft layers run again
    in the backward pass.
    """

    loss: str = "prefix"
    decay: float = 0.8
    chunk: int | None = None
    recompute: bool = False


@dataclass(frozen=True)
class AnchorBatch:
    """What a forward pass learns from. features `[B, T, K]` and tokens `int64 [B, T]`: of right-padded rows.

    last `[B, T, H]`: what the target's LM head reads after each token; for the teacher loss, None otherwise.
    copies `int64 [B, A, 1+U, 2]`: see `ctc.copies.copies_at`; None for drafters that copy nothing.
    """

    features: torch.Tensor
    tokens: torch.Tensor
    anchors: Anchors
    options: LossOptions = LossOptions()
    last: torch.Tensor | None = None
    copies: torch.Tensor | None = None


@dataclass(frozen=True)
class LossInputs:
    """What the loss of N anchors reads. states `[N, ...]`: of `draft_states`. prefixes `int64 [N, 1+U]`: root, y1..yU.

    valid `bool [N, U]`: labels that count. last `[N, U, H]`: what the target's LM head reads after root, y1, ..
    y(U-1); copies `int64 [N, 1+U, 2]`: see `AnchorBatch`.
    """

    states: torch.Tensor
    prefixes: torch.Tensor
    valid: torch.Tensor
    last: torch.Tensor | None = None
    copies: torch.Tensor | None = None

    def split(self, size: int) -> list[LossInputs]:
        """`size` anchors each."""
        count = -(-len(self.states) // size)
        wholes = (self.states, self.prefixes, self.valid, self.last, self.copies)
        parts = [[None] * count if whole is None else whole.split(size) for whole in wholes]
        return [LossInputs(*part) for part in zip(*parts, strict=True)]


# Configurations that trained drafters share: what they know of their target, and the sizes of draft layers.


class DrafterConfig(PreTrainedConfig):
    """What every trained drafter knows. Unknown keys are refused, so a misspelt one cannot pass unnoticed.

    Args:
        vocab_size, hidden_size: the target's; embeddings and LM head are heads from it.
        target_num_layers: depth of the target it was made for.
        target_layer_ids: target blocks whose outputs are its features, counted from 0, before the final norm.
        target_fingerprint: of the target's tokenizer; empty when unknown.
        draft_length: longest prefix that is drafted.
    """

    model_type = "drafter"

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_num_layers: int = 32
    target_layer_ids: list[int] | tuple[int, ...] = (1, 16, 30)
    target_fingerprint: str = ""
    draft_length: int = 7

    def __post_init__(self, **kwargs: Any) -> None:
        known = set(self.__dataclass_fields__)
        unknown = sorted(key for key in kwargs if key not in known | PASSED_BY_TRANSFORMERS)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise UserError(f"unknown key {unknown[0]!r} in the drafter's config; {hint}")
        super().__post_init__(**kwargs)
        self.target_layer_ids = list(self.target_layer_ids)
        self.check()

    def check(self) -> None:
        """Raises `UserError` for values that cannot be."""
        if self.draft_length < 1:
            raise UserError(f"draft_length is {self.draft_length}; give at least 1")
        if not self.target_layer_ids or not all(0 <= i < self.target_num_layers for i in self.target_layer_ids):
            raise UserError(
                f"target_layer_ids {self.target_layer_ids} must name blocks 0..{self.target_num_layers - 1}"
            )


class TrainableDrafter(PreTrainedModel):
    """A `Drafter` that is trained at anchors: places of a text whose next tokens it learns.

    It works in two parts, so that what is as large as the vocabulary need not exist for all anchors at once:
    `draft_states` for a whole batch of rows, then `loss` or `candidates` for some of its anchors.
    Save and load it with `save_pretrained` and `from_pretrained` (`config.json`, `model.safetensors`).
    """

    config_class = DrafterConfig
    config: DrafterConfig
    main_input_name = "features"

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        self._prepared: tuple[Any, DraftHead] | None = None

    def __call__(self, *given: Any, **options: Any) -> Any:
        """`forward`. Raises `UserError` where `generate` calls it: a drafter is no `custom_generate` by itself."""
        if "generation_config" in options:
            refuse_call(self)
        return super().__call__(*given, **options)

    def forward(self, batch: AnchorBatch, embed: nn.Module, head: nn.Module) -> torch.Tensor:
        """Sum of the loss over all used anchors, a scalar in float32; embed, head: the target's frozen modules.

        What is as large as the vocabulary exists for `LossOptions.chunk` anchors at a time, and is computed again in
        the backward pass. With `LossOptions.recompute` so are the draft layers.
        """
        anchors, options = batch.anchors, batch.options
        given = (batch.features, batch.tokens, anchors.positions, embed)
        if options.recompute:
            states = checkpoint(self.draft_states, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            states = self.draft_states(*given)
        last = None if batch.last is None else anchors.flat(states_after(batch.last, anchors))
        copies = None if batch.copies is None else anchors.flat(batch.copies)
        known = (anchors.flat(anchors.prefixes), anchors.flat(anchors.valid), last, copies)
        return self.chunked_loss(LossInputs(anchors.flat(states), *known), embed, head, options)

    def chunked_loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """Sum of `loss` over N anchors, a scalar in float32, `options.chunk` of them at a time."""
        if not len(inputs.states):
            return inputs.states.sum()  # 0, and still a part of the graph

        def part(inputs: LossInputs) -> torch.Tensor:
            return self.loss(inputs, embed, head, options).sum()

        chunks = inputs.split(options.chunk or usual_chunk(self.config.vocab_size, self.config.draft_length))
        if len(chunks) == 1:
            return part(chunks[0])
        parts = [checkpoint(part, each, use_reentrant=False, preserve_rng_state=False) for each in chunks]
        return torch.stack(parts).sum()

    @abstractmethod
    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """What the drafter knows at many anchors, `[B, A, ...]`.

        features `[B, T, K]` and tokens `int64 [B, T]` of right-padded rows; anchors `int64 [B, A]`. The root of anchor
        p is `tokens[p]`; only the features of the tokens before p may be looked at. The tokens after p are for drafters
        that `loss` could not give them: what is said of one may depend on those before it.
        """

    @abstractmethod
    def check_loss(self, loss: str) -> None:
        """Raises `UserError` for a loss of the training settings that this drafter has not."""

    @abstractmethod
    def loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """Loss of each of N anchors `[N]`, in float32 and nats."""

    def without_lookup(self) -> TrainableDrafter:
        """The same weights where each draft asks the network (`drafters/ctc_session.py`)."""
        return self

    def candidates(
        self,
        blocks: torch.Tensor,
        root: torch.Tensor,
        heads: Any,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """The prefixes of blocks `[N, ...]` after root `int64 [N]`, enough for `nodes` nodes.

        Prefixes of probability below `min_probability` may be missing. Drafters whose blocks say too little for this
        have `drafts` of their own instead. text: up to the roots, for those that copy.
        """
        raise NotImplementedError

    def drafts(
        self,
        features: torch.Tensor,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        used: torch.Tensor,
        heads: Any,
        nodes: int,
        chunk: int,
    ) -> Iterator[Candidates]:
        """What a session would propose at the used anchors, `chunk` of them at a time; for validation.

        features, tokens and anchors as in `draft_states`; used `bool [B, A]`.
        """
        blocks = self.draft_states(features, tokens, anchors, heads.embed)[used].split(chunk)
        roots = tokens.gather(1, anchors)[used].split(chunk)
        for part, root in zip(blocks, roots, strict=True):
            yield self.candidates(part, root, heads, nodes)

    @abstractmethod
    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""

    @abstractmethod
    def prepare(self, embed: nn.Module, head: nn.Module) -> DraftHead:
        """The target's embedding and LM head made ready for drafting."""

    def prepared(self, embed: nn.Module, head: nn.Module) -> Any:
        """`prepare`, kept until the modules or any weights change, or training goes on. Raises as `check_modules`."""
        self.check_modules(embed, head)
        weights = [*self.parameters(), *embed.parameters(), *head.parameters()]
        key = (id(embed), id(head), *((id(w), 0 if w.is_inference() else w._version) for w in weights))
        found = self._prepared  # read once: another thread may draft for another target
        if found is None or found[0] != key:
            found = self._prepared = (key, self.prepare(embed, head))
        return found[1]

    def train(self, mode: bool = True) -> Self:
        """As every module's. What was made of the weights goes: fused optimizers change them without a trace."""
        if mode:
            self._prepared = None
        return super().train(mode)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return tuple(self.config.target_layer_ids)

    @classmethod
    def feature_choice(cls, depth: int) -> list[int]:
        """The target blocks that a fresh drafter reads, for a target of `depth` blocks."""
        return sorted({min(1, depth - 1), depth // 2, max(depth - 2, 0)})

    @classmethod
    def for_target(cls, target: PreTrainedConfig, **overrides: Any) -> Self:
        """A fresh, untrained drafter with the target's sizes; `overrides` are keys of its config."""
        text = target.get_text_config(decoder=True)
        hidden, heads = needed_size(text, "hidden_size"), needed_size(text, "num_attention_heads")
        grouped = target_size(text, "num_key_value_heads") or heads
        depth = needed_size(text, "num_hidden_layers")
        sizes = {
            "vocab_size": needed_size(text, "vocab_size"),
            "hidden_size": hidden,
            "target_num_layers": depth,
            # Some families count several layers for each of their `num_layers` blocks.
            "target_layer_ids": cls.feature_choice(min(depth, target_size(text, "num_layers") or depth)),
            "intermediate_size": target_size(text, "intermediate_size") or 4 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": math.gcd(heads, grouped),
            "head_dim": target_size(text, "head_dim") or hidden // heads,
            "max_position_embeddings": target_size(text, "max_position_embeddings") or 32768,
        }
        known = cls.config_class.__dataclass_fields__
        return cls(cls.config_class(**{key: size for key, size in sizes.items() if key in known} | overrides))

    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module) -> None:
        """Takes over what is worth starting from: the target's final norm `[H]`, its LM head."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Self:
        """Loads a folder or hub id. Raises `UserError` for missing, corrupt or incomplete checkpoints."""
        try:
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
            drafter, report = super().from_pretrained(name, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # every reader down to safetensors has errors of its own
            reason = first_line(error)
            raise UserError(f"no drafter could be loaded from {name}: {reason}") from error
        wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
        wrong += [f"{key} has another shape" for key in sorted(key for key, *_ in report["mismatched_keys"])]
        wrong += [f"{key} is not known" for key in sorted(report["unexpected_keys"])]
        if wrong:
            raise UserError(f"{name} is not a whole drafter: {wrong[0]}; download it again")
        found: Self = drafter.eval()
        return found

    def check_target(self, target: PreTrainedConfig, fingerprint: str = "") -> None:
        """Raises `UserError` when the drafter was made for another target."""
        text = target.get_text_config(decoder=True)
        pairs = [
            ("hidden size", self.config.hidden_size, text.hidden_size),
            ("vocabulary", self.config.vocab_size, text.vocab_size),
            ("layer count", self.config.target_num_layers, text.num_hidden_layers),
        ]
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise UserError(f"the drafter was made for a target with {what} {mine}, this one has {theirs}")
        if fingerprint and self.config.target_fingerprint and fingerprint != self.config.target_fingerprint:
            raise UserError("the drafter was made for another tokenizer; use the target that it was trained for")

    def check_modules(self, embed: nn.Module, head: nn.Module | None) -> None:
        """Raises `UserError` when the target's embedding or LM head is not as wide as its blocks."""
        hidden, device = self.config.hidden_size, next(embed.parameters()).device
        width = embed(torch.zeros(1, dtype=torch.long, device=device)).shape[-1]
        if width != hidden:
            raise UserError(
                f"the target's embeddings have {width} numbers and its blocks {hidden}; a trained drafter needs a "
                "target where both are the same"
            )
        reads, writes = getattr(head, "in_features", hidden), getattr(head, "out_features", self.config.vocab_size)
        if head is None or (reads, writes) != (hidden, self.config.vocab_size):
            found = "is missing" if head is None else f"makes {writes} logits of {reads} numbers"
            raise UserError(
                f"the target's LM head {found}, where a trained drafter needs {self.config.vocab_size} of {hidden}; "
                "use prompt_lookup, or another target"
            )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


def states_after(states: torch.Tensor, anchors: Anchors) -> torch.Tensor:
    """States `[B, A, U, H]` of each anchor's root and y1..y(U-1), of states `[B, T, H]`; clamped at the end."""
    steps = torch.arange(anchors.valid.shape[2], device=states.device)
    index = (anchors.positions.unsqueeze(-1) + steps).clamp(max=states.shape[1] - 1).flatten(1)
    found = states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[2]))
    return found.unflatten(1, anchors.valid.shape[1:])


def network_of(drafter: Drafter) -> Drafter:
    """The drafter where each draft asks its network, if it has one: what its own drafts cost and are worth."""
    return drafter.without_lookup() if isinstance(drafter, TrainableDrafter) else drafter


PASSED_BY_TRANSFORMERS = frozenset({"torch_dtype", "name_or_path", "_commit_hash"}) | {
    *("attn_implementation", "output_attentions", "experts_implementation")
}


def target_size(target: PreTrainedConfig, name: str) -> int | None:
    """A size of a target's layers as one number: the largest where layers differ; None where there is none."""
    try:
        found = getattr(target, name, None)
    except RuntimeError:  # transformers' way to say that it differs by layer
        found = [getattr(layer, name, None) for layer in target.per_layer_config]
    if isinstance(found, list | tuple):
        found = max((size for size in found if size), default=None)
    return found or None


def needed_size(target: PreTrainedConfig, name: str) -> int:
    """`target_size`. Raises `UserError` where the configuration has none."""
    found = target_size(target, name)
    if found is None:
        raise UserError(f"the configuration of {target.model_type} has no {name}, which a drafter takes over")
    return found
