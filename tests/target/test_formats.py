"""Adapters and quantised formats as targets: loaded where their library is there, one line where it is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ctc_drafter import Speculator, Target, UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

# peft asks a model for a property that transformers has given another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
USUAL = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

# A checkpoint's format -> what its config.json says, the library that reads it, and what is to be installed.
INT8 = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}
FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"bits": 4, "group_size": 32}, "optimum", r"pip install optimum"),
    "awq": ({"bits": 4, "group_size": 32}, "gptqmodel", r"pip install gptqmodel"),
    "bitsandbytes": ({"load_in_4bit": True}, "bitsandbytes", r"pip install -U bitsandbytes"),
    "bitsandbytes, 8 bits": ({"load_in_8bit": True}, "bitsandbytes", r"pip install -U bitsandbytes"),
    "torchao": ({"quant_type": INT8}, "torchao", r"pip install 'ctc-drafter\[quant\]'"),
    "compressed-tensors": ({"config_groups": {}}, "compressed_tensors", r"pip install compressed-tensors"),
}
MISSING = [name for name, (_, library, _) in FORMATS.items() if importlib.util.find_spec(library) is None]


def quantised(folder: Path, name: str) -> None:
    """A folder whose configuration says that its weights are of this format."""
    tiny_target().model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": name.partition(",")[0], **FORMATS[name][0]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", MISSING)
def test_a_format_whose_library_is_missing_is_one_line(tmp_path: Path, name: str) -> None:
    quantised(tmp_path, name)
    method = name.partition(",")[0]
    with pytest.raises(UserError, match=f"is quantised by {method}, which cannot be loaded here: ") as caught:
        Target.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    caught.match(FORMATS[name][2])


def test_a_format_that_wants_a_gpu_is_not_called_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised(tmp_path, "awq")

    def refuse(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("GPU is required to run AWQ quantized model.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"quantised by awq, which cannot be loaded here: GPU is required"):
        Target.load(str(tmp_path))


# Adapters


def adapted(**options: Any) -> Any:
    """A `PeftModel` around a tiny Llama, whose adapter changes what it says."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(tiny_target().model, config).eval()


def test_a_peft_model_is_decoded_with_its_adapter() -> None:
    model, base = adapted(task_type="CAUSAL_LM"), tiny_target()
    plain = model.generate(input_ids=IDS, **USUAL)
    assert not torch.equal(plain, base.model.generate(IDS, **USUAL))
    for drafter in (ScriptedDrafter(plain.tolist(), (0, 3, 1, 4)), tiny_drafter(base)):
        for given in (model, Target.wrap(model)):
            assert torch.equal(Speculator(given, drafter, nodes=8).generate(IDS, **USUAL), plain)


def test_an_adapter_that_is_turned_off_or_merged() -> None:
    """What the layers compute at the time counts, as in stock `generate`."""
    model, base = adapted(), tiny_target()
    with_adapter, without = model.generate(input_ids=IDS, **USUAL), base.model.generate(IDS, **USUAL)
    fast = Speculator(model, tiny_drafter(base), nodes=8)
    with model.disable_adapter():
        assert torch.equal(fast.generate(IDS, **USUAL), without)
    assert torch.equal(fast.generate(IDS, **USUAL), with_adapter)
    merged = Speculator(model.merge_and_unload(), tiny_drafter(base), nodes=8)
    assert torch.equal(merged.generate(IDS, **USUAL), with_adapter)


def test_learnt_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="prompt tuning puts vectors before the text"):
        Speculator(peft.get_peft_model(tiny_target().model, config))
