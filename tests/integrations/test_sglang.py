"""The SGLang plugin against stand-ins for the interfaces of SGLang 0.5.23 that it uses; no SGLang runs here."""

import json
import sys
from enum import Enum
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ctc_drafter.integrations.export import export
from ctc_drafter.integrations.settings import ARCHITECTURE
from ctc_drafter.types import UserError
from helpers import tiny_drafter, tiny_target


class StandInModel(nn.Module):
    """As `DFlashDraftModel`: weights by name, block outputs in `hidden_states`."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        self.loaded = {}

    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        return SimpleNamespace(hidden_states=forward_batch)

    def load_weights(self, weights):
        self.loaded = dict(weights)


class HookType(Enum):
    AROUND = "around"


class Registry:
    def __init__(self):
        self.hooks, self.models = {}, {}

    def register(self, target, hook, hook_type):
        assert hook_type is HookType.AROUND
        self.hooks[target.rsplit(".", 1)[1]] = hook


@pytest.fixture
def sglang(monkeypatch):
    """What the plugin, imported over the stand-ins, has registered."""
    registry = Registry()
    graph = SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(bs=[1, 3]))))
    contents = {
        "sglang.srt.models.dflash": {"DFlashDraftModel": StandInModel},
        "sglang.srt.models.registry": {"ModelRegistry": registry},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": registry, "HookType": HookType},
        "sglang.srt.runtime_context": {"get_exec": lambda: graph},
    }
    for name, things in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        module = ModuleType(name)
        vars(module).update(things)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ctc_drafter.integrations.sglang", raising=False)
    plugin = import_module("ctc_drafter.integrations.sglang")
    plugin.register()
    yield registry
    sys.modules.pop("ctc_drafter.integrations.sglang", None)


def worker_for(registry, folder, target, block=6):
    """A worker whose draft model was loaded from an exported folder."""
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    model = registry.models[config.architectures[0]](config)
    model.load_weights(load_file(folder / "model.safetensors").items())
    lm = SimpleNamespace(lm_head=target.model.lm_head, get_input_embeddings=target.model.get_input_embeddings)
    runner = SimpleNamespace(model_runner=SimpleNamespace(model=lm))
    return SimpleNamespace(draft_model=model, target_worker=runner, block_size=block)


@torch.no_grad()
def test_the_head_gets_roots_and_frames_of_each_block(sglang, tmp_path):
    registry = sglang
    target = tiny_target()
    drafter = tiny_drafter(target, predictor_rank=4, predictor_width=6, mask_token_id=5)
    export(drafter, target.config, "some/target", tmp_path / "out", width=8)
    worker = worker_for(registry, tmp_path / "out", target)
    assert {name.split(".")[0] for name in worker.draft_model.loaded} == {"fc", "hidden_norm", "layers", "norm"}

    blocks, roots = torch.randn(2, 6, 64), torch.tensor([7, 42])
    expected = worker.draft_model.ctc.chains(blocks, roots, target.head(blocks[:, 1:]), target.embed)
    assert expected.unique().numel() > 5, "drafts that differ"
    ids = torch.full((2, 6), 5)
    ids[:, 0] = roots
    sampler = registry.hooks["_maybe_build_draft_sampler"](None, worker)
    sampler(blocks.flatten(0, 1), ids.flatten())
    assert sampler.out.shape == (15,)
    assert sampler.out[:10].view(2, 5).tolist() == expected.tolist()

    worker.draft_model(ids.flatten(), None, blocks.flatten(0, 1))
    frames = blocks[:, 1:].flatten(0, 1)
    eager = registry.hooks["_greedy_sample_from_vocab_parallel_head"](None, worker, hidden_states=frames, lm_head=None)
    assert eager.view(2, 5).tolist() == expected.tolist()


def test_other_drafters_are_left_alone(sglang):
    registry = sglang
    worker = SimpleNamespace(draft_model=object())
    assert registry.hooks["_maybe_build_draft_sampler"](lambda _: "theirs", worker) == "theirs"
    sample = registry.hooks["_greedy_sample_from_vocab_parallel_head"]
    assert sample(lambda _, hidden_states: hidden_states, worker, hidden_states="theirs") == "theirs"


def test_what_cannot_work_is_refused(sglang, tmp_path):
    registry = sglang
    target = tiny_target()
    drafter = tiny_drafter(target, mask_token_id=5)
    export(drafter, target.config, "some/target", tmp_path / "out", width=8)
    build = registry.hooks["_maybe_build_draft_sampler"]
    with pytest.raises(UserError, match="--speculative-num-draft-tokens 6"):
        build(None, worker_for(registry, tmp_path / "out", target, block=16))
    worker = worker_for(registry, tmp_path / "out", target)
    worker.target_worker.model_runner.model.lm_head = SimpleNamespace(weight=torch.zeros(50, 64))
    with pytest.raises(UserError, match="without tensor parallelism"):
        build(None, worker)
    worker.target_worker.model_runner.model.lm_head = SimpleNamespace()
    with pytest.raises(UserError, match="quantised"):
        build(None, worker)
    export(tiny_drafter(target, carry=True), target.config, "some/target", tmp_path / "carry", width=8)
    with pytest.raises(UserError, match="--no-carry"):
        worker_for(registry, tmp_path / "carry", target)
    assert ARCHITECTURE in registry.models
