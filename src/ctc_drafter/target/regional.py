"""Decoder layers as code (regional compilation, torch.compile): a graph for all that are alike, kept on disk."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.integrations.sdpa_attention as sdpa
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ctc_drafter.files import cache_folder
from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.target.layout import grouped_heads

# The model runs as its authors wrote it, but for its decoder layers. Dynamo traces a layer's forward as a function of
# the layer, its slice of the cache and its arguments. Weights are inputs of the graph then, products are operators of
# their own (`opaque.py`), and a layer's number is an input as well: Dynamo's guards let one graph serve all layers that
# are alike, and inductor's cache on disk serves the next process. Numbers of tokens, slots and rows stay open.
#
# Guards take longer than what fused kernels save. So they are asked once for each layer and shape of inputs; from then
# on the graph that they chose is called as it is, with tensors found where they were found then.

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable of inductor
NUMBERS = r"L\['block'\].*\.(layer_idx|layer_id|layer_index|layer_number)$"  # sources of a layer's own number
VARIANTS = 32  # graphs of one model: few kinds of layers, each for one and more rows, one and more tokens


class Slots(CacheLayerMixin):
    """A cache layer over tensors that are there, `[B, heads, S, dim]`; new tokens go to `where int64 [T]`."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, where: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.where = keys, values, where
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing to do: the tensors exist."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.keys.index_copy_(2, self.where, key_states),
            self.values.index_copy_(2, self.where, value_states),
        )

    # A model that counts on these instead of its positions and mask is found out by the self-test.
    def get_seq_length(self) -> int:
        return self.keys.shape[2]  # not `int`: the number stays open

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return self.get_seq_length()

    get_max_cache_shape = get_max_length


class OneLayer(Cache):
    """The cache as one layer sees it: its own slots, by whatever number it asks for them."""

    def __init__(self, slots: Slots):
        super().__init__(layers=[slots])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[0].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[0].get_seq_length()


class Step(Cache):
    """The cache of one forward, `Slots` in every layer, and what its layers have to know besides.

    shape: rows, tokens and slots. open_sizes: sizes that stand for numbers which are to stay open in a new graph.
    """

    def __init__(self, layers: Sequence[Slots], shape: tuple[int, ...], open_sizes: frozenset[int] = frozenset()):
        super().__init__(layers=list(layers))
        self.shape, self.open_sizes = shape, open_sizes


class NotRegionalError(Exception):
    """Why the layers of a model cannot be compiled one by one."""


@dataclass(frozen=True)
class Bound:
    """A graph with the inputs of one layer, for one shape.

    inputs: of the graph, weights and sizes. moves: which of them come with each call, and where from. outputs: which
    ones make up the layer's result, or the result's other parts; single: whether that is one tensor.
    """

    graph: Callable[..., Any]
    inputs: tuple[Any, ...]
    moves: tuple[tuple[int, tuple[Any, ...]], ...]
    outputs: tuple[int | None, ...]
    single: bool

    def __call__(self, given: dict[str, Any]) -> Any:
        inputs = list(self.inputs)
        for place, path in self.moves:
            inputs[place] = functools.reduce(operator.getitem, path, given)
        found = self.graph(*inputs)
        result = tuple(None if which is None else found[which] for which in self.outputs)
        return result[0] if self.single else result


class Regions:
    """A copy of a model, over the same weights, whose decoder layers run as code. The model itself stays as it is.

    backend: as of `torch.compile`. Raises `NotRegionalError` for a model whose layers do not count themselves as its
    cache does, or have a forward of their own.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any]):
        from torch._dynamo import lookup_backend  # not before it is needed: takes a second

        from ctc_drafter.target.opaque import opaque_twin

        self.model: Any = opaque_twin(model)
        self.device = model.device
        self.backend = lookup_backend(backend)
        self.making = threading.Lock()
        self.bound: dict[tuple[int, ...], list[Bound]] = {}
        self.parts: list[Bound] = []  # of the forward that is being made
        self.called: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = []  # graphs, in and out
        # Code of its own for each model: Dynamo keeps graphs by code, and counts them.
        own = types.FunctionType(layer_forward.__code__.replace(), globals(), layer_forward.__name__)
        with code_on_disk():  # PyTorch looks there already
            self.code = torch.compile(own, fullgraph=True, backend=self._graph)
        for number, block in enumerate(decoder_blocks(self.model)):
            self._replace(number, block)

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        masks: Any,
        states: Sequence[torch.Tensor],
        where: torch.Tensor,
        open_sizes: frozenset[int] = frozenset(),
    ) -> torch.Tensor:
        """Logits `[B, T, V]` of tokens and positions `int64 [B, T]` under masks `[B, 1, T, S]`, one, or one for each
        kind of layer. Keys and values `[B, heads, S, dim]` of each layer are written in place, at slots
        `where int64 [T]`.

        open_sizes: sizes of these that are to stay open in graphs that are made.
        """
        layers = [Slots(*pair, where) for pair in zip(states[::2], states[1::2], strict=True)]
        step = Step(layers, (*tokens.shape, states[0].shape[2]), open_sizes)
        inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": masks}
        if step.shape in self.bound:
            return self._logits(step, inputs)
        with self.making:
            if step.shape in self.bound:  # by another thread
                return self._logits(step, inputs)
            self.parts = []
            with making_graphs(self.device, single=tokens.shape[1] == 1):
                logits = self._logits(step, inputs)
            self.bound[step.shape] = self.parts
        return logits

    def _logits(self, step: Step, inputs: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs, past_key_values=step, use_cache=True).logits
        return logits

    def _replace(self, number: int, block: nn.Module) -> None:
        for module in block.modules():
            if getattr(module, "layer_idx", number) != number:
                raise NotRegionalError(f"layer {number} counts itself as {module.layer_idx}")
        if "forward" in vars(block):
            raise NotRegionalError(f"layer {number} has a forward that its class has not")

        def forward(*args: Any, **kwargs: Any) -> Any:
            place, step = cache_among(args, kwargs)
            slots = step.layers[number]
            given = {"keys": slots.keys, "values": slots.values, "where": slots.where, "args": args, "kwargs": kwargs}
            if step.shape in self.bound:
                return self.bound[step.shape][number](given)
            return self._made(number, block, place, given, step.open_sizes)

        block.forward = forward

    def _made(
        self, number: int, block: nn.Module, place: int | str, given: dict[str, Any], sizes: frozenset[int]
    ) -> Any:
        """A layer's result by way of Dynamo, which makes a graph if none fits; remembered for the next time."""
        args, kwargs = given["args"], given["kwargs"]
        # The step itself is not handed on: Dynamo would guard all that hangs on it.
        if isinstance(place, int):
            given = {**given, "args": (*args[:place], None, *args[place + 1 :])}
        else:
            given = {**given, "kwargs": {**kwargs, place: None}}
        for _, tensor in tensors_of(given):
            for dimension, size in enumerate(tensor.shape):
                if size in sizes:
                    torch._dynamo.mark_dynamic(tensor, dimension)
        self.called = []
        result = self.code(block, place, **given)
        if len(self.called) != 1 or len(self.parts) != number:
            raise NotRegionalError(f"layer {number} is computed by {len(self.called)} graphs")
        self.parts.append(bind(*self.called[0], block, given, result))
        return result

    def _graph(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend, whose graphs say what they are called with."""
        made = self.backend(graph, list(inputs))

        def telling(*args: Any) -> Any:
            found = made(*args)
            self.called.append((made, args, tuple(found)))
            return found

        return telling


def layer_forward(
    block: nn.Module,
    place: int | str,
    keys: torch.Tensor,
    values: torch.Tensor,
    where: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Forward of a decoder layer over its keys and values `[B, heads, S, dim]`; new ones go to slots `where int64 [T]`.
    place: where in its arguments it takes the cache."""
    cache = OneLayer(Slots(keys, values, where))
    if isinstance(place, int):
        args = (*args[:place], cache, *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: cache}
    return type(block).forward(block, *args, **kwargs)


def cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Step]:
    """Where a layer's arguments have the cache, and the cache. Raises `NotRegionalError` if that is nowhere."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Step):
            return place, value
    raise NotRegionalError("layers are not given the cache")


def tensors_of(given: Any) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in nested tuples, lists and dictionaries, each after the keys that lead to it."""
    for path, leaf in pytree.tree_leaves_with_path(given):
        if isinstance(leaf, torch.Tensor):
            keys: Sequence[Any] = path
            yield tuple(key.idx if isinstance(key, pytree.SequenceKey) else key.key for key in keys), leaf


def bind(
    graph: Callable[..., Any],
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    block: nn.Module,
    given: dict[str, Any],
    result: Any,
) -> Bound:
    """The graph that was called with these inputs for this layer, and made this result, for calls to come.

    Raises `NotRegionalError` where an input is a tensor that is neither given nor the layer's own, or where the result
    has parts that are no outputs of the graph.
    """
    paths: dict[int, tuple[Any, ...]] = {}
    for path, tensor in tensors_of(given):
        paths.setdefault(id(tensor), path)
    own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
    moves = tuple((place, paths[id(each)]) for place, each in enumerate(inputs) if id(each) in paths)
    moving = {place for place, _ in moves}
    for place, each in enumerate(inputs):
        if isinstance(each, torch.Tensor) and place not in moving and id(each) not in own:
            raise NotRegionalError("layers read tensors that are not among their arguments")
    which = {id(each): place for place, each in enumerate(outputs)}
    parts = result if isinstance(result, tuple) else (result,)
    if any(part is not None and id(part) not in which for part in parts):
        raise NotRegionalError(f"layers return more than tensors ({type(result).__name__})")
    fixed = tuple(None if place in moving else each for place, each in enumerate(inputs))
    places = tuple(None if part is None else which[id(part)] for part in parts)
    return Bound(graph, fixed, moves, places, not isinstance(result, tuple))


def unlike_others(model: PreTrainedModel, states: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """Odd numbers of rows, tokens and slots that are no size of the model's weights or states, and that its
    configuration does not name."""
    taken = {size for tensor in (*model.parameters(), *model.buffers(), *states) for size in tensor.shape[-3:]}
    taken |= {value for value in model.config.get_text_config(decoder=True).to_dict().values() if type(value) is int}
    found: list[int] = []
    for least in (5, 11, 67):
        found.append(next(size for size in itertools.count(least, 2) if size not in {*taken, *found}))
    return found[0], found[1], found[2]


@contextmanager
def making_graphs(device: torch.device, single: bool) -> Iterator[None]:
    """Settings under which graphs are made and guards hold; single: whether each row has one token alone."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor
    import torch.compiler.config

    compiler: Any = torch.compiler.config

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(dynamo.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True))
        # What is not said to be open is fixed, whatever it was in another model.
        stack.enter_context(dynamo.patch(automatic_dynamic_shapes=False, specialize_float=True))
        stack.enter_context(compiler.patch(dynamic_sources=NUMBERS))
        # Fused operations would round less often than the model's own do in bfloat16.
        stack.enter_context(inductor.patch(emulate_precision_casts=True))
        stack.enter_context(inductor.patch(size_asserts=False, alignment_asserts=False))  # at each step
        stack.enter_context(code_on_disk())
        stack.enter_context(grouped_heads(device, single))
        stack.enter_context(heads_as_rows())
        yield


@contextmanager
def code_on_disk() -> Iterator[None]:
    """Keeps inductor's code in the project's cache folder, which outlives a restart, unless its user has named one.

    PyTorch sets the variable itself when it is imported, to a temporary folder.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(CACHE)
    named = before not in (None, str(Path(default_cache_dir()).absolute()))
    os.environ[CACHE] = before if before and named else str(cache_folder() / "compiled")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CACHE, None)
        else:
            os.environ[CACHE] = before


def not_compiling() -> bool:
    return False


@contextmanager
def heads_as_rows() -> Iterator[None]:
    """Lets attention of single tokens make rows of the heads that share a key, as it does uncompiled; transformers
    repeats keys instead where it finds itself traced."""
    name = "is_torchdynamo_compiling"
    before = getattr(sdpa, name, None)
    if before is None:
        yield
        return
    setattr(sdpa, name, not_compiling)
    try:
        yield
    finally:
        setattr(sdpa, name, before)
