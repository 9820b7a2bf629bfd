"""A target whose short forwards are compiled: plain steps and trees alike. Prompts go through as ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import pad
from transformers import Cache

from ctc_drafter.graphs import BACKEND, MANY, Graph, Shape, make_graph, sizes_are_fixed
from ctc_drafter.selftest import self_test
from ctc_drafter.static_cache import RoomyLayer, reserve
from ctc_drafter.target import Target
from ctc_drafter.types import UserError, Verification

SIZES = (1, 5, 9, 17, 33, 65)  # tokens of a graph: the root and 4, 8... nodes; smaller trees are filled up


@dataclass(frozen=True)
class CompiledTarget(Target):
    """A `Target` with static caches and a graph for each kind of short forward, made when it is first needed.

    layers: blocks whose features every graph hands out, so that plain steps and trees share one. Build it with
    `compile_target`. The graphs live here, not on the model. While one is made, the exporter puts stand-ins in the
    place of the model's weights: where several threads run it, let `prepare` make them first.
    """

    compiled: ClassVar[bool] = True
    # A graph's time is that of its largest tree: the first and the last tree of each tell of all.
    telling: ClassVar[tuple[int, ...]] = tuple(sorted({1, *SIZES, *(size - 1 for size in SIZES)} - {0, SIZES[-1]}))

    cache: str = "static"
    layers: tuple[int, ...] = ()
    backend: str = BACKEND
    graphs: dict[Shape, Graph] = field(default_factory=dict, compare=False, repr=False)
    making: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.cache != "static":
            raise UserError(f"a compiled target has no {self.cache} cache; make it with compile_target")

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
    ) -> Verification:
        """See `Target.forward`. Prompts, and trees of more than 64 nodes, are not compiled.

        Raises `UserError` when a graph cannot be made.
        """
        rows, count = tokens.shape
        prompt = keep is not None or (allowed is None and count > 1)
        if prompt or count > SIZES[-1]:
            return super().forward(tokens, positions, cache, allowed, key_positions, layers, keep, long)
        start = cache.get_seq_length()
        if allowed is None or key_positions is None:
            key_positions = torch.arange(start + 1, device=tokens.device).expand(rows, -1)
            allowed = torch.ones_like(key_positions, dtype=torch.bool).unsqueeze(1)

        size = size_for(count)
        slots, more = reserve(cache, size), size - count
        allowed = pad(allowed, (0, slots - allowed.shape[2], 0, more))
        key_positions = pad(key_positions, (0, slots - key_positions.shape[1]))
        # Filled up with the first token again, not with one that the target may be unable to compute.
        tokens, positions = (torch.cat([x, x[:, :1].expand(-1, more)], 1) for x in (tokens, positions))
        masks = self._masks(allowed, positions, key_positions)
        kinds, masks = (tuple(masks), list(masks.values())) if isinstance(masks, dict) else ((), [masks])
        first = torch.tensor([start], device=tokens.device)
        inputs = [tokens, positions, first, *masks, *states_of(cache)]

        fixed = slots if sizes_are_fixed(self.device) else 0
        shape = Shape(self._rows(rows), size, tuple(layers) or self.layers, kinds, fixed)
        if shape not in self.graphs:
            with self.making:
                if shape not in self.graphs:
                    self.graphs[shape] = make_graph(self.model, shape, inputs, self.backend)
        logits, features = self.graphs[shape](inputs)
        for layer in cache.layers:
            layer.cumulative_length.fill_(start + count)
        return Verification(logits[:, :count], features[:, :count] if layers and features is not None else None)

    def prepare(self, nodes: int, rows: int, layers: Sequence[int] = ()) -> None:
        """Makes the graphs of trees of up to `nodes` nodes, for one row and for up to `rows` rows; layers: in place of
        `self.layers`."""
        for count in sorted({1, rows}):
            for size in (size for size in SIZES if size <= size_for(nodes + 1)):
                cache, zeros = self.new_cache(1), torch.zeros(count, size, dtype=torch.long, device=self.device)
                self.forward(zeros[:, :1], zeros[:, :1], cache, keep=zeros[0, :1])
                allowed = torch.ones(count, size, 1 + size, dtype=torch.bool, device=self.device)
                self.forward(zeros, zeros, cache, allowed, pad(zeros, (0, 1)), tuple(layers) or self.layers)

    def _rows(self, rows: int) -> int:
        """Rows of a graph's shape. A single row is apart: what is known of it makes its graph faster."""
        return rows if rows == 1 or sizes_are_fixed(self.device) else MANY


def size_for(tokens: int) -> int:
    """The smallest graph that so many tokens fit in, the largest if none does."""
    return next((size for size in SIZES if size >= tokens), SIZES[-1])


def states_of(cache: Cache) -> list[torch.Tensor]:
    """Keys and values of each layer, one after the other. Raises `UserError` for layers that keep none."""
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        if not isinstance(layer, RoomyLayer) or layer.keys is None or layer.values is None:
            raise UserError("layers that share another one's keys cannot be compiled; leave out --compile")
        found += [layer.keys, layer.values]
    return found


def compile_target(target: Target, layers: Sequence[int] = (), backend: str = BACKEND) -> CompiledTarget:
    """The same model with graphs; two are made at once, and tried on a small tree. `layers` as in `CompiledTarget`.

    Raises `UserError` when the model cannot be compiled, or when this machine has no compiler.
    """
    if target.switch is not None:
        raise UserError(f"{type(target.model).__name__} changes its longrope factors on the way; leave out --compile")
    made = CompiledTarget(target.model, layers=tuple(layers), backend=backend)
    self_test(made)
    return made
