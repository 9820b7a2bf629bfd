"""Models over several devices: offloaded layers, features and an LM head that lie elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ctc_drafter import Speculator, Target, UserError
from ctc_drafter.drafters.lm_head import Columns, draft_head, head_logits, narrow_head
from ctc_drafter.target.devices import reachable_from
from ctc_drafter.target.features import concatenate
from helpers import tiny_config, tiny_drafter, tiny_target

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
USUAL = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")


def offloaded(folder: Path, *parts: str) -> LlamaForCausalLM:
    """A model with these parts on disk, which accelerate loads for each forward."""
    pytest.importorskip("accelerate")
    tiny_target().model.save_pretrained(folder / "model")
    places = {part: "disk" if part in parts else "cpu" for part in (*PARTS, "model.rotary_emb")}
    options = {"device_map": places, "offload_folder": folder / "offloaded"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", **options).eval()


@pytest.mark.parametrize("parts", [PARTS[2:3], PARTS[1:5], PARTS[2:]], ids=["a layer", "all layers", "and the head"])
def test_offloaded_layers_decode_exactly(tmp_path: Path, parts: tuple[str, ...]) -> None:
    model, target = offloaded(tmp_path, *parts), tiny_target()
    plain = target.model.generate(IDS, **USUAL)
    assert any(weight.is_meta for weight in model.parameters())
    fast = Speculator(model, tiny_drafter(target), nodes=8, min_probability=0.0)
    assert torch.equal(fast.generate(IDS, **USUAL), plain)


def test_an_offloaded_embedding_is_one_line(tmp_path: Path) -> None:
    model = offloaded(tmp_path, PARTS[0])
    with pytest.raises(UserError, match="the embedding of LlamaForCausalLM is offloaded; give a device_map"):
        Target.wrap(model)


def test_a_model_without_weights_is_one_line() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    with pytest.raises(UserError, match="no weights yet, only shapes"):
        Target.wrap(model)


def test_features_of_several_devices_come_together() -> None:
    with FakeTensorMode():
        outputs = {0: torch.empty(1, 2, 4, device="cuda:0"), 1: torch.empty(1, 2, 4, device="cuda:1")}
        for wanted in ("cuda:0", "cuda:1"):
            found = concatenate(outputs, (0, 1), torch.device(wanted))
            assert found is not None
            assert (found.shape, str(found.device)) == ((1, 2, 8), wanted)


class Head(torch.nn.Module):
    """As an LM head on a second GPU: it takes nothing that lies elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(5, 8, device="cuda:1"))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        assert states.device == self.weight.device
        return states.new_empty(len(states), 5)


def test_a_head_on_another_device_is_called_from_here() -> None:
    home = torch.device("cuda:0")
    with FakeTensorMode():
        states, head = torch.empty(3, 8, device=home), Head()
        with pytest.raises(AssertionError):
            head(states)
        called = reachable_from(home, head)
        for each in (called, draft_head(called)):
            assert head_logits(each, states).device == home
        # Weights cannot be sliced where they are: columns of the output are chosen.
        assert isinstance(narrow_head(called, torch.tensor([0, 2])), Columns)
        assert reachable_from(torch.device("cuda:1"), head) is head


def test_one_device_has_the_target_s_own_modules() -> None:
    target = tiny_target()
    assert target.draft_modules == (target.embed, target.head)


@pytest.mark.gpu
def test_a_model_over_a_cpu_and_a_gpu_decodes_exactly() -> None:
    """Both compute: the first layers with the embedding on the CPU, the others and the head on the GPU."""
    from accelerate import dispatch_model

    target = tiny_target()
    plain = target.model.generate(IDS, **USUAL)
    drafter = tiny_drafter(target)
    places = {part: "cuda:0" if part in PARTS[3:] else "cpu" for part in (*PARTS, "model.rotary_emb")}
    model = dispatch_model(copy.deepcopy(target.model), places, main_device="cpu")
    assert {weight.device.type for weight in model.parameters()} == {"cpu", "cuda"}
    fast = Speculator(model, drafter, nodes=8, min_probability=0.0)
    assert torch.equal(fast.generate(IDS, **USUAL), plain)
