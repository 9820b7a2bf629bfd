"""Recurrent layers read token by token inside a forward, for models that forget their state before several tokens.

Mixers of the first Mamba (Mamba, Jamba, Falcon Mamba, Zamba) start anew whenever they are given more than one token.
Read one by one they are exact; attention, MLPs, experts and the LM head still see all tokens at once.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ctc_drafter.target.features import HOOKS

USERS: dict[int, int] = {}  # id of a model -> forwards that want it stepped at the moment; changed under `HOOKS`
PLACED = "forward"  # in a module's own dictionary; hooks of accelerate stand there too
HERE = threading.local()  # .cache: what this thread's forward reads with; other threads may run the model as it is


def mixers(model: nn.Module) -> list[nn.Module]:
    """Recurrent layers by structure: they know their place in the cache, and have a convolution of their own."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and any(isinstance(child, nn.Conv1d) for child in module.children())
    ]


@contextmanager
def stepped(model: nn.Module, cache: Cache) -> Iterator[None]:
    """While open, recurrent layers of forwards of this thread read their tokens one by one behind `cache`."""
    with HOOKS:
        USERS[id(model)] = USERS.get(id(model), 0) + 1
        if USERS[id(model)] == 1:
            for module in mixers(model):
                module.forward = one_by_one(module, module.forward, vars(module).get(PLACED))
    HERE.cache = cache
    try:
        yield
    finally:
        HERE.cache = None
        with HOOKS:
            USERS[id(model)] -= 1
            if not USERS[id(model)]:
                del USERS[id(model)]
                for module in mixers(model):
                    placed = module.forward.placed  # type: ignore[attr-defined]
                    del module.forward
                    if placed is not None:
                        module.forward = placed


def one_by_one(module: nn.Module, forward: Callable[..., Any], placed: Callable[..., Any] | None) -> Callable[..., Any]:
    """A mixer's forward over `[B, T, H]` as T forwards of one token, where there is a state to go on from. placed: what
    stood in its place on the module itself."""
    first = next(iter(inspect.signature(forward).parameters))

    def steps(*given: Any, **named: Any) -> Any:
        states = given[0] if given else named[first]
        cache = getattr(HERE, "cache", None)
        if cache is None or states.shape[1] == 1 or not cache.has_previous_state(module.layer_idx):
            return forward(*given, **named)
        rest = {name: value for name, value in named.items() if name not in (first, "attention_mask")}
        return torch.cat([forward(token, *given[1:], **rest) for token in states.split(1, 1)], 1)

    steps.placed = placed  # type: ignore[attr-defined]
    return steps
