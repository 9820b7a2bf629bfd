"""How tensors lie in memory, where that decides the speed: weights for few tokens at a time, caches that grow."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicLayer

GROWTH = 256  # slots that a cache adds at a time
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
def grouped_heads(device: torch.device) -> Iterator[None]:
    """On a CPU, lets attention under a mask read grouped keys as they are. transformers would first repeat them for
    each head, which takes longer than the attention; its switch for that is this variable of the environment."""
    if device.type != "cpu":
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


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new keys and values behind the old ones instead of copying both to a longer tensor.

    `keys` and `values` are views of the slots in use. Who replaces them (crops, reorders, selects rows) need not know:
    what no longer lies where it should is copied once.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.rooms = [self.keys, self.values]

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes these in place of its own, which are let go at once."""
        self.keys, self.values = keys, values
        self.rooms = [keys, values]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.is_initialized:
            self.hold(self.keys, self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        start, room = old.shape[2], self.rooms[which]
        end = start + new.shape[2]
        if end > room.shape[2] or old.data_ptr() != room.data_ptr() or old.shape[0] != room.shape[0]:
            slots = -(-end // GROWTH) * GROWTH
            room = self.rooms[which] = new.new_empty(new.shape[0], new.shape[1], slots, new.shape[3])
            room[:, :, :start] = old
        room[:, :, start:end] = new
        return room[:, :, :end]
