"""`AutoDrafter`, and weights to start training from: our checkpoints, DFlash's, published Medusa and EAGLE-3 heads.

Sources of the formats: of DFlash's, `dflash_format.py`; of EAGLE-3's, `baselines/eagle3.py`; FasterDecoding/Medusa on
GitHub (`medusa_lm_head`: head i is a sequence of residual layers `i.j.linear` and an output matrix `i.n.weight`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ctc_drafter.chat import fingerprint
from ctc_drafter.drafters.dflash_format import SHARED, dflash2_sizes, dflash_sizes, is_dflash, is_dflash2
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import PROMPT_LOOKUP, READ, TRAINED, fresh_drafter, open_drafter, trained_method
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.provenance import tensors_hash
from ctc_drafter.target.checks import plain_model
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.target.names import refuse_unreachable
from ctc_drafter.types import UserError, first_line

logger = logging.getLogger(__name__)

OF_THE_TARGET = {"vocab_size", "hidden_size", "target_num_layers"}
FROM_THE_TARGET = {"medusa": {"norm.weight"}}  # its heads read states behind the target's own norm
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
        chosen, mine = (READ.get(name) or trained_method(name) for name in (method, self.method))
        known = chosen.drafter.config_class.__dataclass_fields__
        same = chosen.model_type == mine.model_type
        kept = (known.keys() - {"target_fingerprint", "score_temperature"}) if same else (known.keys() & SHARED)
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
        missing = sorted(drafter.state_dict().keys() - self.weights.keys() - FROM_THE_TARGET.get(self.method, set()))
        if missing:
            raise UserError(f"{self.name} is not a whole drafter: {missing[0]} is missing; download it again")


def read_start(name: str) -> Start:
    """Weights of a folder or hub id. Raises `UserError` for what is none of the formats, and for damaged files."""
    config = _config(name)
    for method, entry in TRAINED.items():
        if entry.model_type == config.get("model_type") and all(config.get(k) == v for k, v in entry.sizes.items()):
            fields = entry.drafter.config_class.__dataclass_fields__
            kept = {key: config[key] for key in config.keys() & fields}
            if "predictor_tied" in fields:
                kept.setdefault("predictor_tied", False)  # of folders from before there was a choice
            return Start(name, method, kept, _tensors(name, "model.safetensors"), foreign=False)
    if is_dflash(config):
        method, sizes = ("dflash2", dflash2_sizes) if is_dflash2(config) else ("dflash", dflash_sizes)
        return Start(name, method, sizes(name, config), _tensors(name, "model.safetensors"), foreign=True)
    if is_medusa(config):
        return _medusa(name)
    if is_eagle3(config):
        return _eagle3(name, config)
    raise UserError(f"{name} holds no drafter to start from; give one of ours, of DFlash, or Medusa's heads")


def is_published(name: str) -> bool:
    """Whether a folder or hub id holds a drafter in its authors' format."""
    config = _config(name)
    return is_dflash(config) or is_medusa(config) or is_eagle3(config)


def is_medusa(config: Mapping[str, Any]) -> bool:
    return "medusa_num_heads" in config


def _config(name: str) -> dict[str, Any]:
    refuse_unreachable(name)
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
        if not found.endswith((".pt", ".bin")):
            return load_file(found)
        tensors = torch.load(found, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise ValueError("not a dictionary of tensors")
        return dict(tensors)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"the weights of {name} cannot be read ({reason}); download them again") from error


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
    lost = sorted({f"own.{head}.weight" for head in range(len(heads))} - set(heads))
    if lost and layers:
        raise UserError(f"{name} is not a whole drafter: {lost[0]} is missing; download it again")
    if not heads or not layers or any(weights[key].dim() != 2 for key in (*heads, *layers)):
        raise UserError(f"{name} holds no Medusa heads with output matrices of their own; they cannot be read")
    vocabulary, width = weights["own.0.weight"].shape
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "draft_length": len(heads)}
    return Start(name, "medusa", sizes | {"num_hidden_layers": len(layers), "own_outputs": True}, weights, foreign=True)


def _names(tensors: list[str]) -> str:
    """The first parts of tensor names."""
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in tensors)) or "none"


# EAGLE-3's published heads: what `drafters/baselines/eagle3.py` has to know, by their config.json and tensors.

SCALED = ("linear", "llama3", "yarn")  # rotary scalings that do not depend on the text's length
EAGLE3_FLAGS = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")
EAGLE3_SIZES = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
EAGLE3_IGNORED = re.compile(r"t2d|verifier_(norm|lm_head)\.weight|rotary_emb\.inv_freq")
EAGLE3_LAYER = re.compile(r"(?:midlayer|layers\.0)\.")


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a published EAGLE-3 head."""
    if config.get("model_type") == READ["eagle3"].model_type:  # one that we saved
        return False
    named = any("eagle3" in str(each).lower() for each in config.get("architectures") or ())
    plain = "draft_vocab_size" in config and config.get("model_type") == "llama"
    return named or plain or config.get("speculators_model_type") == "eagle3"


def _eagle3(name: str, config: Mapping[str, Any]) -> Start:
    try:
        sizes = _eagle3_sizes(name, config)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # values of other kinds than theirs
        raise UserError(f"{name}'s config.json is not EAGLE-3's: {first_line(error)}") from error
    weights, more = _eagle3_weights(name, _tensors(name, "model.safetensors", "pytorch_model.bin"), sizes)
    return Start(name, "eagle3", sizes | more, weights, foreign=True)


def _eagle3_sizes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an `Eagle3Config`, but for those that the weights and the target say.

    Raises `UserError` for what is not EAGLE-3's, and for heads that do what is not done here.
    """
    flags = dict(config) | dict(config.get("eagle_config") or {})
    given = dict(config.get("transformer_layer_config") or config)
    kind = given.pop("model_type", "llama")
    if kind not in ("llama", "qwen3"):
        raise UserError(f"{name} has a layer of {kind}; EAGLE-3 heads of llama and qwen3 layers can be read")
    try:
        layer = AutoConfig.for_model(kind, **{key: value for key, value in given.items() if key in EAGLE3_KNOWN})
    except Exception as error:  # transformers checks values in ways of its own
        raise UserError(f"{name}'s config.json is not EAGLE-3's: {first_line(error)}") from error
    wide = config.get("target_hidden_size") or layer.hidden_size
    reasons = {
        f"{layer.num_hidden_layers} layers": layer.num_hidden_layers != 1,
        f"{layer.hidden_act} in place of silu": layer.hidden_act != "silu",
        "biases in its MLP": getattr(layer, "mlp_bias", False),
        f"layers of width {layer.hidden_size} for a target of {wide}": wide != layer.hidden_size,
        "parallel drafting": flags.get("parallel_drafting", False),
        "no features of inner layers": flags.get("use_aux_hidden_state") is False,
    }
    reason = next((text for text, wrong in reasons.items() if wrong), None)
    if reason is not None:
        raise UserError(f"{name} is an EAGLE-3 head with {reason}, which cannot be read yet; use another drafter")
    sizes = {key: getattr(layer, key) for key in (*EAGLE3_SIZES, "rms_norm_eps", "max_position_embeddings")}
    sizes |= {flag: bool(flags.get(flag)) for flag in EAGLE3_FLAGS} | {"qk_norm": kind == "qwen3"}
    sizes |= {"attention_bias": bool(layer.attention_bias)} | _eagle3_rotary(name, layer.rope_parameters)
    if "sliding_attention" in (given.get("layer_types") or ()):
        logger.warning("%s has a sliding layer, which sees everything here", name)
    layers = flags.get("eagle_aux_hidden_state_layer_ids")
    if layers and min(layers) < 1:
        raise UserError(f"{name} reads the target's embeddings as features, which is not done here; use another")
    return sizes | ({"target_layer_ids": [layer - 1 for layer in layers]} if layers else {})


EAGLE3_KNOWN = {
    *EAGLE3_SIZES,
    *("num_hidden_layers", "hidden_act", "mlp_bias", "attention_bias", "rms_norm_eps", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}


def _eagle3_rotary(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, and `rope` where positions are scaled."""
    kind = given.get("rope_type", "default")
    if kind not in ("default", *SCALED):
        raise UserError(f"{name} scales its rotary positions by {kind}, which is not done here; use another drafter")
    return {"rope_theta": float(given["rope_theta"])} | ({} if kind == "default" else {"rope": dict(given)})


def _eagle3_weights(
    name: str, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights by our names, and the sizes that they say. Raises `UserError` for others than EAGLE-3's."""
    found = {
        EAGLE3_LAYER.sub("layer.", key): tensor for key, tensor in tensors.items() if not EAGLE3_IGNORED.fullmatch(key)
    }
    count = found["lm_head.weight"].shape[:1].numel() if "lm_head.weight" in found else 0
    if count == sizes["vocab_size"]:
        found.setdefault("d2t", torch.zeros(count, dtype=torch.long))
    missing = next((key for key in ("lm_head.weight", "d2t") if key not in found), None)
    if missing:
        raise UserError(f"{name} is not a whole drafter: {missing} is missing; download it again")
    shift = found["d2t"]
    ids = torch.arange(count) + shift.long() if shift.shape == (count,) else torch.tensor([-1])
    if not ((ids >= 0) & (ids < sizes["vocab_size"])).all():
        raise UserError(f"the draft vocabulary (d2t) of {name} names tokens that do not exist; download it again")
    return found, {"draft_vocab_size": count, "own_embedding": "embed_tokens.weight" in found}


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
        target, what its ids mean is checked too. DFlash's checkpoints, Medusa's and EAGLE-3's heads, as their
        authors publish them, need the target. Raises `UserError` for what is no drafter, or not this target's.
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
    if not isinstance(target, PreTrainedModel) and not hasattr(target, "get_base_model"):
        raise UserError(f"a {type(target).__name__} is no target; give a Target, or a model of transformers")
    return Target(plain_model(target))  # not tried out: only what its weights and configuration say is read


def _published(name: str, target: Target, tokenizer: PreTrainedTokenizerBase | None) -> TrainableDrafter:
    """A drafter in its authors' format, with what the target has to add (Medusa's final norm)."""
    start = _sharing_embedding(read_start(name), target)
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        drafter = fresh_drafter(target, tokenizer, 0, start.method, **start.sizes(start.method))
    start.refuse_incomplete(drafter)
    unknown = sorted(start.weights.keys() - drafter.state_dict().keys()) if start.method == "eagle3" else []
    if unknown:  # a head that computes something else
        raise UserError(f"{name} holds {unknown[0]}, which EAGLE-3 heads with its config.json have not; use another")
    start.give_to(drafter)
    return drafter


def _sharing_embedding(start: Start, target: Target) -> Start:
    """Without an embedding that is a copy of the target's; EAGLE-3 heads may come with one."""
    theirs, ours = start.weights.get("embed_tokens.weight"), getattr(target.embed, "weight", None)
    if start.method != "eagle3" or theirs is None or ours is None or theirs.shape != ours.shape:
        return start
    if not torch.equal(theirs.to(ours), ours):
        return start
    weights = {name: tensor for name, tensor in start.weights.items() if name != "embed_tokens.weight"}
    return replace(start, config={**start.config, "own_embedding": False}, weights=weights)
