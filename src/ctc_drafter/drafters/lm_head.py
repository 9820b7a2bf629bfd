"""The target's embedding and LM head, prepared for drafting; draft vocabularies."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ctc_drafter.target.packed import PackedLinear, can_pack, is_linear, multiplies_bfloat16
from ctc_drafter.types import UserError

# What a drafter takes from its target, made ready once: embedding, LM head, and the search that fits the device.


@dataclass(frozen=True)
class DraftHead:
    """embed and head are for drafting only: the head may be of lower precision than the target's."""

    embed: nn.Module
    head: nn.Module


def head_logits(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Float32 logits `[N, V]` of states `[N, H]`. Two dimensions: a sliced third one makes PyTorch copy the weights."""
    dtype = next((w.dtype for w in head.parameters() if w.is_floating_point()), states.dtype)
    return head(states.to(dtype)).float()


def draft_head(head: nn.Module) -> nn.Module:
    """The target's LM head: in bfloat16 on processors that multiply it, and with packed weights where they are small.

    It is most of what a draft reads from memory, and drafts need no precision. A quantised head stays as it is.
    """
    weight = getattr(head, "weight", None)
    if type(weight) is not nn.Parameter:
        return head
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and multiplies_bfloat16():
        head = copy.deepcopy(head).to(torch.bfloat16)
    return PackedLinear.of(head) if type(head) is nn.Linear and is_linear(head) and can_pack(head) else head


# A draft vocabulary: the tokens that a drafter may draft, where it leaves the rare ones to the target.
#
# The LM head is what a draft reads most of, and the search works over all its columns; rare tokens cost as much as
# frequent ones and are hardly ever accepted. Tokens outside are still verified, emitted and read as context: only
# drafts end before them. Source of the idea: FR-Spec (Zhao et al., 2025); of the tensor's name and form `d2t`:
# EAGLE-3's checkpoints, as engines read them.


def most_frequent(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` tokens of the largest counts `int64 [T]`, as sorted ids `int64 [size]`; lower ids win ties."""
    if not 1 <= size <= len(counts):
        raise UserError(f"a draft vocabulary of {size} tokens cannot be; give 1 to {len(counts)}")
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def columns_of(tokens: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
    """Places of tokens `int64 [...]` in the sorted vocabulary `int64 [V]`, -1 where they are not in it."""
    places = torch.searchsorted(vocabulary, tokens.contiguous()).clamp(max=len(vocabulary) - 1)
    return places.where(vocabulary[places] == tokens, -1)


def token_columns(size: int, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """`columns_of` every token of a target with `size` of them, `int64 [size]`; no vocabulary drafts all."""
    every = torch.arange(size, device=None if vocabulary is None else vocabulary.device)
    return every if vocabulary is None else columns_of(every, vocabulary)


def drafted_part(columns: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`bool [N, U]`: valid labels before the first that is not in the vocabulary; columns as in `columns_of`."""
    return valid & (columns >= 0).cumprod(1).bool()


def narrow_head(head: nn.Module, vocabulary: torch.Tensor) -> nn.Module:
    """The LM head with the columns of the vocabulary alone."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if type(weight) is not nn.Parameter:  # quantised: its rows cannot be taken
        return Columns(head, vocabulary)
    with torch.device(weight.device):
        narrow = nn.utils.skip_init(nn.Linear, weight.shape[1], len(vocabulary), bias is not None, dtype=weight.dtype)
    narrow.weight = nn.Parameter(weight.detach()[vocabulary], requires_grad=False)
    if bias is not None:
        narrow.bias = nn.Parameter(bias.detach()[vocabulary], requires_grad=False)
    return narrow


class Columns(nn.Module):
    """Selects columns of another module's output."""

    def __init__(self, inner: nn.Module, columns: torch.Tensor):
        super().__init__()
        self.inner, self.columns, self.out_features = inner, columns, len(columns)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states)[..., self.columns]


# Sizes of the target, by its configuration.


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


# The target's logits and probabilities in training.

# Fewer leave kernels idle, more only cost memory: of a vocabulary of 8,192 it holds 512 anchors, of 128k 32.
LOGITS_AT_A_TIME = 2**28


def usual_chunk(vocab_size: int, draft_length: int) -> int:
    """Anchors whose logits and biases, a row of each for every label, take some `LOGITS_AT_A_TIME` bytes."""
    return max(1, LOGITS_AT_A_TIME // (4 * vocab_size * 2 * (draft_length + 1)))


@torch.no_grad()
def target_probabilities(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The target's, float32 `[N, U, V]`, of what its LM head reads `[N, U, H]`."""
    return head_logits(head, states.flatten(0, 1)).softmax(-1).unflatten(0, states.shape[:2])
