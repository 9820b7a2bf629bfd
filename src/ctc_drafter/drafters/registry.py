"""Drafters by name: class of a method or saved config, and untrained drafters for a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctc_drafter.chat import fingerprint
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.copying import innermost
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.lm_head import most_frequent
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.trainable import TrainableDrafter
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

    def has(self, key: str) -> bool:
        """Whether its config has this key."""
        return key in self.drafter.config_class.__dataclass_fields__

    def with_usual(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes that were given, and the usual ones; what needs a predictor is usual where there is one."""
        usual = dict(self.usual)
        if 0 in (given.get("predictor_rank"), given.get("predictor_width")):
            usual.pop("joint_tokens", None)
        return {**usual, **self.sizes, **given}


TRAINED = {
    "ctc": Trained(
        "ctc",
        "CTCDrafter",
        "ctc_drafter",
        usual={
            "predictor_width": 512,
            "predictor_tied": True,
            "joint_tokens": 64,
            "joint_rank": 128,
            "carry": True,
            "carry_rank": 64,
            "carry_root": True,
            "copies": 16,
            "lookup_length": 15,
        },
    ),
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
    "dflash2": Trained(
        "baselines.dflash2", "DFlash2Drafter", "dflash2_drafter", training={"loss": "teacher", "loss_decay": 0.78}
    ),
    "dspark": Trained(
        "baselines.dflash", "DSparkDrafter", "dspark_drafter", training={"loss": "teacher", "loss_decay": 0.78}
    ),
    "eagle": Trained("baselines.eagle", "EagleDrafter", "eagle_drafter", training={"loss": "teacher"}),
}
# Read as their authors publish them, and not trained.
READ = {"eagle3": Trained("baselines.eagle3", "Eagle3Drafter", "eagle3_drafter")}
PROMPT_LOOKUP = "prompt_lookup"
FOR_ABLATIONS = frozenset({"ctc-linear"})  # parts of other methods, no method of their own


def trained_method(name: str) -> Trained:
    """Raises `UserError` for a method that is not known, or cannot be trained."""
    if name == PROMPT_LOOKUP:
        raise UserError(f"{name} has nothing to train; use --drafter {name}")
    if name in READ:
        raise UserError(f"{name} is read from published heads and not trained; use --method eagle, or --drafter FOLDER")
    if name not in TRAINED:
        raise UserError(f"unknown method {name}; known are {', '.join(TRAINED)}")
    return TRAINED[name]


def method_of(drafter: Drafter) -> str:
    """The name of a drafter's method, as results give it; copies that it was given do not count."""
    drafter = innermost(drafter)
    if isinstance(drafter, PromptLookup):
        return PROMPT_LOOKUP
    config = getattr(drafter, "config", None)
    fitting = [
        name
        for name, method in (TRAINED | READ).items()
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
    fitting = [method for method in (TRAINED | READ).values() if method.model_type == found]
    if not fitting:
        raise UserError(f"{name} holds no drafter but a model of type {found}; give the folder of a drafter")
    return fitting[0].drafter.from_pretrained(name)


def fresh_drafter(
    target: Target, tokenizer: PreTrainedTokenizerBase | None, seed: int, method: str = "ctc", **sizes: Any
) -> TrainableDrafter:
    """An untrained drafter for this target; sizes that are None are the config's. It starts from the target's weights,
    where it has like ones. Without a tokenizer it fits any, and the mask token is the config's."""
    chosen = READ.get(method) or trained_method(method)
    torch.manual_seed(seed)
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if tokenizer is not None:
        given.setdefault("target_fingerprint", fingerprint(tokenizer))
    if tokenizer is not None and chosen.has("mask_token_id"):
        fillers = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        given.setdefault("mask_token_id", next(token for token in fillers if token is not None))
    drafter = chosen.drafter.for_target(target.model.config, **chosen.with_usual(given))
    drafter.check_target(target.model.config)
    target.check_drafter(drafter)
    drafter.start_from(target.norm_scale, target.head, target.embed)
    return drafter.to(target.device)


def sizes_without_carry(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes that were given, None for not; where `carry` is off, what goes with it is off too, unless it was given."""
    given = {name: size for name, size in sizes.items() if size is not None}
    return {"carry_rank": 0, "carry_root": False} | given if given.get("carry") is False else given


def blank_drafter(method: str = "ctc", **sizes: Any) -> Callable[[PreTrainedConfig], TrainableDrafter]:
    """Makes an untrained drafter of a method for a target's config, to count it; sizes as in `fresh_drafter`."""
    chosen = trained_method(method)
    given = chosen.with_usual({name: size for name, size in sizes.items() if size is not None})

    def make(config: PreTrainedConfig) -> TrainableDrafter:
        return chosen.drafter.for_target(config, **given)

    return make


def choose_vocabulary(
    drafter: TrainableDrafter, counts: torch.Tensor, head: nn.Module, embed: nn.Module | None = None
) -> None:
    """Lets a fresh drafter with a draft vocabulary draft the most frequent tokens; counts `int64 [T]`; head: the
    target's LM head."""
    if isinstance(drafter, CTCDrafter) and drafter.config.draft_vocab_size:
        drafter.draft_only(most_frequent(counts, drafter.config.draft_vocab_size), head, embed)
