"""A trial of a target before it is used: a small tree against its own paths as plain text.

Signatures and configurations do not say everything: positions may be offset inside the model, a mask may be
ignored, a window may be configured and not used. Each of these would be silently wrong, so they are tried.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import Cache, PreTrainedModel

from ctc_drafter.decode.cache import compact
from ctc_drafter.types import UserError, Verification

PARENTS = (0, 0, 0, 1, 2)  # root -> 1 -> 3, root -> 2 -> 4
PATHS = ((0, 1, 3), (0, 2, 4))
DEPTHS = (0, 1, 1, 2, 2)
SHORT = 12  # tokens before the tree
# Multiplications that the trial may cost: well under a second. They decide which sliding windows are crossed.
BUDGET = {"cpu": 1e10, "cuda": 2e14}
# Of the logits' spread. Tiny correct targets are at 2e-6, 3e-3 and 2e-2 in float32, float16 and bfloat16, wrong
# ones at .04 to 2.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Rounded activations (int8) make the smallest differences large: so many times what the model's own cache changes
# in its logits is allowed, but nothing as wild as dropout.
NOISE = 8
LARGEST = 0.2


class Trial(Protocol):
    """The part of a `Target` that is tried."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def window(self) -> int | None: ...
    def new_cache(self) -> Cache: ...
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
    """Raises `UserError` when a tree of 5 nodes, or the step after its compaction, disagrees with plain text."""
    name = type(target.model).__name__
    try:
        error, tolerance = disagreement(target)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever a model raises that was not made for this
        line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise UserError(f"{name} fails on a token tree ({line}); it cannot be a target") from failure
    if not error <= tolerance:  # NaN fails as well
        advice = "call model.eval() first" if target.model.training else "it cannot be a target"
        raise UserError(
            f"{name} says something else over a token tree than over its paths as plain text "
            f"({error:.2g} of the logits' spread, {tolerance:.2g} allowed); {advice}"
        )


@torch.inference_mode()
def disagreement(target: Trial) -> tuple[float, float]:
    """The largest difference of a node, and how much is allowed, both relative to the spread of the logits."""
    device, length = target.model.device, prompt_length(target)
    tokens = trial_tokens(length + len(PARENTS) + 1, target.vocab_size).to(device)
    prompt, tree, after = tokens.split([length, len(PARENTS), 1])
    paths = torch.stack([torch.cat([prompt, tree[list(path)], after]) for path in PATHS])

    plain = plain_logits(target.model, paths, 4)
    expected = torch.stack([plain[1, 0], plain[0, 1], plain[1, 1], plain[0, 2], plain[1, 2], plain[1, 3]])
    found = torch.cat(tree_logits(target, prompt, tree, after))
    noise = difference(resumed_logits(target.model, paths[1:], length)[0], plain[1])
    tolerance = max(TOLERANCE.get(target.model.dtype, 1e-1), min(NOISE * noise, LARGEST))
    return difference(found, expected), tolerance


def tree_logits(
    target: Trial, prompt: torch.Tensor, tree: torch.Tensor, after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the nodes, `[5, V]`, and of `after` once only the second path is kept in the cache, `[1, V]`."""
    cache, length = target.new_cache(), len(prompt)
    slots = torch.arange(length, device=prompt.device).unsqueeze(0)
    target.forward(prompt.unsqueeze(0), slots, cache, keep=slots[0, -1:])

    positions = length + torch.tensor([DEPTHS], device=prompt.device)
    seen = torch.ones(1, len(PARENTS), length, dtype=torch.bool, device=prompt.device)
    allowed = torch.cat([seen, ancestors().to(prompt.device).unsqueeze(0)], 2)
    nodes = target.forward(tree.unsqueeze(0), positions, cache, allowed, torch.cat([slots, positions], 1)).logits[0]

    lengths = torch.tensor([length], device=prompt.device)
    path = torch.tensor([PATHS[1]], device=prompt.device)
    compact(cache, lengths, length, path, torch.full_like(lengths, path.shape[1] - 1))
    step = target.forward(after.unsqueeze(0), (lengths + path.shape[1]).unsqueeze(0), cache)
    return nodes, step.logits[0]


def ancestors() -> torch.Tensor:
    """`bool [5, 5]`: a node sees itself and what lies above it."""
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


def prompt_length(target: Trial) -> int:
    """Tokens before the tree: more than a sliding window holds, where that is cheap."""
    most = BUDGET.get(target.model.device.type, BUDGET["cpu"]) / (5 * max(1, target.model.num_parameters()))
    crossing = (target.window or 0) + SHORT
    return max(1, min(crossing if crossing <= most else SHORT, target.context - 6))
