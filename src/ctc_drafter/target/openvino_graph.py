"""A target's forward as an OpenVINO model: tracing, conversion, int8 weights, kept in the cache folder."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ctc_drafter.files import cache_folder, made_once
from ctc_drafter.provenance import config_hash, digest, weights_hash
from ctc_drafter.target.features import captured
from ctc_drafter.target.layout import grouped_heads
from ctc_drafter.target.openvino_attention import attention_in_parts, convert_attention
from ctc_drafter.types import UserError, first_line

# `torch.export` writes the model down as plain tensor operations, whatever Python its authors wrote; OpenVINO reads
# them. The cache is an input and is not written: attention reads the cached and the new keys as two parts, so that a
# step copies neither, and the new ones come out beside the logits.

LOG = logging.getLogger(__name__)
FOLDER = "openvino"  # of the cache folder
LAYOUT = 1  # counts up when models kept of old must not be used any more
WEIGHTS = ("f32", "int8")
NAME = "model.xml"


@dataclass(frozen=True)
class GraphSpec:
    """What a graph is asked for.

    layers: blocks whose outputs it hands out; kinds: layer types that have a mask of their own, none where all share
    one; states: heads and size of each cached layer's keys and of its values; grids: the step of each layer's values
    for exact attention, none where attention is as ever.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    states: tuple[tuple[int, int, int, int], ...]
    grids: tuple[float, ...] = ()

    @property
    def masks(self) -> int:
        return max(1, len(self.kinds))


class Past(CacheLayerMixin):
    """A cache layer of given keys and values `[B, heads, S, dim]`, which stay as they are; `new` gets the new ones.

    grid: the step that new values are rounded to, 0 for none.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, grid: float = 0.0):
        super().__init__()
        self.keys, self.values, self.grid = keys, values, grid
        self.is_initialized = True
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.joined: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing to do: the tensors exist."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        if self.grid:
            value_states = (value_states / self.grid).round() * self.grid
        self.new = key_states, value_states
        self.joined = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        return self.joined

    # A model that counts on these instead of its positions and mask is found out by the trial.
    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.get_seq_length()

    get_max_cache_shape = get_max_length


class InParts(TorchFunctionMode):
    """While open, attention to the joined keys of one of these layers reads their parts instead."""

    def __init__(self, layers: Sequence[Past]):
        super().__init__()
        self.layers = layers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is fn.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if is_causal or dropout_p:
            raise UserError("its attention makes a mask or a dropout of its own")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        for layer in self.layers:
            if layer.joined is not None and layer.joined[0] is key and layer.joined[1] is value:
                assert layer.keys is not None
                assert layer.values is not None
                assert layer.new is not None
                if attn_mask is None:
                    raise UserError("its attention takes no mask")
                parts = (layer.keys, layer.new[0], layer.values, layer.new[1])
                sizes = [query.shape[1], key.shape[1], query.shape[3], value.shape[3]]
                return attention_in_parts(query, *parts, attn_mask, scale, sizes, bool(layer.grid))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        scores = (query * scale) @ key.transpose(2, 3)
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        return weights @ value


class Forward(nn.Module):
    """The model over tensors: tokens and positions `int64 [B, T]`; columns `int64 [R]` whose logits are wanted; masks
    `[B, 1, T, S + T]`, one for each kind of layer or one for all; cached keys and values `[B, heads, S, dim]` of each
    layer.

    Returns logits `[B, R, V]`, the output `[B, T, H]` of each block that is asked for, and the new keys and values
    `[B, heads, T, dim]` of each layer.
    """

    def __init__(self, model: PreTrainedModel, spec: GraphSpec, slices: bool):
        super().__init__()
        self.model, self.spec, self.slices = model, spec, slices

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens, positions, columns, *rest = inputs
        kinds, masks = self.spec.kinds, self.spec.masks
        mask = dict(zip(kinds, rest, strict=False)) if kinds else rest[0]
        states = rest[masks:]
        grids = self.spec.grids or (0.0,) * len(self.spec.states)
        layers = [Past(*each) for each in zip(states[::2], states[1::2], grids, strict=True)]
        options: dict[str, Any] = {"logits_to_keep": columns} if self.slices else {}
        with captured(self.model, self.spec.layers) as outputs, grouped_heads(tokens.device), InParts(layers):
            result = self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=Cache(layers=list(layers)),
                use_cache=True,
                attention_mask=mask,
                **options,
            )
        logits = result.logits if self.slices else result.logits[:, columns]
        new = [states for layer in layers for states in layer.new or ()]
        if len(new) != len(rest) - masks:
            raise UserError("layers that share another one's keys cannot be converted")
        return (logits, *(outputs[layer] for layer in self.spec.layers), *new)


def example(spec: GraphSpec, rows: int = 2, tokens: int = 5, slots: int = 7) -> list[torch.Tensor]:
    """Inputs of these sizes."""
    numbers = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.zeros(rows, 1, tokens, slots + tokens)
    cached = [
        torch.zeros(rows, heads, slots, size)
        for keys, key_size, values, value_size in spec.states
        for heads, size in ((keys, key_size), (values, value_size))
    ]
    return [numbers, numbers.clone(), torch.arange(2), *[mask.clone() for _ in range(spec.masks)], *cached]


def converted(model: PreTrainedModel, spec: GraphSpec, slices: bool) -> Any:
    """The forward as an `openvino.Model` with float32 weights, all numbers of rows, tokens and slots left open."""
    import openvino
    from openvino.frontend.pytorch import ConversionExtension

    states = 2 * len(spec.states)
    open_sizes = [{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}] * 2 + [{0: Dim.DYNAMIC}]
    open_sizes += [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}] * spec.masks
    open_sizes += [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * states
    extension = ConversionExtension("ctc_drafter.attention_in_parts.default", convert_attention)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        forward = Forward(model, spec, slices)
        program = torch.export.export(forward, tuple(example(spec)), dynamic_shapes=(tuple(open_sizes),), strict=False)
        return openvino.convert_model(program, extension=[extension])


# Weights in 8 bits. Activations stay float32 in the graph: OpenVINO rounds each row by itself, 32 numbers at a time,
# for products of whole numbers.


def compress(graph: Any) -> int:
    """Gives the constant matrices of a graph's products 8 bits, in place; returns how many products there are."""
    replaced: dict[str, Any] = {}
    count = 0
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant" or len(constant.data.shape) != 2:
            continue
        transposed = bool(node.get_attributes()["transpose_b"])
        name = f"{constant.get_friendly_name()} {transposed}"
        if name not in replaced:
            matrix = torch.from_numpy(constant.data.copy())
            replaced[name] = rounded(matrix if transposed else matrix.t().contiguous())
        node.input(1).replace_source_output(replaced[name].output(0))
        if not transposed:
            node.set_attribute("transpose_b", True)
        count += 1
    graph.validate_nodes_and_infer_types()
    return count


def rounded(matrix: torch.Tensor) -> Any:
    """A node whose value is the matrix `[N, K]`, each row rounded to 8 bits, symmetric around 0."""
    from openvino import opset13 as op

    scale = (matrix.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = (matrix / scale).round().to(torch.int8)
    return op.multiply(op.convert(op.constant(numbers.numpy()), "f32"), op.constant(scale.numpy()))


# Kept between runs.


def graph_of(model: PreTrainedModel, spec: GraphSpec, weights: str, slices: bool) -> Any:
    """The `openvino.Model` of a target: read from the cache folder, or made now and kept there.

    Takes half a minute for 30 layers when it is made; one process does so, and others wait for it. Raises `UserError`
    for a model that cannot be converted.
    """
    place = cache_folder() / FOLDER / key(model, spec, weights)
    with ExitStack() as turn:
        with suppress(OSError):  # a folder that cannot be written, as `keep` will say
            turn.enter_context(made_once(place, f"converting {type(model).__name__} for OpenVINO"))
        kept = read_kept(place)
        return make(model, spec, weights, slices, place) if kept is None else kept


def read_kept(place: Path) -> Any | None:
    """The graph in this folder; None where there is none that can be read."""
    import openvino

    if not (place / NAME).is_file():
        return None
    try:
        return openvino.Core().read_model(place / NAME)
    except RuntimeError as error:
        LOG.info("the converted target in %s cannot be read (%s); converting it again", place, first_line(error))
        return None


def make(model: PreTrainedModel, spec: GraphSpec, weights: str, slices: bool, place: Path) -> Any:
    """Converts a target, and keeps the graph in this folder."""
    try:
        graph = converted(model, spec, slices)
        if weights == "int8":
            compress(graph)
    except Exception as error:  # whatever a model, the exporter or the converter raises
        raise UserError(
            f"{type(model).__name__} cannot be converted ({reason(error)}); leave out --openvino"
        ) from error
    keep(graph, place)
    return graph


def reason(error: Exception) -> str:
    """Why a model was not converted, in a line: the operations without a rule, where the converter names them."""
    named = [line for line in str(error).splitlines() if "No conversion rule" in line]
    return named[0].lstrip("- ").lower() if named else first_line(error)


def key(model: PreTrainedModel, spec: GraphSpec, weights: str) -> str:
    """Name of the folder of a converted target: a hash of all that it depends on."""
    facts: Iterable[object] = (
        *(LAYOUT, config_hash(model.config), weights_hash(model), weights, json.dumps(asdict(spec))),
        *(version(name) for name in ("torch", "transformers", "openvino")),
    )
    return digest(" ".join(map(str, facts)))


def keep(graph: Any, place: Path) -> None:
    """Saves a graph, whole or not at all; a folder that cannot be written costs the next run its time, and no more."""
    import openvino

    temporary = place.with_name(f".{place.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        temporary.mkdir(parents=True)
        openvino.save_model(graph, temporary / NAME, compress_to_fp16=False)
        temporary.replace(place)
    except (OSError, RuntimeError) as error:
        LOG.info("the converted target could not be kept in %s: %s", place.parent, first_line(error))
        shutil.rmtree(temporary, ignore_errors=True)
