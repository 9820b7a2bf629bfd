"""Lossless speculative decoding for Hugging Face causal LMs with a one-pass CTC drafter.

    from ctc_drafter import Speculator

    fast = Speculator(model, folder_or_hub_id)
    fast.generate(**inputs)

Public names are imported when they are first used, so that `ctc-drafter --help` need not wait for PyTorch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# Three lists of the same names, for type checkers, for `import *`, and for `__getattr__`; a test compares them.

if TYPE_CHECKING:
    from ctc_drafter.decode.batch import DecodingConfig
    from ctc_drafter.decode.budget import Budget
    from ctc_drafter.decode.generate import Generation, generate, generate_many, plain_generate
    from ctc_drafter.decode.hf import speculate
    from ctc_drafter.decode.profile import budget_for
    from ctc_drafter.decode.sampling import Greedy, Sampled, warpers
    from ctc_drafter.decode.stats import Stats
    from ctc_drafter.drafters.base import NoDrafter
    from ctc_drafter.drafters.baselines.ctc_variants import LinearCTCConfig, LinearCTCDrafter, PaperConfig, PaperDrafter
    from ctc_drafter.drafters.baselines.dflash import DFlashConfig, DFlashDrafter, DSparkConfig, DSparkDrafter
    from ctc_drafter.drafters.baselines.dflash2 import DFlash2Config, DFlash2Drafter
    from ctc_drafter.drafters.baselines.eagle import EagleConfig, EagleDrafter
    from ctc_drafter.drafters.baselines.eagle3 import Eagle3Config, Eagle3Drafter
    from ctc_drafter.drafters.baselines.heads import MedusaConfig, MedusaDrafter
    from ctc_drafter.drafters.baselines.hydra import HydraConfig, HydraDrafter
    from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig
    from ctc_drafter.drafters.prompt_lookup import PromptLookup
    from ctc_drafter.drafters.warm_start import AutoDrafter
    from ctc_drafter.speculator import Speculator
    from ctc_drafter.target.model import Target
    from ctc_drafter.types import UserError

    __version__: str

__all__ = [
    "AutoDrafter",
    "Budget",
    "CTCDrafter",
    "CTCDrafterConfig",
    "DFlash2Config",
    "DFlash2Drafter",
    "DFlashConfig",
    "DFlashDrafter",
    "DSparkConfig",
    "DSparkDrafter",
    "DecodingConfig",
    "Eagle3Config",
    "Eagle3Drafter",
    "EagleConfig",
    "EagleDrafter",
    "Generation",
    "Greedy",
    "HydraConfig",
    "HydraDrafter",
    "LinearCTCConfig",
    "LinearCTCDrafter",
    "MedusaConfig",
    "MedusaDrafter",
    "NoDrafter",
    "PaperConfig",
    "PaperDrafter",
    "PromptLookup",
    "Sampled",
    "Speculator",
    "Stats",
    "Target",
    "UserError",
    "__version__",
    "budget_for",
    "generate",
    "generate_many",
    "plain_generate",
    "speculate",
    "warpers",
]

_HOMES = {
    "AutoDrafter": "drafters.warm_start",
    "Budget": "decode.budget",
    "CTCDrafter": "drafters.ctc",
    "CTCDrafterConfig": "drafters.ctc",
    "DFlash2Config": "drafters.baselines.dflash2",
    "DFlash2Drafter": "drafters.baselines.dflash2",
    "DFlashConfig": "drafters.baselines.dflash",
    "DFlashDrafter": "drafters.baselines.dflash",
    "DSparkConfig": "drafters.baselines.dflash",
    "DSparkDrafter": "drafters.baselines.dflash",
    "DecodingConfig": "decode.batch",
    "Eagle3Config": "drafters.baselines.eagle3",
    "Eagle3Drafter": "drafters.baselines.eagle3",
    "EagleConfig": "drafters.baselines.eagle",
    "EagleDrafter": "drafters.baselines.eagle",
    "Generation": "decode.generate",
    "Greedy": "decode.sampling",
    "HydraConfig": "drafters.baselines.hydra",
    "HydraDrafter": "drafters.baselines.hydra",
    "LinearCTCConfig": "drafters.baselines.ctc_variants",
    "LinearCTCDrafter": "drafters.baselines.ctc_variants",
    "MedusaConfig": "drafters.baselines.heads",
    "MedusaDrafter": "drafters.baselines.heads",
    "NoDrafter": "drafters.base",
    "PaperConfig": "drafters.baselines.ctc_variants",
    "PaperDrafter": "drafters.baselines.ctc_variants",
    "PromptLookup": "drafters.prompt_lookup",
    "Sampled": "decode.sampling",
    "Speculator": "speculator",
    "Stats": "decode.stats",
    "Target": "target.model",
    "UserError": "types",
    "budget_for": "decode.profile",
    "generate": "decode.generate",
    "generate_many": "decode.generate",
    "plain_generate": "decode.generate",
    "speculate": "decode.hf",
    "warpers": "decode.sampling",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ctc-drafter")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
