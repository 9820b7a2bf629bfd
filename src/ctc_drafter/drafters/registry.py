"""Drafters by name: class of a method or saved config, `AutoDrafter`, and untrained drafters for a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ctc_drafter.chat import fingerprint
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.lm_head import most_frequent
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.target.layout import columns_first
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError, first_line

# The drafters by name: which class a method or a saved config stands for.


@dataclass(frozen=True)
class Trained:
    """A method with weights: where its class is, the class's model type, and what the method sets in its config.

    training: the settings that its authors train it with, where they are not ours; `docs/methods.md` has the sources.
    usual: what a fresh one has in its config unless told otherwise.
    """

    module: str
    name: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)

    @property
    def drafter(self) -> type[TrainableDrafter]:
        found = getattr(import_module(f"ctc_drafter.drafters.{self.module}"), self.name)
        assert issubclass(found, TrainableDrafter)
        return found


TRAINED = {
    "ctc": Trained("ctc", "CTCDrafter", "ctc_drafter", usual={"carry": True, "copies": 16, "lookup_length": 15}),
    "ctc-linear": Trained("baselines.ctc_variants", "LinearCTCDrafter", "ctc_linear_drafter"),
    "ctc-paper": Trained("baselines.ctc_variants", "PaperDrafter", "ctc_paper_drafter"),
    "medusa": Trained("baselines.heads", "MedusaDrafter", "medusa_drafter"),
    "hydra": Trained("baselines.hydra", "HydraDrafter", "hydra_drafter", training={"loss_decay": 1.0}),
    "hydra++": Trained(
        "baselines.hydra",
        "HydraDrafter",
        "hydra_drafter",
        {"prefix_attention": True, "num_hidden_layers": 4},
        {"loss": "teacher", "loss_decay": 1.0},
    ),
    "dflash": Trained("baselines.dflash", "DFlashDrafter", "dflash_drafter", training={"loss_decay": 0.78}),
    "dspark": Trained(
        "baselines.dflash", "DSparkDrafter", "dspark_drafter", training={"loss": "teacher", "loss_decay": 0.78}
    ),
    "eagle": Trained("baselines.eagle", "EagleDrafter", "eagle_drafter", training={"loss": "teacher"}),
}
PROMPT_LOOKUP = "prompt_lookup"
FOR_ABLATIONS = frozenset({"ctc-linear"})  # parts of other methods, no method of their own


def trained_method(name: str) -> Trained:
    """Raises `UserError` for a method that is not known, or cannot be trained."""
    if name == PROMPT_LOOKUP:
        raise UserError(f"{name} has nothing to train; use --drafter {name}")
    if name not in TRAINED:
        raise UserError(f"unknown method {name}; known are {', '.join(TRAINED)}")
    return TRAINED[name]


def method_of(drafter: Drafter) -> str:
    """The name of a drafter's method, as results give it."""
    if isinstance(drafter, PromptLookup):
        return PROMPT_LOOKUP
    config = getattr(drafter, "config", None)
    fitting = [
        name
        for name, method in TRAINED.items()
        if method.model_type == getattr(config, "model_type", None)
        and all(getattr(config, key) == size for key, size in method.sizes.items())
    ]
    return fitting[-1] if fitting else type(drafter).__name__  # the last one that fits sets most


def open_drafter(name: str) -> TrainableDrafter | PromptLookup:
    """A saved drafter, of the class that its config names, or `prompt_lookup`. Raises `UserError` for others."""
    if name == PROMPT_LOOKUP and not Path(name).is_dir():
        return PromptLookup()
    try:
        found = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"no drafter could be loaded from {name}: {reason}") from error
    fitting = [method for method in TRAINED.values() if method.model_type == found]
    if not fitting:
        raise UserError(f"{name} holds no drafter but a model of type {found}; give the folder of a drafter")
    return fitting[0].drafter.from_pretrained(name)


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
        if str(name) != PROMPT_LOOKUP and _is_published(str(name)):
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


def _is_published(name: str) -> bool:
    from ctc_drafter.drafters.warm_start import is_published  # which knows the methods from here

    return is_published(name)


def _published(name: str, target: Target, tokenizer: PreTrainedTokenizerBase | None) -> TrainableDrafter:
    """A drafter in its authors' format, with what the target has to add (Medusa's final norm)."""
    from ctc_drafter.drafters.warm_start import read_start

    start = read_start(name)
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
        drafter = fresh_drafter(target, tokenizer, 0, start.method, **start.sizes(start.method))
    start.refuse_incomplete(drafter)
    start.give_to(drafter)
    return drafter


def fresh_drafter(
    target: Target, tokenizer: PreTrainedTokenizerBase | None, seed: int, method: str = "ctc", **sizes: Any
) -> TrainableDrafter:
    """An untrained drafter for this target; sizes that are None are the config's. It starts from the target's weights,
    where it has like ones. Without a tokenizer it fits any, and the mask token is the config's."""
    chosen = trained_method(method)
    torch.manual_seed(seed)
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if tokenizer is not None:
        given.setdefault("target_fingerprint", fingerprint(tokenizer))
    if tokenizer is not None and "mask_token_id" in chosen.drafter.config_class.__dataclass_fields__:
        fillers = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        given.setdefault("mask_token_id", next(token for token in fillers if token is not None))
    drafter = chosen.drafter.for_target(target.model.config, **chosen.usual | chosen.sizes | given)
    drafter.check_target(target.model.config)
    target.check_drafter(drafter)
    drafter.start_from(target.norm_scale, target.head)
    return drafter.to(target.device)


def blank_drafter(method: str = "ctc", **sizes: Any) -> Callable[[PreTrainedConfig], TrainableDrafter]:
    """Makes an untrained drafter of a method for a target's config, to count it; sizes as in `fresh_drafter`."""
    chosen = trained_method(method)
    given = chosen.usual | chosen.sizes | {name: size for name, size in sizes.items() if size is not None}

    def make(config: PreTrainedConfig) -> TrainableDrafter:
        return chosen.drafter.for_target(config, **given)

    return make


def choose_vocabulary(drafter: TrainableDrafter, counts: torch.Tensor) -> None:
    """Lets a fresh drafter with a draft vocabulary draft the most frequent tokens; counts `int64 [T]`."""
    if isinstance(drafter, CTCDrafter) and drafter.config.draft_vocab_size:
        drafter.draft_only(most_frequent(counts, drafter.config.draft_vocab_size))
