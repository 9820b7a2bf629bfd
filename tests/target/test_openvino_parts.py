"""Parts of an OpenVINO target, without OpenVINO: attention in two parts, exact sums, masks, the traced forward."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctc_drafter.files import CACHE
from ctc_drafter.target import openvino_graph
from ctc_drafter.target.openvino import filled_up, in_parts, openvino_target, spec_of
from ctc_drafter.target.openvino_attention import HIGH, LOW, VALUE_BITS, attention_in_parts, grid_for, split_weights
from ctc_drafter.target.openvino_graph import Forward, GraphSpec, InParts, example, graph_of
from ctc_drafter.types import UserError
from helpers import tiny_target

HIDDEN = torch.finfo(torch.float32).min


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exact", [False, True])
def test_attention_in_parts_is_attention(exact):
    """Six heads over two keys' heads, four cached and three new tokens; the exact form rounds values and weights."""
    query, keys, values = states(2, 6, 3, 8), states(2, 2, 7, 8, seed=1), states(2, 2, 7, 8, seed=2)
    mask = torch.zeros(2, 1, 3, 7).masked_fill(torch.ones(3, 7).triu(5).bool(), HIDDEN)
    expected = scaled_dot_product_attention(query, keys, values, mask, scale=0.3, enable_gqa=True)
    if exact:
        grid = grid_for(float(values.abs().max()))
        values = (values / grid).round() * grid
    parts = (keys[:, :, :4], keys[:, :, 4:], values[:, :, :4], values[:, :, 4:])
    found = attention_in_parts(query, *parts, mask, 0.3, [6, 2, 8, 8], exact)
    torch.testing.assert_close(found, expected, atol=5e-3 if exact else 1e-5, rtol=1e-3 if exact else 1e-5)


def test_exact_attention_is_the_same_in_every_order_of_keys():
    """Also divided otherwise into cached and new ones, and among hidden keys: to the last bit."""
    query, keys, values = states(1, 4, 1, 16), states(1, 2, 300, 16, seed=1), 3 * states(1, 2, 300, 16, seed=2)
    grid = grid_for(float(values.abs().max()))
    values = (values / grid).round() * grid

    def attended(order: torch.Tensor, cached: int, exact: bool = True) -> torch.Tensor:
        k, v = keys[:, :, order], values[:, :, order]
        parts = (k[:, :, :cached], k[:, :, cached:], v[:, :, :cached], v[:, :, cached:])
        mask = torch.zeros(1, 1, 1, len(order))
        mask[..., 300:] = HIDDEN
        return attention_in_parts(query, *parts, mask, 0.25, [4, 2, 16, 16], exact)

    usual = torch.arange(300)
    shuffled = [torch.randperm(300, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = [attended(order, cached) for order, cached in zip(shuffled, (299, 40, 1), strict=True)]
    found.append(attended(torch.cat([usual, usual[:50]]), 150))
    assert all(torch.equal(each, attended(usual, 150)) for each in found)
    # Sums that round are not, so the test can fail.
    assert not torch.equal(attended(usual, 150, exact=False), attended(shuffled[0], 150, exact=False))


def test_weights_are_split_into_whole_numbers():
    """Two equal scores and one that is nothing beside them: halves, exactly."""
    high, low = split_weights(torch.tensor([[1.0, 1.0, -90.0]]))
    assert high.tolist() == [[HIGH / 2, HIGH / 2, 0.0]]
    assert low.tolist() == [[0.0, 0.0, 0.0]]
    scores = states(5, 400)
    high, low = split_weights(scores)
    assert torch.equal(high, high.round())
    assert torch.equal(low, low.round())
    assert float(low.abs().max()) <= LOW / 2
    torch.testing.assert_close((high * LOW + low) / (HIGH * LOW), scores.softmax(-1), atol=1 / (HIGH * LOW), rtol=0)


@pytest.mark.parametrize(
    ("largest", "grid"), [(1.0, 4 / 2**VALUE_BITS), (1.5, 8 / 2**VALUE_BITS), (0.0, 2.0 ** (-98 - VALUE_BITS))]
)
def test_the_grid_is_a_power_of_two(largest, grid):
    assert grid_for(largest) == grid


def test_a_mask_over_slots_becomes_one_over_the_room_and_the_new_tokens():
    """Two cached tokens in a room of four slots; a root, which sees them, and its child; one that fills up."""
    mask = torch.tensor([[0.0, 0, 0, HIDDEN], [0, 0, 0, 0]])[None, None]
    found = in_parts(mask, None, 2, 4, 1)[0, 0]
    h = HIDDEN
    assert found.tolist() == [[0, 0, h, h, 0, h, h], [0, 0, h, h, 0, 0, h], [h, h, h, h, 0, h, h]]


def test_a_mask_of_rows_of_different_lengths():
    """The second row has one cached token, so that its new ones lie in slots 1 and 2, and nobody sees slot 3."""
    h = HIDDEN
    mask = torch.tensor([[[0.0, 0, 0, h], [0, 0, 0, 0]], [[0, 0, h, h], [0, 0, 0, h]]]).unsqueeze(1)
    found = in_parts(mask, torch.tensor([[2, 3], [1, 2]]), 2, 3, 0)[:, 0]
    assert found[0].tolist() == [[0, 0, h, 0, h], [0, 0, h, 0, 0]]
    assert found[1].tolist() == [[0, h, h, 0, h], [0, h, h, 0, 0]]


def test_numbers_are_filled_up_with_the_first():
    assert filled_up(torch.tensor([[3, 4]]), 5).tolist() == [[3, 4, 3, 3, 3]]


@torch.inference_mode()
def test_the_traced_forward_is_the_models():
    """Seven hidden slots of garbage before three tokens, the logits of the last two, the output of block 1."""
    target = tiny_target(num_hidden_layers=2)
    spec = spec_of(target, [1], exact=False)
    tokens, places = torch.tensor([[3, 1, 4]]), torch.tensor([[0, 1, 2]])
    inputs = example(spec, 1, 3, 7)
    mask = torch.full((3, 10), HIDDEN)
    mask[:, 7:] = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), HIDDEN)
    inputs[:4] = [tokens, places, torch.tensor([1, 2]), mask[None, None]]
    logits, features, *new = Forward(target.model, spec, True)(*inputs)
    cache = target.new_cache()
    expected = target.forward(tokens, places, cache, layers=[1])
    torch.testing.assert_close(logits, expected.logits[:, 1:])
    torch.testing.assert_close(features, expected.features)
    torch.testing.assert_close(new[0], cache.layers[0].keys)
    torch.testing.assert_close(new[3], cache.layers[1].values)


def test_a_spec_has_heads_and_sizes_of_every_layer():
    spec = spec_of(tiny_target(num_hidden_layers=2), [1, 0, 1], exact=True)
    assert spec == GraphSpec((0, 1), (), spec.states, spec.grids)
    assert len(spec.states) == len(spec.grids) == 2
    assert all(grid == 2.0 ** round(torch.tensor(grid).log2().item()) for grid in spec.grids)


def test_types_of_weights_and_targets_that_do_not_go_are_refused():
    with pytest.raises(UserError, match="no weights of type int3"):
        openvino_target(tiny_target(), "int3")


@pytest.mark.parametrize("setting", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_attention_with_a_mask_or_dropout_of_its_own_is_refused(setting):
    with pytest.raises(UserError, match="of its own"), InParts([]):
        scaled_dot_product_attention(*[states(1, 1, 2, 4)] * 3, **setting)


def test_two_at_a_time_convert_a_target_once(tmp_path, monkeypatch):
    """They would write into one temporary folder, each removing what the other has begun."""
    target, made = tiny_target(), []
    given = target.model, spec_of(target, [], exact=False), "f32", True

    def slowly(*_: object) -> str:
        made.append("graph")
        time.sleep(0.2)
        return "graph"

    def keep(graph: str, place: Path) -> None:
        place.mkdir()
        (place / openvino_graph.NAME).write_text(graph)

    def read_kept(place: Path) -> str | None:
        return (place / openvino_graph.NAME).read_text() if place.is_dir() else None

    monkeypatch.setenv(CACHE, str(tmp_path))
    for name, value in (("converted", slowly), ("keep", keep), ("read_kept", read_kept), ("key", lambda *_: "key")):
        monkeypatch.setattr(openvino_graph, name, value)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda _: graph_of(*given), range(2))
        assert list(found) == ["graph", "graph"]
    assert made == ["graph"]
    monkeypatch.setenv(CACHE, str(tmp_path / openvino_graph.FOLDER / "key" / openvino_graph.NAME))  # no folder
    monkeypatch.setattr(openvino_graph, "keep", lambda *_: None)
    assert graph_of(*given) == "graph"
    assert made == ["graph"] * 2
