"""Lossless speculative decoding for Hugging Face causal LMs with a one-pass CTC drafter.

    from ctc_drafter import CTCDrafter, speculate

    drafter = CTCDrafter.from_pretrained(folder_or_hub_id)
    model.generate(**inputs, custom_generate=speculate(drafter))

Public names are imported when they are first used, so that `ctc-drafter --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctc_drafter.decode.generate import Generation, generate, generate_many, plain_generate
    from ctc_drafter.decode.hf import speculate
    from ctc_drafter.decode.sampling import Sampled, warpers
    from ctc_drafter.decode.stats import Stats
    from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig
    from ctc_drafter.target.model import Target
    from ctc_drafter.types import UserError

__all__ = [
    "CTCDrafter",
    "CTCDrafterConfig",
    "Generation",
    "Sampled",
    "Stats",
    "Target",
    "UserError",
    "generate",
    "generate_many",
    "plain_generate",
    "speculate",
    "warpers",
]

_HOMES = {
    "CTCDrafter": "drafters.ctc",
    "CTCDrafterConfig": "drafters.ctc",
    "Generation": "decode.generate",
    "Sampled": "decode.sampling",
    "Stats": "decode.stats",
    "Target": "target.model",
    "UserError": "types",
    "generate": "decode.generate",
    "generate_many": "decode.generate",
    "plain_generate": "decode.generate",
    "speculate": "decode.hf",
    "warpers": "decode.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
