"""`AutoDrafter`, and weights to start training from: our checkpoints, DFlash's, and Medusa's published heads.

Sources of the formats: z-lab/dflash on GitHub (`DFlashDraftModel`, tensors as in `drafters/layers.py`; `block_size`
counts the root) and FasterDecoding/Medusa (`medusa_lm_head`: head i is a sequence of residual layers `i.j.linear` and
an output matrix `i.n.weight`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ctc_drafter.chat import fingerprint
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import PROMPT_LOOKUP, TRAINED, fresh_drafter, open_drafter, trained_method
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.provenance import tensors_hash
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError, first_line

logger = logging.getLogger(__name__)

# What another method may take over with the draft layers.
SHARED = {
    *("target_layer_ids", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "mask_token_id", "carry"),
}
OF_THE_TARGET = {"vocab_size", "hidden_size", "target_num_layers"}
FROM_THE_TARGET = {"norm.weight"}  # Medusa's heads read states behind the target's own norm
MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
RESIDUAL = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
OUTPUT = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight")


@dataclass(frozen=True)
class Start:
    """name: folder or hub id. method: whose weights they are. config: keys of that method's configuration.

    weights: by our tensor names. foreign: whether somebody else's format held them.
    """

    name: str
    method: str
    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    foreign: bool

    @property
    def hash(self) -> str:
        """Hash that identifies the initial weights."""
        return tensors_hash(self.weights.items())

    def sizes(self, method: str) -> dict[str, Any]:
        """Config keys of a fresh drafter that make the weights fit."""
        known = trained_method(method).drafter.config_class.__dataclass_fields__
        same = TRAINED[method].model_type == TRAINED[self.method].model_type
        kept = (known.keys() - {"target_fingerprint"}) if same else (known.keys() & SHARED)
        return {key: value for key, value in self.config.items() if key in kept or key in OF_THE_TARGET}

    @torch.no_grad()
    def give_to(self, drafter: TrainableDrafter) -> None:
        """Copies the weights that the drafter has too; what stays fresh is logged.

        Raises `UserError` if one has another shape, or none is there.
        """
        own = drafter.state_dict()
        shared = own.keys() & self.weights.keys()
        for name in sorted(shared):
            theirs, ours = tuple(self.weights[name].shape), tuple(own[name].shape)
            if theirs != ours:
                raise UserError(
                    f"{name} is {theirs} in {self.name}, {ours} in this drafter; leave out options that change its size"
                )
            own[name].copy_(self.weights[name])
        if not shared:
            raise UserError(
                f"{self.name} has no weights that this drafter could start from; use --method {self.method}"
            )
        fresh, unused = sorted(own.keys() - shared), sorted(self.weights.keys() - shared)
        logger.info("%s: %d tensors; fresh: %s; not used: %s", self.name, len(shared), _names(fresh), _names(unused))

    def refuse_incomplete(self, drafter: TrainableDrafter) -> None:
        """Raises `UserError` where a drafter that is used as it is would keep weights of its own: random ones."""
        missing = sorted(drafter.state_dict().keys() - self.weights.keys() - FROM_THE_TARGET)
        if missing:
            raise UserError(f"{self.name} is not a whole drafter: {missing[0]} is missing; download it again")


def read_start(name: str) -> Start:
    """Weights of a folder or hub id. Raises `UserError` for what is none of the formats, and for damaged files."""
    config = _config(name)
    for method, entry in TRAINED.items():
        if entry.model_type == config.get("model_type") and all(config.get(k) == v for k, v in entry.sizes.items()):
            kept = {key: config[key] for key in config.keys() & entry.drafter.config_class.__dataclass_fields__}
            return Start(name, method, kept, _tensors(name, "model.safetensors"), foreign=False)
    if is_dflash(config):
        return Start(name, "dflash", _dflash_sizes(name, config), _tensors(name, "model.safetensors"), foreign=True)
    if is_medusa(config):
        return _medusa(name)
    raise UserError(f"{name} holds no drafter to start from; give one of ours, of DFlash, or Medusa's heads")


def is_published(name: str) -> bool:
    """Whether a folder or hub id holds a drafter in its authors' format."""
    config = _config(name)
    return is_dflash(config) or is_medusa(config)


def is_dflash(config: Mapping[str, Any]) -> bool:
    return "dflash_config" in config or "DFlashDraftModel" in (config.get("architectures") or ())


def is_medusa(config: Mapping[str, Any]) -> bool:
    return "medusa_num_heads" in config


def _config(name: str) -> dict[str, Any]:
    try:
        return dict(PreTrainedConfig.get_config_dict(name)[0])
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"no drafter could be loaded from {name}: {reason}") from error


def _tensors(name: str, *files: str) -> dict[str, torch.Tensor]:
    """Tensors of the first of these files that exists."""
    options = {"_raise_exceptions_for_missing_entries": False}
    try:
        found = next((path for file in files if (path := cached_file(name, file, **options))), None)
        if found is None:
            raise UserError(f"{name} has no {' or '.join(files)}; it cannot be started from")
        if found.endswith(".pt"):
            return dict(torch.load(found, map_location="cpu", weights_only=True))
        return load_file(found)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        reason = first_line(error)
        if isinstance(error, UnpicklingError):  # torch's own words advise to run the file
            reason = "not a file of tensors alone"
        raise UserError(f"the weights of {name} cannot be read ({reason}); download them again") from error


def _dflash_sizes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    own = config.get("dflash_config") or {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        logger.warning("%s scales its rotary positions, which is left out here", name)
    if "sliding_attention" in (config.get("layer_types") or ()):
        logger.warning("%s has sliding layers, which see everything here", name)
    sizes = {key: config[key] for key in (SHARED | {"vocab_size", "hidden_size"}) & config.keys()}
    try:
        sizes |= {key: own.get(key, config.get(key)) for key in ("target_layer_ids", "mask_token_id")}
        sizes |= {"target_num_layers": config["num_target_layers"], "draft_length": config["block_size"] - 1}
        sizes["rope_theta"] = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}'s config.json is not DFlash's: {error!r} is missing or wrong") from error
    if None in sizes.values():
        missing = next(key for key, value in sizes.items() if value is None)
        raise UserError(f"{name}'s config.json is not DFlash's: {missing} is missing")
    return sizes | {"carry": False}


def _medusa(name: str) -> Start:
    """The number of heads is counted: configs of published ones say less than their files hold."""
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in _tensors(name, *MEDUSA_FILES).items():
        if found := RESIDUAL.fullmatch(key):
            weights[f"heads.{found[1]}.{found[2]}.{found[3]}"] = tensor
        elif found := OUTPUT.fullmatch(key):
            weights[f"own.{found[1]}.weight"] = tensor
    heads = [key for key in weights if key.startswith("own.")]
    layers = [key for key in weights if re.fullmatch(r"heads\.0\.\d+\.weight", key)]
    if not heads or not layers:
        raise UserError(f"{name} holds no Medusa heads with output matrices of their own; they cannot be read")
    vocabulary, width = weights["own.0.weight"].shape
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "draft_length": len(heads)}
    return Start(name, "medusa", sizes | {"num_hidden_layers": len(layers), "own_outputs": True}, weights, foreign=True)


def _names(tensors: list[str]) -> str:
    """The first parts of tensor names."""
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in tensors)) or "none"


class AutoDrafter:
    """Opens a drafter of any method: what `--drafter` of the command line opens."""

    def __init__(self) -> None:
        raise UserError("AutoDrafter is no drafter itself; use from_pretrained, which returns one")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        target: Target | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> TrainableDrafter | PromptLookup:
        """The drafter of a folder or hub id, ready to draft, or `prompt_lookup`.

        With a target it is checked against it, and comes on its device and in its dtype; with a tokenizer, that of the
        target, what its ids mean is checked too. DFlash's checkpoints and Medusa's heads, as their authors publish
        them, need the target. Raises `UserError` for what is no drafter, or not this target's.
        """
        found = None if target is None else _as_target(target)
        if str(name) != PROMPT_LOOKUP and is_published(str(name)):
            if found is None:
                raise UserError(
                    f"{name} is in its authors' format, and needs its target: "
                    f"AutoDrafter.from_pretrained({str(name)!r}, target)"
                )
            drafter: TrainableDrafter | PromptLookup = _published(str(name), found, tokenizer)
        else:
            drafter = open_drafter(str(name))
        if found is not None and isinstance(drafter, TrainableDrafter):
            drafter.check_target(found.model.config, "" if tokenizer is None else fingerprint(tokenizer))
            drafter.to(device=found.device, dtype=found.dtype)
            columns_first(drafter)
        return drafter.eval() if isinstance(drafter, TrainableDrafter) else drafter


def _as_target(target: Target | PreTrainedModel) -> Target:
    if isinstance(target, Target):
        return target
    if not isinstance(target, PreTrainedModel):
        raise UserError(f"a {type(target).__name__} is no target; give a Target, or a model of transformers")
    return Target(target)  # not tried out: only what its weights and configuration say is read


def _published(name: str, target: Target, tokenizer: PreTrainedTokenizerBase | None) -> TrainableDrafter:
    """A drafter in its authors' format, with what the target has to add (Medusa's final norm)."""
    start = read_start(name)
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        drafter = fresh_drafter(target, tokenizer, 0, start.method, **start.sizes(start.method))
    start.refuse_incomplete(drafter)
    start.give_to(drafter)
    return drafter
