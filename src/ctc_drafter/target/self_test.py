"""Self-test of a target at load: a small token tree against its paths as plain text.

Signatures and configurations do not say everything: positions may be offset inside the model, a mask may be
ignored, a window may be configured and not used. Each of these would be silently wrong, so they are tried.

What a model computes may also depend on length: the trial is repeated at every length that the configuration names,
windows, chunks, original contexts and the like. So that it stays cheap, the cache is not computed there but filled
with keys and values of a short text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from ctc_drafter.target.cache import GrowableStaticLayer, compact, reserve
from ctc_drafter.target.rope import switch_length
from ctc_drafter.types import UserError, Verification, first_line

PARENTS = (0, 0, 0, 1, 2, 3, 4)  # root -> 1 -> 3 -> 5, root -> 2 -> 4 -> 6
PATHS = ((0, 1, 3, 5), (0, 2, 4, 6))
DEPTHS = (0, 1, 1, 2, 2, 3, 3)
SHORT = 12  # tokens before the tree
# Of the logits' spread. Tiny correct targets are at 2e-6, 3e-3 and 2e-2 in float32, float16 and bfloat16, wrong
# ones at .04 to 2.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Rounded activations (int8) make the smallest differences large, and so does bfloat16 in models with a few large ones
# among them. Such targets may differ by so many times what the model's own cache changes in its logits, but by LARGEST
# at most: dropout changes more.
QUANTISED, ROUNDED = 8, 2
LARGEST = 0.2
# Settings that may change what is computed from some length on, and names of the like that count something else.
LENGTHS = re.compile(r"window|chunk|keep|floor|original_max|span|local")
COUNTS = re.compile(r"layers|pattern|^num_|_num_|feed_forward|experts?")
# Keys of a text that is not read are made small, so that attention spreads over all of it, and values at a window's
# edge so large that each is worth a part of the whole: a key too many or too few then shows in any format.
SPREAD, EDGE = 0.1, 1 / 2
# Bytes that filled caches may take: a part of the weights' own, within bounds.
PART, LEAST, MOST = 8, 64 << 20, 1 << 30


States = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Limited(Protocol):
    """What has positions up to a limit."""

    @property
    def limit(self) -> int: ...


class Trial(Protocol):
    """The part of a `Target` that is tried."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def limit(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def new_cache(self, slots: int = 0) -> Cache: ...
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        allowed: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        layers: Sequence[int] = (),
        keep: torch.Tensor | None = None,
    ) -> Verification: ...


def self_test(target: Trial) -> None:
    """Raises `UserError` when a tree of 7 nodes, or the step after its compaction, disagrees with plain text: behind a
    short text, or where a length that the configuration names is crossed."""
    name = type(target.model).__name__
    try:
        for where, error, allowed in trials(target):
            if not error <= allowed:  # NaN fails as well
                advice = "call model.eval() first" if target.model.training else "it cannot be a target"
                raise UserError(
                    f"{name} says something else over a token tree than over its paths as plain text{where} "
                    f"({error:.2g} of the logits' spread, {allowed:.2g} allowed); {advice}"
                )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever a model raises that was not made for this
        line = first_line(failure)
        raise UserError(f"{name} fails on a token tree ({line}); it cannot be a target") from failure


def trials(target: Trial) -> Iterator[tuple[str, float, float]]:
    """Each trial: where, in words; the largest difference of a node; how much is allowed."""
    error, allowed, states = behind_a_short_text(target)
    yield "", error, allowed
    for threshold, names in thresholds(target.config).items():
        if threshold + len(PARENTS) <= target.limit:
            yield f" where {names} = {threshold} is crossed", crossing(target, threshold, states), allowed


def thresholds(config: PreTrainedConfig) -> dict[int, str]:
    """The lengths that a text configuration names, with their names: `{512: "sliding_window"}`."""
    found: dict[int, list[str]] = {}
    for name, value in settings(config.to_dict()):
        if type(value) is int and value > 3 and LENGTHS.search(name) and not COUNTS.search(name):
            found.setdefault(value, []).append(name)
    return {value: " and ".join(dict.fromkeys(names)) for value, names in sorted(found.items())}


def settings(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting with its name, those of nested dictionaries too."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from settings({str(key): each for key, each in value.items()})
        else:
            yield name, value


@torch.inference_mode()
def behind_a_short_text(target: Trial) -> tuple[float, float, States]:
    """Behind a short text: the largest difference of a node and how much is allowed, both relative to the spread of the
    logits; and the keys and values of the text."""
    device, length = target.model.device, prompt_length(target)
    tokens = trial_tokens(length + len(PARENTS) + 1, target.vocab_size).to(device)
    prompt, tree, after = tokens.split([length, len(PARENTS), 1])
    paths = torch.stack([torch.cat([prompt, tree[list(path)], after]) for path in PATHS])

    plain = plain_logits(target.model, paths, len(PATHS[0]) + 1)
    cache, positions = target.new_cache(length), torch.arange(length, device=device)
    target.forward(prompt.unsqueeze(0), positions.unsqueeze(0), cache, keep=positions[-1:])
    found = tree_logits(target, cache, length, 0, tree, after)
    error, allowed = difference(found, by_node(plain)), TOLERANCE.get(target.model.dtype, 1e-1)
    quantised = is_quantised(target.model)
    if quantised or (target.model.dtype == torch.bfloat16 and error > allowed):
        noise = difference(resumed_logits(target.model, paths, length).flatten(0, 1), plain.flatten(0, 1))
        allowed = max(allowed, min((QUANTISED if quantised else ROUNDED) * noise, LARGEST))
    return error, allowed, states_of(cache)


@torch.inference_mode()
def crossing(target: Trial, threshold: int, short: States) -> float:
    """The largest difference of a node where the tree's depths stand at both sides of `threshold`.

    short: keys and values of a short text. The text before the root is as long as the threshold where memory allows;
    else it is the short one, at positions before the root's.
    """
    # By their positions, depths 0 to 2 stand below the threshold and depth 3 on it; by their slots, more do.
    device, start = target.model.device, max(1, threshold - 3)
    tree, after = trial_tokens(len(PARENTS) + 1, target.vocab_size).to(device).split([len(PARENTS), 1])
    length = start if fits(target.model, short, start) else min(start, SHORT)
    states = stretched(short, length, edge=length == start)
    cache = target.new_cache(length)
    if isinstance(cache.layers[0] if cache.layers else None, GrowableStaticLayer):
        reserve(cache, length)
    found = tree_logits(target, fill(cache, states, 1), length, start - length, tree, after)

    paths = torch.stack([torch.cat([tree[list(path)], after]) for path in PATHS])
    positions = torch.arange(start, start + paths.shape[1], device=device).expand_as(paths)
    plain = fill(DynamicCache(), states, len(PATHS))
    # Rotary factors that follow the largest position of a forward need one token at a time, as plain decoding has it.
    width = 1 if switch_length(target.config) else paths.shape[1]
    parts = zip(paths.split(width, 1), positions.split(width, 1), strict=True)
    logits = [
        target.model(input_ids=tokens, position_ids=places, past_key_values=plain, use_cache=True).logits
        for tokens, places in parts
    ]
    return difference(found, by_node(torch.cat(logits, 1)))


def fits(model: PreTrainedModel, states: States, length: int) -> bool:
    """Whether caches of so many tokens, for the tree and for both paths, are small compared to the weights."""
    a_token = sum(part[:, :, :1].numel() * part.element_size() for pair in states.values() for part in pair)
    weights = sum(weight.nbytes for weight in model.parameters())
    return 4 * a_token * length <= min(max(weights // PART, LEAST), MOST)


def states_of(cache: Cache) -> States:
    """Keys and values `[1, heads, T, dim]` of each layer that has its own."""
    slots = cache.get_seq_length()
    return {
        index: (layer.keys[:, :, :slots], layer.values[:, :, :slots])
        for index, layer in enumerate(cache.layers)
        if layer.keys is not None
    }


def stretched(states: States, length: int, edge: bool) -> States:
    """As if the text were `length` tokens long: slots of the short one in a random order. With `edge` the first few
    values, which leave a window of that length first, are made large."""
    found: States = {}
    for layer, (keys, values) in states.items():
        order = trial_tokens(length, keys.shape[2]).to(keys.device)
        keys, values = SPREAD * keys[:, :, order], values[:, :, order]
        if edge:
            values[:, :, : len(PARENTS) + 2] *= max(1.0, EDGE * length)
        found[layer] = keys, values
    return found


def fill(cache: Cache, states: States, rows: int) -> Cache:
    """Fills an empty cache with keys and values, `rows` times."""
    for layer, (keys, values) in states.items():
        cache.update(keys.repeat(rows, 1, 1, 1), values.repeat(rows, 1, 1, 1), layer)
    return cache


def tree_logits(
    target: Trial, cache: Cache, length: int, offset: int, tree: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """Logits of the 7 nodes, and of `after` once only the second path is kept in the cache, `[8, V]`.

    The cache holds `length` tokens, the first at position `offset`.
    """
    slots = torch.arange(length, device=tree.device).unsqueeze(0) + offset
    positions = offset + length + torch.tensor([DEPTHS], device=tree.device)
    seen = torch.ones(1, len(PARENTS), length, dtype=torch.bool, device=tree.device)
    allowed = torch.cat([seen, ancestors().to(tree.device).unsqueeze(0)], 2)
    nodes = target.forward(tree.unsqueeze(0), positions, cache, allowed, torch.cat([slots, positions], 1)).logits[0]

    lengths = torch.tensor([length], device=tree.device)
    path = torch.tensor([PATHS[1]], device=tree.device)
    compact(cache, lengths, length, path, torch.full_like(lengths, path.shape[1] - 1))
    position = (offset + lengths + path.shape[1]).unsqueeze(0)
    return torch.cat([nodes, target.forward(after.unsqueeze(0), position, cache).logits[0]])


def by_node(plain: torch.Tensor) -> torch.Tensor:
    """Logits `[8, V]` in the order of `tree_logits`, of those of both paths and `after`, `[2, 5, V]`."""
    return torch.stack([plain[1, 0], *plain[:, 1:-1].transpose(0, 1).flatten(0, 1), plain[1, -1]])


def rounds_coarsely(model: PreTrainedModel) -> bool:
    """Whether differences up to `LARGEST` may be rounding: of fewer bits, or of bfloat16 in a deep model."""
    return bool(model.dtype == torch.bfloat16) or is_quantised(model)


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether weights are held in fewer bits than they are computed with."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        return True
    quantised = any(type(w) is not nn.Parameter or type(w.data) is not torch.Tensor for w in model.parameters())
    return quantised or any("quantized" in type(module).__module__ for module in model.modules())


def ancestors() -> torch.Tensor:
    """`bool [7, 7]`: a node sees itself and what lies above it."""
    matrix = torch.eye(len(PARENTS), dtype=torch.bool)
    for node, parent in enumerate(PARENTS):
        matrix[node] |= matrix[parent]
    return matrix


def plain_logits(model: PreTrainedModel, rows: torch.Tensor, last: int) -> torch.Tensor:
    """Logits `[B, last, V]` of rows `int64 [B, T]` as the model reads any text: no mask, no positions, no cache."""
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = last
    return model(input_ids=rows, use_cache=False, **options).logits[:, -last:]


def resumed_logits(model: PreTrainedModel, rows: torch.Tensor, length: int) -> torch.Tensor:
    """Logits `[B, T - length, V]` of the rest of rows, their first `length` tokens lying in the model's own cache."""
    cache = model(input_ids=rows[:, :length], use_cache=True).past_key_values
    options: dict[str, Any] = {}
    if getattr(model.base_model, "rope_deltas", None) is not None:  # of the rows and images of an earlier call
        options["position_ids"] = torch.arange(length, rows.shape[1], device=rows.device).expand(len(rows), -1)
    return model(input_ids=rows[:, length:], past_key_values=cache, use_cache=True, **options).logits


def difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    """The largest root mean square difference of rows `[N, V]`, in root mean squares around the row's mean."""
    mine, other = mine.float(), other.float()
    spread = (other - other.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return float(((mine - other).square().mean(-1).sqrt() / spread).max())


def trial_tokens(count: int, vocab_size: int) -> torch.Tensor:
    """Token ids `int64 [count]`, the same in every trial and apart from any global seed."""
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(0))


def prompt_length(target: Limited) -> int:
    """Tokens before the tree of the first trial."""
    return max(1, min(SHORT, target.limit - len(PARENTS) - 1))
