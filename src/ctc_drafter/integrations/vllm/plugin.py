"""vLLM plugin: registers our model and config format in each vLLM process.

After that `vllm serve FOLDER` works for a folder that `ctc-drafter export` wrote. Written for vLLM 0.32; 0.28 and later
have the same interfaces.
"""

from __future__ import annotations

from typing import Any

from ctc_drafter.integrations.settings import ARCHITECTURE, FORMAT


def register() -> None:
    """Registers the model and the config format; may be called again."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.transformers_utils.configs.speculators.algos import register_speculator

    ModelRegistry.register_model(ARCHITECTURE, "ctc_drafter.integrations.vllm.model:DFlashCTCForCausalLM")
    register_speculator(FORMAT)(update_config)
    run_as_dflash()
    if current_platform.is_cpu():
        from ctc_drafter.integrations.vllm.cpu import patch_cpu_sampling

        patch_cpu_sampling()


def update_config(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Turns an exported config into that of a DFlash model with our head; see vLLM's `register_speculator`."""
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    SUPPORTED_SPECULATORS_TYPES["dflash"](config_dict=config_dict, pre_trained_config=pre_trained_config)
    pre_trained_config["architectures"] = [ARCHITECTURE]
    pre_trained_config["ctc_config"] = config_dict["ctc_config"]


def run_as_dflash() -> None:
    """Lets `vllm serve FOLDER` choose the method that runs our drafters, and the flag without which it bypasses CTC.

    vLLM takes the method from the config's format, and knows its own exceptions only.
    """
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    original = SpeculatorsConfig.build_vllm_speculative_config
    if getattr(original, "knows_ctc", False):
        return

    def build(config_dict: dict[str, Any]) -> dict[str, Any]:
        result = dict(original(config_dict=config_dict))
        if config_dict.get("speculators_model_type") == FORMAT:
            result |= {"method": "dflash", "use_local_argmax_reduction": True}
        return result

    build.knows_ctc = True  # type: ignore[attr-defined]
    SpeculatorsConfig.build_vllm_speculative_config = staticmethod(build)
