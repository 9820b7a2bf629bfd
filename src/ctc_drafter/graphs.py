"""A target's forward as a compiled graph: a pure function of tokens, masks and cache tensors.

`torch.export` writes the model down once for a number of rows and tokens, whatever Python its authors wrote, with hooks
and cache objects resolved; `torch.compile` turns that into code. On a CPU the number of cache slots stays open, so one
graph serves every length, and weights are packed for their products ("freezing"), which keeps a second copy of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ctc_drafter.features import captured, concatenate
from ctc_drafter.layout import grouped_heads
from ctc_drafter.types import UserError

BACKEND = "inductor"
MANY = 0

# See `Forward`
Graph = Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor | None]]


def sizes_are_fixed(device: torch.device) -> bool:
    """CUDA graphs want them so: a graph is good for one number of rows and of slots."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Shape:
    """What one graph is good for.

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


class Slots(CacheLayerMixin):
    """A cache layer over tensors that are there, `[B, heads, S, dim]`; new tokens go to `where int64 [T]`."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, where: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.where = keys, values, where
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        """There already."""

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


def make_graph(model: PreTrainedModel, shape: Shape, inputs: list[torch.Tensor], backend: str = BACKEND) -> Graph:
    """A compiled `Forward` of this shape; inputs are examples, which stay as they are.

    Compiling takes seconds to minutes and happens here. Raises `UserError` for a model or machine that cannot do it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compiled(written_down(model, shape, inputs), shape.open_sizes(inputs), inputs, backend)
    except Exception as error:  # whatever a model, an exporter or a compiler raises
        reason = getattr(error, "inner_exception", error)
        line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise UserError(f"{type(model).__name__} cannot be compiled ({line}); leave out --compile") from error


def written_down(model: PreTrainedModel, shape: Shape, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """The forward as plain tensor operations."""
    sizes = [dict.fromkeys(open_, Dim.DYNAMIC) for open_ in shape.open_sizes(inputs)]
    # Tensors of inference mode cannot be written to outside it, where tracing takes place.
    with torch.inference_mode(False), torch.no_grad():
        like = [torch.zeros_like(each) for each in inputs]
        program = torch.export.export(Forward(model, shape), (like,), dynamic_shapes=(sizes,), strict=False)
    return program.module().forward


def compiled(
    forward: Callable[..., Any], open_sizes: list[tuple[int, ...]], inputs: list[torch.Tensor], backend: str
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
