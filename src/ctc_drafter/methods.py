"""The drafters by name: which class a method or a saved config stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.lookup import PromptLookup
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.types import UserError


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
    "ctc-linear": Trained("linear", "LinearCTCDrafter", "ctc_linear_drafter"),
    "ctc-paper": Trained("paper", "PaperDrafter", "ctc_paper_drafter"),
    "medusa": Trained("medusa", "MedusaDrafter", "medusa_drafter"),
    "hydra": Trained("hydra", "HydraDrafter", "hydra_drafter", training={"loss_decay": 1.0}),
    "hydra++": Trained(
        "hydra",
        "HydraDrafter",
        "hydra_drafter",
        {"prefix_attention": True, "num_hidden_layers": 4},
        {"loss": "teacher", "loss_decay": 1.0},
    ),
    "dflash": Trained("dflash", "DFlashDrafter", "dflash_drafter", training={"loss_decay": 0.78}),
    "dspark": Trained("dspark", "DSparkDrafter", "dspark_drafter", training={"loss": "teacher", "loss_decay": 0.78}),
    "eagle": Trained("eagle", "EagleDrafter", "eagle_drafter", training={"loss": "teacher"}),
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


def open_drafter(name: str) -> Drafter:
    """A saved drafter, of the class that its config names, or `prompt_lookup`. Raises `UserError` for others."""
    if name == PROMPT_LOOKUP and not Path(name).is_dir():
        return PromptLookup()
    try:
        found = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no drafter could be loaded from {name}: {reason}") from error
    fitting = [method for method in TRAINED.values() if method.model_type == found]
    if not fitting:
        raise UserError(f"{name} holds no drafter but a model of type {found}; give the folder of a drafter")
    return fitting[0].drafter.from_pretrained(name)
