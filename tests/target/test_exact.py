"""Exact steps: trees and batches write, bit for bit, what plain steps write, in bfloat16 too."""

import pytest
import torch

from benchmarks.families import family_model
from ctc_drafter.decode.generate import generate, plain_generate, plain_generate_many
from ctc_drafter.target import exact
from ctc_drafter.target.exact import SIZES, TILE, ExactTarget, exact_target, linear
from ctc_drafter.target.exact_attention import FAR, NEAR, attention, order_of
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

NEW = 40


def near_ties(**overrides) -> Target:
    """A tiny target in bfloat16 whose best tokens are often close to each other, as a real one's are."""
    torch.manual_seed(3)
    return Target.wrap(tiny_target(max_position_embeddings=2048, vocab_size=97, **overrides).model.to(torch.bfloat16))


def prompts(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]


def test_attention_is_that_of_the_kernel_and_does_not_depend_on_slots():
    """A path of a tree as nodes among others, and the same tokens as plain text."""
    generator = torch.Generator().manual_seed(0)
    for length in (5, NEAR - 2, 2 * NEAR - 1, 3 * NEAR + 5, FAR + 2 * NEAR + 3):
        keys, values = (torch.randn(1, 2, length + 8, 16, generator=generator) for _ in range(2))
        queries = torch.randn(1, 4, 8, 16, generator=generator)
        path = [0, 3, 4, 7]
        positions = length + torch.tensor([[0, 1, 1, 1, 2, 1, 2, 3]])
        allowed = torch.zeros(1, 8, length + 8, dtype=torch.bool)
        allowed[:, :, :length] = True
        for depth, node in enumerate(path):
            allowed[0, node, [length + each for each in path[: depth + 1]]] = True
        for node in (1, 2, 5, 6):
            allowed[0, node, length + node] = True
        cached = torch.arange(length).unsqueeze(0)
        tree = attended(queries, keys, values, allowed, positions, torch.cat([cached, positions], 1))
        mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)
        kernel = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(tree, kernel, rtol=1e-4, atol=1e-5)
        slots = [*range(length), *(length + node for node in path)]
        for depth, node in enumerate(path):
            own = slots[: length + depth + 1]
            places = torch.arange(len(own)).unsqueeze(0)
            seen = torch.ones(1, 1, len(own), dtype=torch.bool)
            plain = attended(
                queries[:, :, node : node + 1], keys[:, :, own], values[:, :, own], seen, places[:, -1:], places
            )
            assert torch.equal(plain[:, :, 0], tree[:, :, node]), (length, depth)


def attended(queries, keys, values, allowed, positions, key_positions):
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)
    order = order_of(allowed, positions, key_positions)
    return attention(queries, keys, values, mask, 0.25, order)


def test_products_take_known_sizes_only(monkeypatch):
    taken, real = [], exact.multiplied
    monkeypatch.setattr(exact, "multiplied", lambda rows, *rest: taken.append(len(rows)) or real(rows, *rest))
    weight, bias = torch.randn(5, 8), torch.randn(5)
    for count, sizes in ((1, [4]), (4, [4]), (5, [TILE]), (2 * TILE + 3, [TILE, TILE, 4])):
        states = torch.randn(count, 1, 8)
        taken.clear()
        torch.testing.assert_close(linear((4, TILE), states, weight, bias), real(states, weight, bias))
        assert taken == sizes


@pytest.mark.sparing
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trees_and_batches_write_what_plain_steps_of_one_row_write(dtype):
    target = exact_target(near_ties() if dtype == "bfloat16" else tiny_target(max_position_embeddings=2048))
    assert TILE in target.sizes
    texts = prompts([3, 2 * NEAR - 9, 2 * NEAR + 40])
    options = {"max_new_tokens": NEW, "eos": ()}
    expected = [plain_generate(target, [text], **options).tokens[0] for text in texts]
    assert plain_generate(target, texts, **options).tokens == expected
    assert dict(plain_generate_many(target, texts, in_flight=2, **options)) == dict(enumerate(expected))
    scripts = [text + answer for text, answer in zip(texts, expected, strict=True)]
    for drafter in (ScriptedDrafter(scripts, (4, 0, 3)), tiny_drafter(target)):
        assert generate(target, drafter, texts, nodes=16, **options).tokens == expected
    assert generate(target, ScriptedDrafter(scripts[2:], 6), texts[2:], nodes=9, **options).tokens == expected[2:]


@pytest.mark.slow
def test_without_it_some_answers_differ():
    """The test above can fail: the same in bfloat16 as it is."""
    target, texts = near_ties(), prompts(range(3, 15))
    options = {"max_new_tokens": NEW, "eos": ()}
    expected = [plain_generate(target, [text], **options).tokens[0] for text in texts]
    scripts = [text + answer for text, answer in zip(texts, expected, strict=True)]
    assert generate(target, ScriptedDrafter(scripts, (4, 0, 3)), texts, nodes=16, **options).tokens != expected
    mine = exact_target(target)
    expected = [plain_generate(mine, [text], **options).tokens[0] for text in texts]
    scripts = [text + answer for text, answer in zip(texts, expected, strict=True)]
    assert generate(mine, ScriptedDrafter(scripts, (4, 0, 3)), texts, nodes=16, **options).tokens == expected


@pytest.mark.parametrize("family", ["Mistral, sliding", "Gemma 3", "Mixtral"])
def test_other_families(family):
    model = family_model(family).to(torch.bfloat16)
    target = exact_target(Target(model))
    texts = [[1 + n % 50 for n in range(count)] for count in (4, 30)]
    expected = [plain_generate(target, [text], max_new_tokens=16, eos=()).tokens[0] for text in texts]
    scripts = [text + answer for text, answer in zip(texts, expected, strict=True)]
    drafter = ScriptedDrafter(scripts, (4, 0, 3), model.config.vocab_size)
    assert generate(target, drafter, texts, max_new_tokens=16, eos=()).tokens == expected


def test_kernels_that_break_the_promise_are_found(monkeypatch):
    """Products of other sizes that round otherwise are not used; rows that depend on their place are refused."""
    target, real = near_ties(), exact.multiplied

    def by_size(rows, weight, bias=None):
        found = real(rows, weight, bias)
        return found + 1 if len(rows) < 8 else found

    monkeypatch.setattr(exact, "multiplied", by_size)
    assert exact_target(target).sizes[0] == 8

    def by_place(rows, weight, bias=None):
        return real(rows, weight, bias) + torch.arange(len(rows), dtype=rows.dtype).unsqueeze(1)

    monkeypatch.setattr(exact, "multiplied", by_place)
    with pytest.raises(UserError, match="depends on its place in it; leave out --exact"):
        exact_target(target)


def test_what_cannot_be_exact_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="neither compiled nor in static caches"):
        exact_target(Target.wrap(tiny_target().model, "static"))
    with pytest.raises(UserError, match="is not PyTorch's scaled_dot_product_attention; leave out --exact"):
        exact_target(near_ties(attn_implementation="eager"))
    monkeypatch.setattr(exact, "difference", lambda _target: "a tree")
    with pytest.raises(UserError, match="rounds a tree otherwise than single plain steps; leave out --exact"):
        exact_target(near_ties())


def test_trees_that_reach_beyond_what_is_near_are_refused():
    target, tokens = exact_target(near_ties()), torch.ones(1, NEAR + 2, dtype=torch.long)
    seen = torch.ones(1, NEAR + 2, NEAR + 2, dtype=torch.bool)
    with pytest.raises(UserError, match=f"at most {NEAR} nodes; give --nodes {NEAR}"):
        target.forward(tokens, tokens, target.new_cache(), seen, tokens)


def test_it_is_a_target_of_its_own():
    target = exact_target(near_ties())
    assert isinstance(target, ExactTarget)
    assert set(target.sizes) <= set(SIZES)
    assert target.alone
