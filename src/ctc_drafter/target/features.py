"""Finds a model's decoder blocks and final norm, and captures hidden states with forward hooks.

Found by structure, not by name: families call the same things `layers`, `h`, `blocks`, `norm`, `ln_f` and more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ctc_drafter.types import UserError

HOOKS = threading.Lock()  # held while hooks are put on a model or taken off


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers; see `decoder_stack`."""
    return decoder_stack(model)[1]


def decoder_stack(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the decoder blocks of the text part, and their list.

    That is the list as long as the model is deep, the first of several, or else the only list there is: some families
    count two layers for each block. Lists inside of blocks do not count. Raises `UserError` when there is none.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found = list(module_lists(text_part(model)))
    fitting = [each for each in found if len(each[1]) == depth] or (found if len(found) == 1 else [])
    if not fitting:
        raise UserError(
            f"{type(model).__name__} has no list of {depth} decoder layers whose outputs a drafter could read; "
            "use prompt_lookup, or another target"
        )
    return fitting[0]


def text_part(model: PreTrainedModel) -> nn.Module:
    """The decoder of a model, without what it may have for images and sound."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else model.base_model


def module_lists(module: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """The outermost module lists with more than nothing in them, each with the module that holds it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            if len(child):
                yield module, child
        else:
            yield from module_lists(child)


def check_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raises `UserError` where there are no such blocks to read, before anything is computed."""
    if layers and not 0 <= min(layers) <= max(layers) < len(decoder_blocks(model)):
        raise UserError(
            f"the drafter reads blocks {list(layers)}, and {type(model).__name__} has {len(decoder_blocks(model))}; "
            "give it target_layer_ids below that"
        )


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last block: the last sibling of the blocks that holds one weight per hidden unit."""
    size = model.config.get_text_config(decoder=True).hidden_size
    siblings = [child for child in decoder_stack(model)[0].children() if not isinstance(child, nn.ModuleList)]
    norms = [m for m in siblings if getattr(getattr(m, "weight", None), "shape", None) == (size,)]
    return norms[-1] if norms else None


@torch.no_grad()
def norm_scale(norm: nn.Module, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Scale of a root-mean-square or layer norm, `[size]`.

    Some families store the weight minus one, so the norm itself is asked: signs that alternate have mean 0 and
    root mean square 1, and the difference of both orders drops a bias.
    """
    signs = torch.ones(size, dtype=dtype, device=device)
    signs[1::2] = -1
    return (norm(signs) - norm(-signs)) / 2 * signs


@contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While open, the outputs of these blocks (before the final norm) land in the dictionary.

    Those of forwards in this thread: other threads may run the same model, under captures of their own or none. A model
    whose blocks run in threads that its forward starts hands nothing out.
    """
    outputs: dict[int, torch.Tensor] = {}
    if not layers:
        yield outputs
        return
    owner = threading.get_ident()

    def keeper(layer: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Compilers cannot trace the question, and trace one thread only.
            if torch.compiler.is_dynamo_compiling() or threading.get_ident() == owner:
                outputs[layer] = state_of(output)

        return keep

    blocks = decoder_blocks(model)
    # PyTorch copies a module's hooks before it calls them, so a forward on its way does not mind new ones. But it
    # counts their ids without a lock, and of two hooks with one id only the last is kept.
    with HOOKS:
        handles = [blocks[layer].register_forward_hook(keeper(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        with HOOKS:
            for handle in handles:
                handle.remove()


def state_of(output: Any) -> torch.Tensor:
    """Hidden states of a block, `[B, T, H]`: the mean of its streams, where it has several, `[S, B, T, H]` (AltUp)."""
    state = output[0] if isinstance(output, tuple) else output
    return state.mean(0) if state.dim() == 4 else state


def concatenate(
    outputs: dict[int, torch.Tensor], layers: Sequence[int], device: torch.device | None = None
) -> torch.Tensor | None:
    """The outputs of these layers, side by side, on `device`, or that of the first: blocks may be on several."""
    if not layers:
        return None
    place = outputs[layers[0]].device if device is None else device
    return torch.cat([outputs[layer].to(place) for layer in layers], -1)
