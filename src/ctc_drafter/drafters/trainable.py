"""`TrainableDrafter`: what trained drafters share; creation, loading, saving."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from ctc_drafter.ctc.copies import Text
from ctc_drafter.drafters.base import Drafter, DraftSession, refuse_call
from ctc_drafter.drafters.chunked import chunked_sum
from ctc_drafter.drafters.config import DrafterConfig
from ctc_drafter.drafters.lm_head import DraftHead, needed_size, target_size, usual_chunk
from ctc_drafter.target.packed import pack, unpack
from ctc_drafter.types import Candidates, UserError, first_line

# (which of the used anchors, int64 [N], nodes) -> the drafts there
DraftAt = Callable[[torch.Tensor, int], Candidates]
PREPARING = threading.RLock()  # held while a drafter's layers are replaced by packed ones, which others may be reading

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

    def states_after(self, states: torch.Tensor) -> torch.Tensor:
        """States `[N, U, K]` of the used anchors' roots and y1..y(U-1), of `[B, T, K]`; clamped at the end."""
        steps = torch.arange(self.valid.shape[2], device=states.device)
        index = (self.positions.unsqueeze(-1) + steps).clamp(max=states.shape[1] - 1).flatten(1)
        found = states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[2]))
        return self.flat(found.unflatten(1, self.valid.shape[1:]))


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

        What is as large as the vocabulary exists for `LossOptions.chunk` anchors at a time. With
        `LossOptions.recompute` the draft layers are computed again in the backward pass.
        """
        anchors, options, flat = batch.anchors, batch.options, batch.anchors.flat
        again = partial(checkpoint, self.draft_states, use_reentrant=False, preserve_rng_state=False)
        run = again if options.recompute else self.draft_states
        states = run(batch.features, batch.tokens, anchors.positions, embed)
        last = None if batch.last is None else anchors.states_after(self.teacher(batch.last, head))
        copies = None if batch.copies is None else flat(batch.copies)
        inputs = LossInputs(flat(states), flat(anchors.prefixes), flat(anchors.valid), last, copies)
        if not len(inputs.states):
            return inputs.states.sum()  # 0, and still a part of the graph
        size = options.chunk or usual_chunk(self.config.vocab_size, self.config.draft_length)
        chunks, drafted = inputs.split(size), self.narrowed(head)

        def part(states: torch.Tensor, number: int) -> torch.Tensor:
            return self.loss(replace(chunks[number], states=states), embed, drafted, options).sum()

        return chunked_sum(part, inputs.states, size, self.parameters())

    def teacher(self, last: torch.Tensor, head: nn.Module) -> torch.Tensor:
        """What the loss reads of the target's states `[B, T, H]`, worked out once a token, `[B, T, K]`."""
        return last

    def narrowed(self, head: nn.Module) -> nn.Module:
        """The LM head for the tokens that are drafted: all, unless a method says otherwise."""
        return head

    @abstractmethod
    def draft_states(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, embed: nn.Module
    ) -> torch.Tensor:
        """What the drafter knows at many anchors, `[B, A, ...]`.

        features `[B, T, K]` and tokens `int64 [B, T]` of right-padded rows; anchors `int64 [B, A]`. The root of anchor
        p is `tokens[p]`; only the features before p may be looked at. The tokens after p are for drafters that `loss`
        could not give them: what is said of one may depend on those before it.
        """

    def log_likelihoods(
        self, inputs: LossInputs, embed: nn.Module, head: nn.Module, temperatures: Sequence[float]
    ) -> torch.Tensor | None:
        """Log-probability of all valid labels at each temperature, float64 `[len(temperatures)]`, to fit
        `DrafterConfig.score_temperature` by; None where drafts are not scored by it."""
        return None

    @abstractmethod
    def check_loss(self, loss: str) -> None:
        """Raises `UserError` for a loss of the training settings that this drafter has not."""

    @abstractmethod
    def loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """Loss of each of N anchors `[N]`, in float32 and nats."""

    def without_lookup(self) -> TrainableDrafter:
        """The same weights where each draft asks the network (`drafters/ctc_session.py`)."""
        return self.with_lookup(0)

    def with_lookup(self, length: int) -> TrainableDrafter:
        """The same weights with at most `length` tokens copied without the network, where the method can do so."""
        return self

    def without_copies(self) -> TrainableDrafter:
        """The same weights where nothing is copied from the text; itself where nothing is anyway."""
        return self

    def candidates(
        self,
        states: torch.Tensor,
        root: torch.Tensor,
        heads: Any,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """The prefixes of draft states `[N, ...]` (`draft_states`) after root `int64 [N]`, enough for `nodes` nodes.

        Those of probability below `min_probability` may be missing. text: up to the roots, for drafters that copy.
        Where states say too little for this, a drafter has a `drafting_at` of its own instead.
        """
        raise NotImplementedError

    def best_first(self, heads: Any) -> bool:
        """Whether `candidates` for n nodes are the very first n of those for more."""
        return False

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
        draft = self.drafting_at(features, tokens, anchors, used, heads)
        for part in torch.arange(int(used.sum()), device=anchors.device).split(chunk):
            yield draft(part, nodes)

    def drafting_at(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, used: torch.Tensor, heads: Any
    ) -> DraftAt:
        """What a session would propose at any of the used anchors, when asked; arguments as in `drafts`.

        What the anchors share is worked out here, once.
        """
        states, roots = self.draft_states(features, tokens, anchors, heads.embed)[used], tokens.gather(1, anchors)[used]
        return lambda part, nodes: self.candidates(states[part], roots[part], heads, nodes)

    @abstractmethod
    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""

    @abstractmethod
    def prepare(self, embed: nn.Module, head: nn.Module) -> DraftHead:
        """The target's embedding and LM head made ready for drafting."""

    def prepared(self, embed: nn.Module, head: nn.Module) -> Any:
        """`prepare`, kept until the modules or any weights change, or training goes on; the drafter's own linear layers
        are packed with it. One thread at a time makes a drafter ready. Raises as `check_modules`."""
        self.check_modules(embed, head)
        weights = [*self.parameters(), *embed.parameters(), *head.parameters()]
        versions = ((id(w), 0 if w.is_inference() else w._version) for w in weights)
        key = (id(embed), id(head), self.config.score_temperature, *versions)
        with PREPARING:
            found = self._prepared
            if found is None or found[0] != key:
                unpack(self)  # blocks of weights that have changed
                pack(self)
                found = self._prepared = (key, self.prepare(embed, head))
            return found[1]

    def train(self, mode: bool = True) -> Self:
        """As every module's. What was made of the weights goes: fused optimizers change them without a trace."""
        if mode:
            self._prepared = None
            unpack(self)
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
        hidden = needed_size(text, "hidden_size")
        heads = target_size(text, "num_attention_heads") or max(1, hidden // 64)  # recurrent models have none
        depth = needed_size(text, "num_hidden_layers")
        sizes = {
            "vocab_size": needed_size(text, "vocab_size"),
            "hidden_size": hidden,
            "target_num_layers": depth,
            # Some families count several layers for each of their `num_layers` blocks.
            "target_layer_ids": cls.feature_choice(min(depth, target_size(text, "num_layers") or depth)),
            "intermediate_size": target_size(text, "intermediate_size") or 4 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": math.gcd(heads, target_size(text, "num_key_value_heads") or heads),
            "head_dim": target_size(text, "head_dim") or hidden // heads,
            "max_position_embeddings": target_size(text, "max_position_embeddings") or 32768,
        }
        known = cls.config_class.__dataclass_fields__
        return cls(cls.config_class(**{key: size for key, size in sizes.items() if key in known} | overrides))

    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """Takes over what is worth starting from: the target's final norm `[H]`, its LM head and embedding."""

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
        drafter.check_weights(str(name))
        return cast(Self, drafter.eval())

    def check_weights(self, name: str) -> None:
        """Raises `UserError` for loaded weights that cannot be used; `name` says whose they are."""

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


def network_of(drafter: Drafter) -> Drafter:
    """The drafter where each draft asks its network, if it has one: what its own drafts cost and are worth."""
    without = getattr(drafter, "without_lookup", None)
    return drafter if without is None else cast(Drafter, without())
