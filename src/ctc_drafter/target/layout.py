"""CPU memory layout of weights, and grouped-query attention without repeated keys."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

FORCE_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


def columns_first(model: nn.Module) -> None:
    """Stores the float32 matrices of a model on the CPU column by column; shapes and values stay.

    x Wᵀ then needs no transposition of W, whose cost MKL's matrix product cannot hide for a handful of tokens: a third
    of the time at 9 tokens, nothing at 1. Shared parameters stay shared.
    """
    for weight in model.parameters():
        if type(weight) is not nn.Parameter:  # quantised
            continue
        if weight.dim() == 2 and weight.dtype == torch.float32 and weight.device.type == "cpu":
            weight.data = weight.data.t().contiguous().t()


@contextmanager
def grouped_heads(device: torch.device, single: bool = False) -> Iterator[None]:
    """On a CPU, lets attention under a mask read grouped keys as they are. transformers would first repeat them for
    each head, which takes longer than the attention; its switch for that is this variable of the environment.

    single: whether each row has one token alone. Then transformers makes rows of the heads that share a key, which is
    faster still: a third of the kernel's products.
    """
    if device.type != "cpu" or single:
        yield
        return
    SWITCH.take()
    try:
        yield
    finally:
        SWITCH.give_back()


class Switch:
    """A variable of the environment that is set while somebody wants it: threads may generate side by side. One that
    was set before stays."""

    def __init__(self, name: str):
        self.name, self.users, self.mine, self.lock = name, 0, False, threading.Lock()

    def take(self) -> None:
        with self.lock:
            if not self.users:
                self.mine = self.name not in os.environ
                os.environ.setdefault(self.name, "1")
            self.users += 1

    def give_back(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and self.mine:
                os.environ.pop(self.name, None)


SWITCH = Switch(FORCE_GROUPED)
