"""Prompts with pictures: read by the model as stock `generate` reads them, then decoded as any text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ctc_drafter.decode.prefill import Prefill
from ctc_drafter.decode.tree import build_tree
from ctc_drafter.decode.verify import verify
from ctc_drafter.target.cache import GrowingLayer, erase
from ctc_drafter.target.features import captured, concatenate
from ctc_drafter.target.model import Target
from ctc_drafter.target.self_test import LARGEST, TOLERANCE, difference, rounds_coarsely
from ctc_drafter.types import Candidates, UserError, first_line

# What a forward over text is told by us: its positions, its mask, its cache.
OF_TEXT = {"input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep"}
# Placeholders of pictures, which need not be in the vocabulary.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Pictures:
    """Prompts of one call, `int64 [B, T]` with a mask of their tokens, and what `generate` prepared for its own first
    forward over them: features of images or their pixels, token types, positions in several planes.

    That forward is the model's own, over whole prompts with their padding, by its own masks: a model may let the tokens
    of a picture see each other. Afterwards a picture is keys and values in the cache, and what follows is text, whose
    positions lie apart from the number of tokens by a constant for each row and plane (M-RoPE).
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    inputs: dict[str, Any]
    name: str  # that the user passed them by
    tried: bool = False

    def check(self, target: Target) -> None:
        """Raises `UserError` for targets that cannot go on behind pictures, and tokens that are none."""
        kind = type(target.model).__name__
        if target.chain is not None:
            raise UserError(f"speculate follows {kind} by chains, over text alone; leave out {self.name}")
        if target.switch is not None:
            raise UserError(f"{kind} changes its longrope factors, which goes with text alone; leave out {self.name}")
        places = {getattr(target.model.config, name, None) for name in PLACEHOLDERS}
        unknown = set(self.tokens[(self.tokens < 0) | (self.tokens >= target.vocab_size)].tolist()) - places
        if unknown:
            raise UserError(f"token {min(unknown)} is not in the target's vocabulary of {target.vocab_size}")

    @torch.inference_mode()
    def prefill(self, target: Target, rows: Sequence[int], layers: Sequence[int] = ()) -> Prefill:
        """The prompts of these rows, in this order, as `prefill` leaves prompts of text: a token's slot is its place
        in its row.

        Unless the target was tried, the next step is computed as stock `generate` would and as we do. Raises
        `UserError` where they disagree, and for pictures that the model cannot read.
        """
        model, device = target.model, target.device
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        given = {**map_copies(self.inputs), "past_key_values": cache, "use_cache": True}
        try:
            first = model.prepare_inputs_for_generation(self.tokens, is_first_iteration=True, **given)
            with captured(model, layers) as outputs:
                result = model(**first, return_dict=True)
        except (ValueError, IndexError) as error:  # another number of placeholders, an unknown size
            raise UserError(f"{type(model).__name__} cannot read {self.name}: {first_line(error)}") from error
        # What stock `generate` would hand over next.
        given = model._update_model_kwargs_for_generation(result, given)
        root = result.logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([self.tokens, root.to(self.tokens)], 1)
        step = model.prepare_inputs_for_generation(text, next_sequence_length=1, **given)
        self._refuse_more(target, step)

        mask = self.mask.to(device)
        lengths = mask.sum(1)
        shift = step["position_ids"][..., 0].to(device) - lengths
        order = mask.argsort(dim=1, descending=True, stable=True)  # tokens first
        chosen = torch.tensor(list(rows), device=device)
        width = int(lengths[chosen].max())
        # Padding repeats the last token: nothing that a mask hides may be NaN, as in `prefill`.
        places = torch.arange(width, device=device).minimum(lengths[chosen].unsqueeze(1) - 1)
        index = order[chosen].gather(1, places)
        features = concatenate(outputs, layers, device)
        found = Prefill(
            packed(target, cache, chosen, index),
            lengths[chosen],
            self.tokens.to(device)[chosen].gather(1, index).clamp(0, target.vocab_size - 1),
            None if features is None else features[chosen.unsqueeze(1), index],
            result.logits[chosen, -1],
            shift[..., chosen] if shift.any() else None,
        )
        if not self.tried:
            self._try(target, found, root[chosen, 0], model(**step, return_dict=True).logits[chosen, -1])
        return found

    def _refuse_more(self, target: Target, step: dict[str, Any]) -> None:
        """Raises `UserError` for a model that is handed more with each token than text has."""
        kind = type(target.model).__name__
        more = sorted(key for key in step.keys() - OF_TEXT - self.inputs.keys() if step[key] is not None)
        if more or step.get("position_ids") is None:
            what = more[0] if more else "positions of its own"
            raise UserError(f"{kind} needs {what} with each token behind pictures; leave out {self.name}")

    def _try(self, target: Target, state: Prefill, root: torch.Tensor, expected: torch.Tensor) -> None:
        """Raises `UserError` where one token more gives other logits than `expected [B, V]`, which are stock's."""
        slots = state.cache.get_seq_length()
        tree = build_tree(root, Candidates.nothing(root), 0)
        logits = verify(target, state.cache, state.lengths, tree, (), state.shift).logits[:, -1]
        erase(state.cache, slots)
        error = difference(logits, expected)
        allowed = LARGEST if rounds_coarsely(target.model) else TOLERANCE.get(target.dtype, LARGEST)
        if not error <= allowed:
            raise UserError(
                f"{type(target.model).__name__} goes on from pictures otherwise than speculate can ({error:.2g} of the "
                f"logits' spread, {allowed:.2g} allowed); leave out {self.name}"
            )


def map_copies(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose dictionaries are copies: models write what their encoders found into them."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in inputs.items()}


def packed(target: Target, cache: Cache, rows: torch.Tensor, index: torch.Tensor) -> Cache:
    """A cache of the target's own kind with these rows `int64 [R]` of another one, slot s of row r taken from its slot
    `index[r, s]`, `int64 [R, S]`."""
    fresh: Cache = target.new_cache(index.shape[1])
    for place, layer in enumerate(cache.layers):
        if layer.keys is not None:
            own, slots = rows.to(layer.keys.device).unsqueeze(1), index.to(layer.keys.device)
            states = (each[own, :, slots].transpose(1, 2) for each in (layer.keys, layer.values))
            fresh.update(*states, place)
    return fresh
