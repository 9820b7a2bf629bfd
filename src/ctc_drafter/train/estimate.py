"""Estimates disk, memory and operations of training and distillation, on fake tensors.

Nothing is typed in: parameters are counted, and one step of the very code that trains runs on fake tensors, under a
counter of its memory and one of its operations.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ctc_drafter.drafters.lm_head import usual_chunk
from ctc_drafter.drafters.trainable import AnchorBatch, Anchors, TrainableDrafter
from ctc_drafter.target.features import captured, concatenate
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.objective import anchor_copies, loss_options
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.types import UserError, lacks_memory, own_code

GB = 1e9


@dataclass(frozen=True)
class TextSize:
    """Rows of training text, the tokens in all of them, and in the longest one."""

    rows: int
    tokens: int
    longest: int

    @classmethod
    def of(cls, dataset: DistilledDataset) -> TextSize:
        lengths = [len(row.ids) for row in dataset.rows]
        return cls(len(lengths), sum(lengths), max(lengths))

    @property
    def usual(self) -> int:
        """Tokens of a row, on average."""
        return max(2, round(self.tokens / self.rows))


@dataclass(frozen=True)
class Plan:
    """A training run to estimate. dtype: the target's. fresh: makes an untrained drafter for a target's config."""

    config: PreTrainedConfig
    dtype: torch.dtype
    fresh: Callable[[PreTrainedConfig], TrainableDrafter]
    settings: TrainSettings
    text: TextSize

    def with_settings(self, **changes: object) -> Plan:
        return replace(self, settings=self.settings.model_copy(update=changes))


@dataclass(frozen=True)
class Estimate:
    """Counts; memory and disk in bytes.

    weights: the target's. drafter: its weights and AdamW's two averages, in float32. forward: the most that the
    target's forward holds besides. step: the most that forward and backward of the drafter hold, its gradients and the
    features included. disk: checkpoints and the finished drafter. features: what those of the whole text take if
    they are kept. steps: of the run. flops: of all of them.
    """

    target_parameters: int
    drafter_parameters: int
    weights: int
    drafter: int
    forward: int
    step: int
    disk: int
    features: int
    steps: int
    flops: float

    @property
    def memory(self) -> int:
        """Peak memory of one process."""
        return self.weights + self.drafter + max(self.forward, self.step)


def estimate(plan: Plan) -> Estimate:
    """Runs a step of the plan on fake tensors: rows of the longest length for memory, of the usual one for work.

    Attention is counted as the CPU's fused kernel, which keeps no matrix of all pairs, and adds nothing to the
    operations: they are those of matrix products.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = (
            AutoModelForCausalLM.from_config(plan.config, dtype=plan.dtype, trust_remote_code=own_code(plan.config))
            .eval()
            .requires_grad_(False)
        )
        drafter = plan.fresh(plan.config).train()
        forward, step = _memory(plan, model, drafter)
        flops = _operations(plan, model, drafter)
    target_parameters = sum(weight.numel() for weight in model.parameters())
    parameters = sum(weight.numel() for weight in drafter.parameters())
    settings = plan.settings
    forwards = math.ceil(plan.text.rows / settings.batch_size)
    steps = settings.steps or math.ceil(forwards / settings.accumulate * settings.epochs)
    states = len(drafter.feature_layers) + (settings.loss == "teacher")
    features = plan.text.tokens * plan.config.get_text_config(decoder=True).hidden_size * states * plan.dtype.itemsize
    return Estimate(
        target_parameters=target_parameters,
        drafter_parameters=parameters,
        weights=sum(weight.nbytes for weight in model.parameters()),
        drafter=parameters * 3 * 4,
        forward=forward,
        step=step,
        # While a checkpoint is written, one more than are kept is there.
        disk=parameters * 4 * (3 * (settings.keep_checkpoints + 1) + 1),
        features=features,
        steps=steps,
        flops=flops * steps * settings.accumulate,
    )


def _memory(plan: Plan, model: PreTrainedModel, drafter: TrainableDrafter) -> tuple[int, int]:
    weights = [*model.parameters(), *model.buffers(), *drafter.parameters(), *drafter.buffers()]
    with PeakMemory(weights) as counter:
        features, last = _features(plan, model, drafter, plan.text.longest)
    forward, kept = counter.peak, counter.now
    with PeakMemory([*weights, features, last]) as counter:
        _step(plan, model, drafter, features, last)
    drafter.zero_grad()
    return forward, kept + counter.peak


def _operations(plan: Plan, model: PreTrainedModel, drafter: TrainableDrafter) -> float:
    """Operations of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        _step(plan, model, drafter, *_features(plan, model, drafter, plan.text.usual))
    drafter.zero_grad()
    return float(counter.get_total_flops())


@torch.no_grad()
def _features(
    plan: Plan, model: PreTrainedModel, drafter: TrainableDrafter, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Target.hidden_states`; the mask is given, because making one looks at values."""
    tokens = torch.zeros(plan.settings.batch_size, length, dtype=torch.long)
    positions = torch.arange(length).expand(tokens.shape)
    mask = torch.zeros(1, 1, length, length, dtype=plan.dtype).expand(len(tokens), -1, -1, -1)
    with captured(model, drafter.feature_layers) as outputs:
        result = model.base_model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    features = concatenate(outputs, drafter.feature_layers)
    assert features is not None
    return features, result.last_hidden_state


def _step(
    plan: Plan, model: PreTrainedModel, drafter: TrainableDrafter, features: torch.Tensor, last: torch.Tensor
) -> None:
    """Forward and backward of the drafter, every anchor used."""
    settings, labels = plan.settings, drafter.config.draft_length
    rows, length = features.shape[:2]
    tokens = torch.zeros(rows, length, dtype=torch.long)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    places = torch.zeros(rows, min(settings.anchors, length - 1), dtype=torch.long)
    prefixes = torch.zeros(*places.shape, 1 + labels, dtype=torch.long)
    anchors = Anchors(places, None, prefixes, torch.ones(*places.shape, labels, dtype=torch.bool))
    taught = last if settings.loss == "teacher" else None
    copies = anchor_copies(drafter.config, tokens, places)
    batch = AnchorBatch(features, tokens, anchors, loss_options(settings), taught, copies)
    drafter.check_loss(settings.loss)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
        drafter(batch, embed, head).backward()


def measured_rate(dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """Operations per second of matrix products on this machine: what no training step exceeds."""
    left, right = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds or not done:
        float(torch.mm(left, right)[0, 0])  # waits for the device
        done += 1
    return done * 2 * 2048**3 / (time.perf_counter() - begin)


def duration(hours: float) -> str:
    """Hours, or minutes or seconds where it is less than one, in words."""
    for unit, size in (("hours", 1.0), ("minutes", 60.0)):
        if hours * size >= 1:
            return f"{hours * size:,.1f} {unit}"
    return f"{hours * 3600:.0f} seconds"


def describe(found: Estimate, rate: float, source: str, processes: int = 1) -> list[tuple[str, str]]:
    """Lines of a table: what, and how much. rate: operations per second of each process."""
    memory = (
        f"{found.memory / GB:.1f} GB: weights of the target {found.weights / GB:.1f}, drafter and optimizer "
        f"{found.drafter / GB:.1f}, most of a step {max(found.forward, found.step) / GB:.1f}"
    )
    return [
        ("parameters", f"target {found.target_parameters / 1e9:.2f} G, drafter {found.drafter_parameters / 1e6:.1f} M"),
        ("memory of a process", memory),
        ("disk", f"{found.disk / GB:.1f} GB of checkpoints; with --features cached {found.features / GB:,.1f} GB more"),
        ("steps", f"{found.steps:,}"),
        ("work", f"{found.flops:.2e} floating-point operations"),
        ("training", f"{duration(found.flops / rate / processes / 3600)} at {rate / 1e12:.3g} TFLOP/s ({source})"),
    ]


def savings(plan: Plan) -> list[tuple[str, int]]:
    """Options that lower the memory of a plan, the most helpful first, with the bytes that each saves."""
    settings, before = plan.settings, estimate(plan).memory
    chunk = settings.anchor_chunk or usual_chunk(*_sizes(plan))
    tries: dict[str, Plan] = {}
    if settings.batch_size > 1:
        half, more = settings.batch_size // 2, settings.accumulate * 2
        option = f"--batch-size {half} --set accumulate={more}"
        tries[option] = plan.with_settings(batch_size=half, accumulate=more)
    if chunk > 1:
        tries[f"--set anchor_chunk={chunk // 2}"] = plan.with_settings(anchor_chunk=chunk // 2)
    if settings.anchors > 1:
        tries[f"--anchors {settings.anchors // 2}"] = plan.with_settings(anchors=settings.anchors // 2)
    if not settings.recompute:
        tries["--set recompute=yes"] = plan.with_settings(recompute=True)
    if plan.dtype == torch.float32:
        tries["--dtype bfloat16"] = replace(plan, dtype=torch.bfloat16)
    if plan.text.longest > 64:
        shorter = replace(plan.text, longest=plan.text.longest // 2)
        tries[f"--max-length {shorter.longest}"] = replace(plan, text=shorter)
    found = [(option, before - estimate(each).memory) for option, each in tries.items()]
    return sorted((pair for pair in found if pair[1] > 0), key=lambda pair: -pair[1])


def _sizes(plan: Plan) -> tuple[int, int]:
    with FakeTensorMode():
        config = plan.fresh(plan.config).config
    return config.vocab_size, config.draft_length


@contextmanager
def memory_errors(plan: Callable[[], Plan]) -> Iterator[None]:
    """Turns a lack of memory into one line that says which option lowers it, and by how much."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        failed = plan()
        options = ", ".join(f"{option} saves {saved / GB:.2f} GB" for option, saved in savings(failed))
        needed = estimate(failed).memory / GB
        raise UserError(f"too little memory: this run needs about {needed:.2f} GB; {options}") from error


# Cost of a distillation, from configurations alone.
#
# Reading a prompt is bound by operations. Writing is bound by memory where few rows are written at a time: each step
# reads all weights and the cache of its rows. Both are counted on fake tensors, a forward pass each.


@dataclass(frozen=True)
class Answers:
    """prompts: how many. prompt_tokens, new_tokens: of each. rows: that are written at a time."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    rows: int


@dataclass(frozen=True)
class DistillCost:
    """Cost of all answers: operations of prefill and of decoding, bytes of weights and caches read in decoding."""

    reading_flops: float
    writing_flops: float
    writing_bytes: float

    def hours(self, rate: float, bandwidth: float) -> float:
        """At so many operations and bytes per second."""
        return (self.reading_flops / rate + max(self.writing_flops / rate, self.writing_bytes / bandwidth)) / 3600


def distill_cost(config: PreTrainedConfig, dtype: torch.dtype, answers: Answers) -> DistillCost:
    """As if every prompt and answer were as long as `answers` says, each with the cache of half its answer.

    Attention adds bytes of the cache, and no operations.
    """
    half = answers.prompt_tokens + answers.new_tokens // 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = (
            AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=own_code(config))
            .eval()
            .requires_grad_(False)
        )
        with FlopCounterMode(display=False) as reading:
            _forward(model, answers.prompt_tokens)
        with FlopCounterMode(display=False) as writing:
            _forward(model, 1)
        cache = _cache_bytes(_forward(model, half))
    weights = sum(weight.nbytes for weight in model.parameters())
    steps = math.ceil(answers.prompts / answers.rows) * answers.new_tokens
    return DistillCost(
        reading_flops=float(reading.get_total_flops()) * answers.prompts,
        writing_flops=float(writing.get_total_flops()) * answers.prompts * answers.new_tokens,
        writing_bytes=float(steps * weights + answers.prompts * answers.new_tokens * cache),
    )


@torch.no_grad()
def _forward(model: PreTrainedModel, length: int) -> Any:
    """The cache after a row of so many tokens, whose last logits are computed; the mask is given, because making one
    looks at values."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    mask = torch.zeros(1, 1, length, length, dtype=model.dtype)
    given = {"input_ids": tokens, "position_ids": torch.arange(length)[None], "attention_mask": mask}
    return model(**given, use_cache=True, logits_to_keep=1).past_key_values


def _cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def describe_distillation(
    cost: DistillCost, answers: Answers, rate: float, bandwidth: float, source: str
) -> tuple[str, str]:
    """A line of a table, as `estimate.describe` gives them."""
    much = f"{duration(cost.hours(rate, bandwidth))} for {answers.prompts:,} answers of {answers.new_tokens:,} tokens"
    at = f"{rate / 1e12:.3g} TFLOP/s and {bandwidth / 1e9:,.0f} GB/s ({source})"
    return f"distillation, {answers.rows} rows at a time", f"{much} at {at}"


def measured_bandwidth(device: str, seconds: float = 0.5) -> float:
    """Bytes per second that this machine reads and writes in a copy, what no step of decoding exceeds."""
    origin = torch.zeros(2**26, device=device)
    copy = torch.empty_like(origin)
    copy.copy_(origin)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds or not done:
        copy.copy_(origin)
        float(copy[0])  # waits for the device
        done += 1
    return done * 2 * origin.nbytes / (time.perf_counter() - begin)


# Peak memory of a computation, counted on fake tensors, which have shapes and no memory.


class PeakMemory(TorchDispatchMode):
    """While open, counts the bytes of tensors that are made and let go; `peak` is the most that were there at a time.

    Those of `known` tensors, such as weights, are not counted. Views count once, with what they look at.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {_key(tensor) for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self._seen:
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor.untyped_storage(), self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
