"""OpenVINO target (`--openvino`): a target's forward in Intel's runtime on the CPU, with float32 or int8 weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad
from transformers import Cache

from ctc_drafter.target.cache import GROWTH, GrowingLayer
from ctc_drafter.target.features import concatenate
from ctc_drafter.target.model import Target
from ctc_drafter.target.openvino_attention import grid_for
from ctc_drafter.target.openvino_graph import WEIGHTS, GraphSpec, graph_of
from ctc_drafter.target.self_test import (
    PARENTS,
    PATHS,
    by_node,
    difference,
    plain_logits,
    prompt_length,
    self_test,
    tree_logits,
    trial_tokens,
)
from ctc_drafter.types import EXTRAS, UserError, Verification, first_line

# The target is another one then, in weights and rounding, and what holds is what always holds: drafts do not change
# what its own plain decoding writes. Its plain steps, trees and prompts go through one graph. With weights in integers
# each row of a product is rounded to 8 bits by itself, its sums are exact, and so are those of attention
# (`openvino_attention.py`): a token's logits are the same to the last bit, whatever it is computed with.

# Tokens of a row's forward; smaller ones are filled up. One token alone is rounded otherwise than several, and costs as
# much as two.
SIZES = (2, 5, 9, 17, 33, 65)
FEW_SIZES = (2, 17)  # for large targets: weights are packed for each size
MANY = 0  # of tokens or rows: any number
# Root mean square of what is allowed between a tree and plain steps, and to the model in float32: shares of the logits'
# spread.
ROUNDING = {"f32": 1e-3, "int8": 0.0}
TOLERANCE = {"f32": 1e-3, "int8": 0.7}  # unrelated logits: 1.4
CALIBRATION = 64  # tokens of the text that says how large values are
MOST_BYTES = 2**30  # of the weights of a target that is not large


@dataclass
class Request:
    """A compiled graph with the tensors that it reads and writes, which must not be let go before it is.

    Most of a step's inputs, the cache, are where they were in the step before; they are not handed over again.
    """

    inner: Any
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def read(self, index: int, tensor: torch.Tensor) -> None:
        import openvino

        before = self.inputs.get(index)
        if before is None or before.data_ptr() != tensor.data_ptr() or before.shape != tensor.shape:
            self.inner.set_input_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))
        self.inputs[index] = tensor

    def write(self, index: int, tensor: torch.Tensor) -> None:
        import openvino

        self.inner.set_output_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))
        self.outputs[index] = tensor


@dataclass
class Runtime:
    """Compiled graphs by their shape, `(rows, tokens)`; made when they are first needed, and used by one thread at a
    time."""

    graph: Any
    spec: GraphSpec
    threads: int = field(default_factory=torch.get_num_threads)
    requests: dict[tuple[int, int], Request] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def run(self, inputs: list[torch.Tensor], logits: torch.Tensor, shape: tuple[int, int]) -> list[torch.Tensor]:
        """Computes `Forward` of these inputs into `logits`; returns the other outputs, good until the next run."""
        if shape not in self.requests:
            self.requests[shape] = self.compiled(*shape)
        request, count = self.requests[shape], len(self.spec.layers) + 2 * len(self.spec.states)
        for index, tensor in enumerate(inputs):
            request.read(index, tensor)
        request.write(0, logits)
        request.inner.infer()
        if len(request.outputs) > 1:
            return [request.outputs[1 + index] for index in range(count)]
        found = [torch.from_numpy(request.inner.get_output_tensor(1 + index).data) for index in range(count)]
        if MANY not in shape:  # from now on they have a place
            for index, each in enumerate(found):
                request.write(1 + index, each.clone())
        return found

    def compiled(self, rows: int, tokens: int) -> Request:
        """A graph of fixed sizes, for which the runtime plans but once; `MANY` leaves a size open."""
        import openvino

        graph, batch, length = self.graph, rows or -1, tokens or -1
        if rows or tokens:
            graph = graph.clone()
            shapes = [[batch, length], [batch, length], [tokens or -1], *[[batch, 1, length, -1]] * self.spec.masks]
            for keys, key_size, values, value_size in self.spec.states:
                shapes += [[batch, keys, -1, key_size], [batch, values, -1, value_size]]
            graph.reshape(dict(zip(graph.inputs, shapes, strict=True)))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
        }
        return Request(openvino.Core().compile_model(graph, "CPU", settings).create_infer_request())


@dataclass(frozen=True)
class OpenVINOTarget(Target):
    """A `Target` whose forwards OpenVINO computes. Build it with `openvino_target`.

    weights: `f32` or `int8`. Texts behind pictures, whose positions are no slots, are refused.
    """

    own_threads: ClassVar[bool] = True
    profile_sizes: ClassVar[tuple[int, ...]] = tuple(
        sorted({1, *SIZES, *(size - 1 for size in SIZES)} - {0, SIZES[-1]})
    )

    weights: str = "f32"
    sizes: tuple[int, ...] = SIZES
    runtime: Runtime = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    @property
    def engine(self) -> str:
        return f"OpenVINO {self.weights}"

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
        """See `Target.forward`."""
        if shift is not None:
            raise UserError("pictures are not read in OpenVINO; leave out --openvino")
        rows, count = tokens.shape
        start = cache.get_seq_length()
        places = cache.layers[0].places if cache.layers else None
        slots = places.slots if places else start + torch.arange(count).expand(rows, -1)
        if allowed is None or key_positions is None:
            key_positions = torch.arange(start + count).expand(rows, -1)
            allowed = key_positions.unsqueeze(1) <= slots.unsqueeze(2)
        with self.runtime.lock:
            past = list(self._past(cache, rows))
            masks = self._masks(allowed, positions, key_positions)
            masks = list(masks.values()) if isinstance(masks, dict) else [masks]
            room, size = past[0].shape[2], self._size(rows, count, keep)
            masks = [in_parts(mask, None if places is None else slots, start, room, size - count) for mask in masks]
            filled = [filled_up(tokens, size), filled_up(positions, size)]
            columns = torch.arange(size) if keep is None else keep
            logits = torch.empty(rows, len(columns), self.vocab_size)
            fixed = (rows, size) if rows == 1 and keep is None and size in self.sizes else (MANY, MANY)
            outputs = self.runtime.run([*filled, columns, *masks, *past], logits, fixed)
            known = self.runtime.spec.layers
            states = dict(zip(known, outputs, strict=False))
            new = outputs[len(known) :]
            for index, (keys, values) in enumerate(zip(new[::2], new[1::2], strict=True)):
                cache.update(keys[:, :, :count], values[:, :, :count], index)
            features = concatenate({layer: states[layer][:, :count] for layer in layers}, layers)
        return Verification(logits[:, :count] if keep is None else logits, features)

    def check_drafter(self, drafter: Any) -> None:
        """See `Target.check_drafter`; the graph must hand out what the drafter reads."""
        super().check_drafter(drafter)
        missing = set(drafter.feature_layers) - set(self.runtime.spec.layers)
        if missing:
            raise UserError(
                f"this OpenVINO target hands out no features of blocks {sorted(missing)}; name the drafter's "
                "feature_layers when it is made: openvino_target(target, layers=...)"
            )

    def prepare(self, nodes: int) -> None:
        """Compiles what trees of one row with up to `nodes` nodes need."""
        with self.runtime.lock:
            for size in self.sizes:
                if (1, size) not in self.runtime.requests and size <= self._size(1, min(nodes + 1, self.sizes[-1])):
                    self.runtime.requests[1, size] = self.runtime.compiled(1, size)

    def _size(self, rows: int, count: int, keep: torch.Tensor | None = None) -> int:
        """Tokens that a forward is filled up to: prompts are as long as they are."""
        if keep is not None:
            return count
        return next((size for size in self.sizes if size >= count), count)

    def _past(self, cache: Cache, rows: int) -> Iterator[torch.Tensor]:
        """Cached keys and values of each layer with all their room, which masks hide, so that shapes seldom change."""
        for index, (heads, key_size, value_heads, value_size) in enumerate(self.runtime.spec.states):
            layer = cache.layers[index] if index < len(cache.layers) else None
            if layer is None or not layer.is_initialized:
                yield torch.zeros(rows, heads, GROWTH, key_size)
                yield torch.zeros(rows, value_heads, GROWTH, value_size)
                continue
            for which, states in enumerate((layer.keys, layer.values)):
                yield with_room(layer, which, states)


def with_room(layer: GrowingLayer, which: int, states: torch.Tensor) -> torch.Tensor:
    """The buffer that these keys or values begin, or a copy with as much room."""
    buffer = layer.buffers[which]
    rows, _, slots, _ = states.shape
    if buffer.shape[2] % GROWTH == 0 and buffer.data_ptr() == states.data_ptr() and rows <= buffer.shape[0]:
        return buffer[:rows]
    return pad(states, (0, 0, 0, -slots % GROWTH or 0)).contiguous()


def filled_up(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers `int64 [B, T]` with the first again at the end, `[B, size]`."""
    more = size - numbers.shape[1]
    return torch.cat([numbers, numbers[:, :1].expand(-1, more)], 1).contiguous() if more else numbers.contiguous()


def in_parts(mask: torch.Tensor, slots: torch.Tensor | None, start: int, room: int, more: int) -> torch.Tensor:
    """A mask `[B, 1, T, S]` over slots as one over the cache before the forward, as it lies in memory, and the new
    tokens: `[B, 1, T + more, room + T + more]`.

    slots `int64 [B, T]`: of the new tokens; None where they are `start` onwards.
    """
    hidden = torch.finfo(mask.dtype).min
    if slots is None:
        past, new = mask[..., :start], mask[..., start:]
    else:
        index = slots[:, None, None, :].expand(-1, 1, mask.shape[2], -1)
        new, past = mask.gather(3, index), mask.scatter(3, index, hidden)[..., :room]
    past = pad(past, (0, room - past.shape[3], 0, more), value=hidden)
    new = pad(new, (0, more, 0, more), value=hidden)
    if more:
        new[:, :, -more:, 0] = 0  # a token that fills up sees the first one
    return torch.cat([past, new], 3).contiguous()


def openvino_target(target: Target, weights: str = "int8", layers: Sequence[int] = ()) -> OpenVINOTarget:
    """The target in OpenVINO, tried on a small tree. Half a minute for 30 layers the first time, seconds later.

    weights: `f32`, or `int8` with a scale for each row. layers: blocks whose features the drafter reads. Raises
    `UserError` where openvino is missing, and for models that cannot be converted.
    """
    if weights not in WEIGHTS:
        raise UserError(f"OpenVINO has no weights of type {weights} here; give {', '.join(WEIGHTS)}")
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise UserError(f"{EXTRAS['openvino'][0]} needs openvino; pip install 'ctc-drafter[openvino]'") from error
    name = type(target.model).__name__
    if target.device.type != "cpu" or target.dtype != torch.float32:
        raise UserError("OpenVINO takes a float32 target on the CPU; give --dtype float32 --device cpu")
    if target.chain is not None or target.switch is not None:
        raise UserError(f"{name} cannot be converted (recurrent or longrope layers); leave out --openvino")
    if target.engine != "PyTorch" or target.cache != "dynamic":
        raise UserError("OpenVINO stands alone; leave out --compile and --exact, or --openvino")
    spec = spec_of(target, layers, exact=weights != "f32")
    graph = graph_of(target.model, spec, weights, target.slices_logits)
    size = sum(weight.numel() for weight in target.model.parameters()) * (4 if weights == "f32" else 1)
    made = OpenVINOTarget(
        target.model, weights=weights, sizes=SIZES if size <= MOST_BYTES else FEW_SIZES, runtime=Runtime(graph, spec)
    )
    try:
        tried(made)
    except UserError:
        raise
    except Exception as failure:  # whatever the runtime raises
        raise UserError(f"{name} fails in OpenVINO ({first_line(failure)}); leave out --openvino") from failure
    return made


@torch.inference_mode()
def spec_of(target: Target, layers: Sequence[int], exact: bool) -> GraphSpec:
    """What the graph is made for, by a forward of a short text. exact: whether values get a grid. Raises `UserError`
    for caches of other kinds."""
    cache, text = target.new_cache(), trial_tokens(min(CALIBRATION, target.limit), target.vocab_size)
    places = torch.arange(len(text)).unsqueeze(0)
    target.forward(text.unsqueeze(0), places, cache)
    shapes, grids = [], []
    for layer in cache.layers:
        if not isinstance(layer, GrowingLayer) or layer.keys is None or layer.values is None:
            raise UserError("layers that share another one's keys cannot be converted; leave out --openvino")
        (_, keys, _, key_size), (_, values, _, value_size) = layer.keys.shape, layer.values.shape
        shapes.append((keys, key_size, values, value_size))
        grids.append(grid_for(float(layer.values.abs().max())))
    masks = target._masks(torch.ones(1, 1, 1, dtype=torch.bool), places[:, :1], places[:, :1])
    kinds = tuple(masks) if isinstance(masks, dict) else ()
    return GraphSpec(tuple(sorted(set(layers))), kinds, tuple(shapes), tuple(grids) if exact else ())


@torch.inference_mode()
def tried(target: OpenVINOTarget) -> None:
    """Raises `UserError` when a tree says something else than plain steps of this target, or these something else than
    the model in float32 beyond what fewer bits explain."""
    name = type(target.model).__name__
    if target.weights == "f32":
        self_test(target)
    length = prompt_length(target)
    prompt, tree, after = trial_tokens(length + len(PARENTS) + 1, target.vocab_size).split([length, len(PARENTS), 1])
    paths = torch.stack([torch.cat([prompt, tree[list(path)], after]) for path in PATHS])
    plain = torch.stack([plain_steps(target, path, length) for path in paths])
    error = difference(tree_logits(target, prefilled(target, prompt), length, 0, tree, after), by_node(plain))
    if not error <= ROUNDING[target.weights]:
        raise UserError(
            f"{name} in OpenVINO rounds trees otherwise than plain steps ({error:.2g} of the logits' spread)"
        )
    model = plain_logits(target.model, paths, plain.shape[1])
    error = difference(plain.flatten(0, 1), model.flatten(0, 1))
    if not error <= TOLERANCE[target.weights]:
        raise UserError(
            f"{name} in OpenVINO says something else ({error:.2g} of the logits' spread, "
            f"{TOLERANCE[target.weights]:.2g} allowed for {target.weights}); leave out --openvino"
        )


def prefilled(target: Target, tokens: torch.Tensor) -> Cache:
    """A cache of one row with these tokens `int64 [T]`."""
    cache, places = target.new_cache(), torch.arange(len(tokens))
    target.forward(tokens.unsqueeze(0), places.unsqueeze(0), cache, keep=places[-1:])
    return cache


def plain_steps(target: Target, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Logits `[T - length, V]` of plain steps behind the first `length` of tokens `int64 [T]`."""
    cache, places = prefilled(target, tokens[:length]), torch.arange(len(tokens))
    steps = range(length, len(tokens))
    return torch.cat(
        [target.forward(tokens[None, at : at + 1], places[None, at : at + 1], cache).logits[0] for at in steps]
    )
