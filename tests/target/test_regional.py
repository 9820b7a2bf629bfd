"""Decoder layers that share their code say what the model says, for any number of rows, tokens and slots."""

import logging
import os
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch.compiler.config
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers.pytorch_utils import Conv1D

from benchmarks.families import family_model
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.files import CACHE as FOLDER
from ctc_drafter.target import compiled, regional
from ctc_drafter.target.compiled import CompiledTarget, RegionalTarget, compile_target
from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.target.model import Target
from ctc_drafter.target.opaque import Blocks, OpaqueLinear, can_replace, opaque_twin
from ctc_drafter.target.packed import PackedLinear, pack
from ctc_drafter.target.regional import NotRegionalError, bind, making_graphs, unlike_others
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]

pytestmark = pytest.mark.usefixtures("quiet_tracing")


class Counting:
    """A backend that compiles nothing and counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph


def tree(target: Target, nodes: int, rows: int = 1, layers: tuple[int, ...] = ()):
    """Logits and features of chains of nodes behind five tokens, and of the token after them."""
    cache = target.new_cache(8)
    slots = torch.arange(5).expand(rows, -1)
    target.forward(torch.arange(5 * rows).view(rows, 5), slots, cache, keep=torch.tensor([4]))
    positions = torch.arange(5, 5 + nodes).expand(rows, -1)
    seen = torch.ones(rows, nodes, 5 + nodes, dtype=torch.bool).tril(5)
    tokens = torch.arange(rows * nodes).view(rows, nodes) + 7
    found = target.forward(tokens, positions, cache, seen, torch.cat([slots, positions], 1), layers)
    after = target.forward(tokens[:, -1:], positions[:, -1:] + 1, cache)
    return found.logits, found.features, after.logits


def check_steps(target: Target, made: CompiledTarget, rows: int = 1) -> None:
    """Twice each: by guards, and by what they chose."""
    for nodes in (1, 4, 4, 7):
        for mine, other in zip(tree(made, nodes, rows, (0, 1)), tree(target, nodes, rows, (0, 1)), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_one_graph_serves_all_layers_tokens_and_slots():
    target, backend = tiny_target(max_position_embeddings=1024), Counting()
    made = compile_target(target, backend=backend)
    assert type(made) is RegionalTarget
    assert backend.graphs == 2  # of one token and of several, for three layers
    check_steps(target, made)
    long = [[5, 6, 7] * 85]  # crosses the first block of slots
    expected = plain_generate(target, long, max_new_tokens=6).tokens
    assert plain_generate(made, long, max_new_tokens=6).tokens == expected
    assert len({slots for *_, slots in made.regions.bound}) == 3  # those of the trial, and two blocks
    assert backend.graphs == 2


@pytest.mark.slow
def test_rows_share_a_graph():
    target, backend = tiny_target(num_hidden_layers=2), Counting()
    made = compile_target(target, backend=backend)
    made.prepare(4, 3)
    assert backend.graphs == 4
    for rows in (1, 2, 3):
        check_steps(target, made, rows)
    expected = plain_generate(target, PROMPTS, max_new_tokens=12).tokens
    scripts = [p + t for p, t in zip(PROMPTS, expected, strict=True)]
    for drafter in (ScriptedDrafter(scripts, (4, 0, 3)), tiny_drafter(target)):
        assert generate(made, drafter, PROMPTS, max_new_tokens=12, nodes=8).tokens == expected
    assert backend.graphs == 4


FAMILIES = {
    "Qwen2": 1,
    "Qwen3": 1,
    "Mistral, sliding": 1,
    "Gemma 2, soft caps": 1,
    "Gemma 3": 1,
    "Phi-3": 1,
    "GPT-2": 1,
    "OPT": 1,
    "Mixtral": 1,
    "Cohere 2": 2,  # layers with and without positions
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    target, backend = Target(family_model(family)), Counting()
    made = compile_target(target, backend=backend)
    assert type(made) is RegionalTarget
    assert backend.graphs == 2 * FAMILIES[family]
    check_steps(target, made)
    expected = plain_generate(target, PROMPTS[:1], max_new_tokens=12).tokens
    drafter = ScriptedDrafter([PROMPTS[0] + expected[0]], (4, 0, 3))
    assert generate(made, drafter, PROMPTS[:1], max_new_tokens=12, nodes=8).tokens == expected
    assert backend.graphs == 2 * FAMILIES[family]


def test_the_model_and_all_settings_stay_as_they_were(monkeypatch):
    import torch._dynamo.package  # sets the variable

    monkeypatch.delenv(regional.CACHE, raising=False)
    target = tiny_target(num_hidden_layers=1)
    pack(target.model)
    modules = {name: (type(each), set(vars(each))) for name, each in target.model.named_modules()}
    settings = torch._dynamo.config.get_config_copy(), torch.compiler.config.get_config_copy()
    environment, attention = dict(os.environ), regional.sdpa.is_torchdynamo_compiling
    made = compile_target(target, backend="eager")
    tree(made, 3)
    assert {name: (type(each), set(vars(each))) for name, each in target.model.named_modules()} == modules
    assert (torch._dynamo.config.get_config_copy(), torch.compiler.config.get_config_copy()) == settings
    assert dict(os.environ) == environment
    assert regional.sdpa.is_torchdynamo_compiling is attention
    weights = {id(weight) for weight in target.model.parameters()}
    assert {id(weight) for weight in made.regions.model.parameters()} == weights


def test_code_lies_in_the_cache_folder_unless_its_place_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv(regional.CACHE, raising=False)
    with making_graphs(torch.device("cpu"), single=False):
        assert os.environ[regional.CACHE] == str(tmp_path / "compiled")
    assert regional.CACHE not in os.environ
    usual = str(Path(default_cache_dir()).absolute())
    monkeypatch.setenv(regional.CACHE, usual)  # by PyTorch
    with making_graphs(torch.device("cpu"), single=False):
        assert os.environ[regional.CACHE] == str(tmp_path / "compiled")
    assert os.environ[regional.CACHE] == usual
    monkeypatch.setenv(regional.CACHE, "elsewhere")
    with making_graphs(torch.device("cpu"), single=False):
        assert os.environ[regional.CACHE] == "elsewhere"
    assert os.environ[regional.CACHE] == "elsewhere"


def untraceable(block: nn.Module) -> None:
    """Has a layer do what no graph can hold."""
    usual = block.mlp.forward

    def forward(states: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return usual(states)

    block.mlp.forward = forward


@pytest.mark.slow
def test_what_has_no_regions_is_compiled_whole(caplog):
    target = tiny_target(num_hidden_layers=2)
    pack(target.model)
    untraceable(decoder_blocks(target.model)[1])
    with caplog.at_level(logging.INFO, logger=compiled.LOG.name):
        made = compile_target(target, backend="eager")
    assert "compiling the target whole, not layer by layer: LlamaForCausalLM" in caplog.text
    assert type(made) is CompiledTarget
    assert not any(isinstance(module, PackedLinear) for module in target.model.modules())
    check_steps(target, made)


def test_layers_that_count_otherwise_than_the_cache_have_no_regions():
    target = tiny_target(num_hidden_layers=2)
    decoder_blocks(target.model)[1].self_attn.layer_idx = 0
    with pytest.raises(NotRegionalError, match="layer 1 counts itself as 0"):
        RegionalTarget(target.model, backend="eager").regions  # noqa: B018


def test_layers_with_a_forward_of_their_own_have_no_regions():
    """As accelerate gives them one to fetch their weights."""
    target = tiny_target(num_hidden_layers=2)
    block = decoder_blocks(target.model)[1]
    block.forward = block.forward
    with pytest.raises(NotRegionalError, match="layer 1 has a forward"):
        RegionalTarget(target.model, backend="eager").regions  # noqa: B018


def test_a_missing_compiler_is_said_at_once(monkeypatch):
    def none(_graph, _inputs):
        raise compiled.InvalidCxxCompiler

    monkeypatch.setattr(compiled, "compile_whole", lambda *_: pytest.fail("it would miss it, too"))
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be compiled \(.*leave out --compile"):
        compile_target(tiny_target(num_hidden_layers=1), backend=none)


def test_only_what_is_given_or_the_layers_own_may_be_read():
    """A tensor from elsewhere could be another one at the next call."""
    layer, states = nn.Linear(4, 4), torch.ones(1, 4)
    given = {"args": ({"states": [states]},), "kwargs": {}}
    result = torch.zeros(1, 4)
    bound = bind(lambda *_: (result,), (layer.weight, states, 1), (result,), layer, given, result)
    assert bound.moves == ((1, ("args", 0, "states", 0)),)
    assert bound(given) is result
    with pytest.raises(NotRegionalError, match="not among their arguments"):
        bind(lambda *_: (result,), (layer.weight, torch.ones(1)), (result,), layer, given, result)
    with pytest.raises(NotRegionalError, match="return more than tensors"):
        bind(lambda *_: (result,), (states,), (result,), layer, given, (result, 7))


def test_trial_sizes_are_unlike_all_others():
    model = tiny_target(hidden_size=55, intermediate_size=11, num_attention_heads=5, num_key_value_heads=5).model
    assert unlike_others(model, [torch.zeros(1, 5, 67, 16)]) == (7, 13, 69)


def test_threads_may_make_the_same_graph():
    target, backend = tiny_target(num_hidden_layers=2), Counting()
    made = compile_target(target, backend=backend)
    expected, found = tree(target, 6)[0], []
    threads = [threading.Thread(target=lambda: found.append(tree(made, 6)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert all(len(parts) == 2 for parts in made.regions.bound.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@torch.inference_mode()
def test_opaque_products_are_those_of_a_linear_layer(kind, dtype):
    torch.manual_seed(0)
    layer = (nn.Linear(32, 48) if kind is nn.Linear else Conv1D(48, 32)).to(dtype)
    if not can_replace(layer):
        pytest.skip("this CPU does not pack bfloat16")
    opaque, close = OpaqueLinear.of(layer), {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    for shape in ((1, 32), (2, 9, 32)):
        states = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(opaque(states), layer(states), **close)


def test_a_twin_shares_what_is_packed_already():
    model = tiny_target(num_hidden_layers=1).model
    pack(model)
    twin = opaque_twin(model)
    assert isinstance(twin.lm_head, OpaqueLinear)
    assert twin.lm_head.blocks.tensor is model.lm_head.blocks
    assert twin.lm_head.weight is model.lm_head.weight
    assert twin.config is model.config


def test_layers_of_other_kinds_are_not_replaced():
    class Other(nn.Linear):
        pass

    assert not can_replace(Other(4, 4))
    assert not can_replace(nn.Linear(4, 4, dtype=torch.float64))
    assert not can_replace(nn.LayerNorm(4))
    assert isinstance(Blocks.of(torch.ones(4, 4)), Blocks)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_code_is_kept_for_the_next_run(monkeypatch, tmp_path):
    """The whole way, with inductor: right, and read from the disk by the next target of the same kind."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv(regional.CACHE, raising=False)
    target = tiny_target(num_hidden_layers=2)
    for seed, (misses, hits) in enumerate([(2, 0), (0, 2)]):
        counters.clear()
        made = compile_target(tiny_target(seed, num_hidden_layers=2))
        assert type(made) is RegionalTarget
        found = counters["inductor"]
        assert (found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]) == (misses, hits)
        assert not found["fxgraph_cache_bypass"]
    made = compile_target(target)
    check_steps(target, made)
    assert any((tmp_path / "compiled").iterdir())
