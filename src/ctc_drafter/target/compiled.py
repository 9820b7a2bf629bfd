"""Compiled target (torch.export, torch.compile): graphs of fixed sizes for short forwards."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim
from torch.nn.functional import pad
from torch.utils._pytree import tree_map
from transformers import Cache, PreTrainedModel

from ctc_drafter.target.cache import GrowableStaticLayer, reserve
from ctc_drafter.target.features import captured, concatenate
from ctc_drafter.target.layout import grouped_heads
from ctc_drafter.target.model import UNLIMITED_CONTEXT, Target
from ctc_drafter.target.packed import unpack
from ctc_drafter.target.regional import Regions, Slots, unlike_others
from ctc_drafter.target.self_test import self_test
from ctc_drafter.types import UserError, Verification, first_line

# A target's forward as a compiled graph: a pure function of tokens, masks and cache tensors.
#
# `torch.export` writes the model down once for a number of rows and tokens, whatever Python its authors wrote, with
# hooks and cache objects resolved; `torch.compile` turns that into code. On a CPU the number of cache slots stays
# open, so one graph serves every length, and weights are packed for their products ("freezing"), which keeps a second
# copy of them.

LOG = logging.getLogger(__name__)
BACKEND = "inductor"
MANY = 0

Backend = str | Callable[..., Any]  # as `torch.compile` takes it

# See `Forward`
Graph = Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor | None]]


def sizes_are_fixed(device: torch.device) -> bool:
    """CUDA graphs want them so: a graph is good for one number of rows and of slots."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Shape:
    """Shape of the inputs of one graph.

    rows: 1, or `MANY` for any other number where sizes may stay open. tokens: of each row. layers: blocks whose
    features are wanted. kinds: layer types that have a mask of their own, none where all share one. slots: of the
    cache, 0 where sizes may stay open.
    """

    rows: int
    tokens: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    slots: int = 0

    def open_sizes(self, inputs: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        """Of each input the dimensions that may change from call to call: slots, and rows if there are many."""
        if sizes_are_fixed(inputs[0].device):
            return [()] * len(inputs)
        rows = (0,) if self.rows == MANY else ()
        masks = max(1, len(self.kinds))
        states = len(inputs) - 3 - masks
        return [rows, rows, (), *[(*rows, 3)] * masks, *[(*rows, 2)] * states]


class Forward(nn.Module):
    """The model over one list of tensors: tokens and positions `int64 [B, T]`; start `int64 [1]`, the slot of the first
    token; masks `[B, 1, T, S]`, one for each kind of layer or one for all; keys and values `[B, heads, S, dim]` of each
    layer, written in place.

    Returns logits `[B, T, V]` and features `[B, T, K]`, None if none are wanted.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape):
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, positions, start, *rest = inputs
        kinds, layers = self.shape.kinds, self.shape.layers
        masks = max(1, len(kinds))
        mask = dict(zip(kinds, rest, strict=False)) if kinds else rest[0]
        where = start + torch.arange(tokens.shape[1], device=tokens.device)
        states = rest[masks:]
        cache = Cache(layers=[Slots(*pair, where) for pair in zip(states[::2], states[1::2], strict=True)])
        with captured(self.model, layers) as outputs, grouped_heads(tokens.device):
            result = self.model(
                input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, attention_mask=mask
            )
        return result.logits, concatenate(outputs, layers)


def make_graph(model: PreTrainedModel, shape: Shape, inputs: list[torch.Tensor], backend: Backend = BACKEND) -> Graph:
    """A compiled `Forward` of this shape; inputs are examples, which stay as they are.

    Compiling takes seconds to minutes and happens here. Raises `UserError` for a model or machine that cannot do it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compiled(written_down(model, shape, inputs), shape.open_sizes(inputs), inputs, backend)
    except Exception as error:  # whatever a model, an exporter or a compiler raises
        raise refusal(model, error) from error


def written_down(model: PreTrainedModel, shape: Shape, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """Exports the forward as plain tensor operations (torch.export)."""
    sizes = [dict.fromkeys(open_, Dim.DYNAMIC) for open_ in shape.open_sizes(inputs)]
    # Tensors of inference mode cannot be written to outside it, where tracing takes place.
    with torch.inference_mode(False), torch.no_grad():
        like = [torch.zeros_like(each) for each in inputs]
        program = torch.export.export(Forward(model, shape), (like,), dynamic_shapes=(sizes,), strict=False)
    return program.module().forward


def compiled(
    forward: Callable[..., Any], open_sizes: list[tuple[int, ...]], inputs: list[torch.Tensor], backend: Backend
) -> Graph:
    """`forward` as code, tried once."""
    import torch._inductor.config as inductor

    on_cpu = inputs[0].device.type == "cpu"
    options: dict[str, Any] = {"mode": "reduce-overhead"} if backend == BACKEND and not on_cpu else {}
    graph: Graph = torch.compile(forward, fullgraph=True, dynamic=None if on_cpu else False, backend=backend, **options)
    trial = [torch.zeros_like(each) for each in inputs]
    for tensor, dimensions in zip(trial, open_sizes, strict=True):
        for dimension in dimensions:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    # The options of `torch.compile` do not reach the part that reads this one.
    with inductor.patch(freezing=on_cpu):
        graph(trial)
    return graph


# A target whose short forwards are compiled: plain steps and trees alike. Prompts are not compiled.

SIZES = (1, 5, 9, 17, 33, 65)  # tokens of a graph: the root and 4, 8... nodes; smaller trees are filled up


@dataclass(frozen=True)
class CompiledTarget(Target):
    """A `Target` with static caches and a graph for each kind of short forward, made when it is first needed.

    layers: blocks whose features every graph hands out, so that plain steps and trees share one. Build it with
    `compile_target`. The graphs live here, not on the model. While one is made, the exporter puts stand-ins in the
    place of the model's weights: where several threads run it, let `prepare` make them first.
    """

    compiled: ClassVar[bool] = True
    most: ClassVar[int] = SIZES[-1]  # tokens of a forward that is compiled
    # A graph's time is that of its largest tree: the first and the last tree of each tell of all.
    profile_sizes: ClassVar[tuple[int, ...]] = tuple(
        sorted({1, *SIZES, *(size - 1 for size in SIZES)} - {0, SIZES[-1]})
    )

    cache: str = "static"
    layers: tuple[int, ...] = ()
    backend: Backend = BACKEND
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
        shift: torch.Tensor | None = None,
    ) -> Verification:
        """See `Target.forward`. Prompts, trees of more than 64 nodes, and what follows pictures are not compiled.

        Raises `UserError` when a graph cannot be made.
        """
        rows, count = tokens.shape
        prompt = keep is not None or (allowed is None and count > 1)
        if prompt or count > self.most or shift is not None:
            return super().forward(tokens, positions, cache, allowed, key_positions, layers, keep, long, shift)
        start = cache.get_seq_length()
        if allowed is None or key_positions is None:
            key_positions = torch.arange(start + 1, device=tokens.device).expand(rows, -1)
            allowed = torch.ones_like(key_positions, dtype=torch.bool).unsqueeze(1)

        size = self._size(count)
        slots, more = reserve(cache, size), size - count
        allowed = pad(allowed, (0, slots - allowed.shape[2], 0, more))
        key_positions = pad(key_positions, (0, slots - key_positions.shape[1]))
        # Filled up with the first token again, not with one that the target may be unable to compute.
        tokens, positions = (torch.cat([x, x[:, :1].expand(-1, more)], 1) for x in (tokens, positions))
        masks = self._masks(allowed, positions, key_positions)
        logits, features = self._run(tokens, positions, start, masks, cache, tuple(layers))
        for layer in cache.layers:
            layer.cumulative_length.fill_(start + count)
        return Verification(logits[:, :count], features[:, :count] if layers and features is not None else None)

    def _size(self, count: int) -> int:
        """Tokens that a forward of so many is filled up to."""
        return size_for(count)

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        masks: Any,
        cache: Cache,
        layers: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `[B, T, V]`, and features `[B, T, K]` if wanted; keys and values go to slots from `start` on."""
        rows, size = tokens.shape
        kinds, masks = (tuple(masks), list(masks.values())) if isinstance(masks, dict) else ((), [masks])
        first = torch.tensor([start], device=tokens.device)
        states = states_of(cache)
        inputs = [tokens, positions, first, *masks, *states]
        fixed = states[0].shape[2] if sizes_are_fixed(self.device) else 0
        shape = Shape(self._rows(rows), size, layers or self.layers, kinds, fixed)
        if shape not in self.graphs:
            with self.making:
                if shape not in self.graphs:
                    self.graphs[shape] = make_graph(self.model, shape, inputs, self.backend)
        return self.graphs[shape](inputs)

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


@dataclass(frozen=True)
class RegionalTarget(CompiledTarget):
    """A `CompiledTarget` on a CPU whose decoder layers share their code, which serves any number of tokens.

    Build it with `compile_target`.
    """

    most: ClassVar[int] = UNLIMITED_CONTEXT
    profile_sizes: ClassVar[tuple[int, ...]] = Target.profile_sizes

    traced: set[tuple[bool, bool]] = field(default_factory=set, compare=False, repr=False)

    @cached_property
    def regions(self) -> Regions:
        return Regions(self.model, self.backend)

    def _size(self, count: int) -> int:
        return count

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        masks: Any,
        cache: Cache,
        layers: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        states = states_of(cache)
        rows, count = tokens.shape
        kind = (rows > 1, count > 1)
        if kind not in self.traced:
            with self.making:
                if kind not in self.traced:
                    self._trace(kind, masks, states)
                    self.traced.add(kind)
        where = torch.arange(start, start + count)
        with captured(self.regions.model, layers) as outputs:
            logits = self.regions.run(tokens, positions, masks, states, where)
        return logits, concatenate(outputs, layers)

    def _trace(self, kind: tuple[bool, bool], masks: Any, states: Sequence[torch.Tensor]) -> None:
        """Makes the graphs for one row or for several, of one token or of several.

        They are made for sizes that nothing else in the model has, which marks them as those that stay open. Raises
        `UserError` for a model or machine that cannot do it.
        """
        rows, count, slots = sizes = unlike_others(self.model, states)
        rows, count = rows if kind[0] else 1, count if kind[1] else 1
        zeros = torch.zeros(rows, count, dtype=torch.long)
        like = tree_map(lambda mask: mask.new_zeros(rows, 1, count, slots), masks)
        room = [state.new_zeros(rows, state.shape[1], slots, state.shape[3]) for state in states]
        try:
            self.regions.run(zeros, zeros, like, room, torch.arange(count), frozenset(sizes))
        except Exception as error:  # whatever a model or a compiler raises
            raise refusal(self.model, error) from error


def size_for(tokens: int) -> int:
    """Size of the smallest graph that fits so many tokens, of the largest if none does."""
    return next((size for size in SIZES if size >= tokens), SIZES[-1])


def states_of(cache: Cache) -> list[torch.Tensor]:
    """Keys and values of each layer, one after the other. Raises `UserError` for layers that keep none."""
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        if not isinstance(layer, GrowableStaticLayer) or layer.keys is None or layer.values is None:
            raise UserError("layers that share another one's keys cannot be compiled; leave out --compile")
        found += [layer.keys, layer.values]
    return found


def refusal(model: PreTrainedModel, error: Exception) -> UserError:
    return UserError(f"{type(model).__name__} cannot be compiled ({first_line(reason(error))}); leave out --compile")


def reason(error: BaseException) -> BaseException:
    """What a compiler's error is about."""
    found: BaseException = getattr(error, "inner_exception", error)
    return found


def compile_target(target: Target, layers: Sequence[int] = (), backend: Backend = BACKEND) -> CompiledTarget:
    """Compiles a target's short forwards; the first graphs now, tried on a small tree. `layers` as in `CompiledTarget`.

    On a CPU its decoder layers are compiled, each kind of them once; if that is not possible, the whole of it.
    Raises `UserError` when the model cannot be compiled, or when this machine has no compiler.
    """
    if target.chain is not None:
        raise UserError(f"{type(target.model).__name__} follows chains alone, by its own cache; leave out --compile")
    if target.switch is not None:
        raise UserError(f"{type(target.model).__name__} changes its longrope factors on the way; leave out --compile")
    if target.device.type == "cpu":
        made = RegionalTarget(target.model, layers=tuple(layers), backend=backend)
        try:
            self_test(made)
            return made
        except Exception as error:  # whatever a model raises whose parts are copied
            if isinstance(reason(error.__cause__ or error), InvalidCxxCompiler):
                raise
            LOG.info("compiling the target whole, not layer by layer: %s", first_line(error))
    return compile_whole(target, layers, backend)


def compile_whole(target: Target, layers: Sequence[int] = (), backend: Backend = BACKEND) -> CompiledTarget:
    """`compile_target` without regard to layers: a graph of all that a forward does, for each of its `SIZES`."""
    unpack(target.model)  # graphs have packed weights of their own
    made = CompiledTarget(target.model, layers=tuple(layers), backend=backend)
    self_test(made)
    return made
