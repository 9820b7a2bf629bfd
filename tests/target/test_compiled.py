"""Compiled targets say what the others say, plain steps and trees, rows and lengths."""

import pytest
import torch

from benchmarks.families import family_model
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.profile import grid, key
from ctc_drafter.target import compiled
from ctc_drafter.target.cache import BLOCK
from ctc_drafter.target.compiled import MANY, SIZES, CompiledTarget, compile_target, compile_whole, size_for
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import VOCABULARY, ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]


pytestmark = pytest.mark.usefixtures("quiet_tracing")


def text(count: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def check(target: Target, made: CompiledTarget, prompts: list[list[int]], new: int, nodes: int = 16) -> None:
    expected = plain_generate(target, prompts, max_new_tokens=new).tokens
    assert plain_generate(made, prompts, max_new_tokens=new).tokens == expected
    scripts = [p + t for p, t in zip(prompts, expected, strict=True)]
    for drafter in (ScriptedDrafter(scripts, (4, 0, 3)), tiny_drafter(target)):
        assert generate(made, drafter, prompts, max_new_tokens=new, nodes=nodes).tokens == expected


@pytest.mark.slow
def test_outputs_are_plain_decodings_and_a_graph_serves_all_lengths():
    """One text crosses the first block of slots; rows leave."""
    target = tiny_target(max_position_embeddings=512, num_hidden_layers=2)
    drafter = tiny_drafter(target)
    made = compile_whole(target, drafter.feature_layers, "eager")
    made.prepare(8, 3)
    known = set(made.graphs)
    assert {(shape.rows, shape.tokens) for shape in known} == {(rows, n) for rows in (1, MANY) for n in SIZES[:3]}
    check(target, made, [text(BLOCK - 6), *PROMPTS[:2]], 14, nodes=8)
    assert set(made.graphs) == known


@pytest.mark.slow
def test_features_and_logits_are_the_targets():
    target = tiny_target(num_hidden_layers=2)
    made = compile_whole(target, backend="eager")
    found = []
    for each in (target, made):
        cache = each.new_cache(4)
        slots = torch.arange(5)[None]
        each.forward(torch.tensor([text(5)]), slots, cache, keep=torch.tensor([4]))
        positions = torch.tensor([[5, 6, 6]])
        seen = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
        allowed = torch.cat([torch.ones(1, 3, 5, dtype=torch.bool), seen], 2)
        arguments = (torch.tensor([[7, 8, 9]]), positions, cache, allowed, torch.cat([slots, positions], 1))
        found.append(each.forward(*arguments, (0, 1)))
        assert cache.get_seq_length() == 8
    torch.testing.assert_close(found[1].logits, found[0].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].features, found[0].features, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Mistral, sliding", "Gemma 3", "GPT-2", "OPT"])
def test_families(family):
    target = Target(family_model(family))
    prompts = (
        [text(40), *PROMPTS[:2]] if family == "Gemma 3" else [text(40)]
    )  # other rows take other graphs, in seconds
    check(target, compile_whole(target, backend="aot_eager"), prompts, 16, nodes=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_code_says_what_the_model_says():
    """The whole way, with packed weights."""
    target = tiny_target(max_position_embeddings=512, num_hidden_layers=2)
    drafter = tiny_drafter(target)
    check(target, compile_whole(target, drafter.feature_layers), [text(BLOCK - 6), *PROMPTS[:2]], 14, nodes=4)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_refused():
    def broken(_graph, _inputs):
        raise RuntimeError("no compiler here")

    with pytest.raises(
        UserError, match=r"LlamaForCausalLM cannot be compiled \(no compiler here\); leave out --compile"
    ):
        compile_target(tiny_target(num_hidden_layers=1), backend=broken)
    with pytest.raises(UserError, match="make it with compile_target"):
        CompiledTarget.wrap(tiny_target(num_hidden_layers=1).model)


def test_times_of_compiled_steps_are_kept_apart():
    target = tiny_target(num_hidden_layers=1)
    drafter = tiny_drafter(target)
    static = Target(target.model, "static")
    assert key(CompiledTarget(target.model), drafter, (1,), (1,)) != key(static, drafter, (1,), (1,))


@pytest.mark.slow
def test_where_sizes_are_fixed_each_has_a_graph_of_its_own(monkeypatch):
    """As for CUDA graphs: a text that outgrows its cache, and other numbers of rows, get new graphs."""
    monkeypatch.setattr(compiled, "sizes_are_fixed", lambda _: True)
    target = tiny_target(max_position_embeddings=1024, num_hidden_layers=1)
    made = compile_whole(target, backend="eager")
    check(target, made, [text(BLOCK - 6)], 14)
    check(target, made, PROMPTS, 6)
    assert {shape.slots for shape in made.graphs} >= {BLOCK, 2 * BLOCK}
    assert 3 in {shape.rows for shape in made.graphs}


def test_times_are_measured_at_both_ends_of_every_graph():
    """So that a line between neighbours is level where one graph serves all, and steep where the next one begins."""
    assert CompiledTarget.profile_sizes == (1, 4, 5, 8, 9, 16, 17, 32, 33, 64)
    assert all(size_for(low + 1) == size_for(high + 1) for low, high in ((1, 4), (5, 8), (9, 16), (17, 32), (33, 64)))
    made = CompiledTarget(tiny_target().model)
    assert grid(made, 12, 1)[0] == (1, 4, 5, 8, 9, 12)
    assert grid(tiny_target(), 12, 1)[0] == (1, 2, 4, 8, 12)


def test_sizes():
    assert [size_for(tokens) for tokens in (1, 2, 5, 6, 65, 66)] == [1, 5, 5, 9, 65, 65]
