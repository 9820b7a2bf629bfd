import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Cache, DynamicCache

from ctc_drafter.target.cache import GROWTH, GrowingLayer, join
from ctc_drafter.target.layout import Switch, columns_first


def test_columns_first_changes_no_value_and_keeps_ties():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7), "low": nn.Linear(4, 4).bfloat16()})
    model["head"].weight = model["embed"].weight
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    columns_first(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert model["head"].weight is model["embed"].weight
    assert model["head"].weight.t().is_contiguous()
    assert model["low"].weight.is_contiguous()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, GROWTH + 3)),
        st.tuples(st.just("cut"), st.integers(0, 5)),
        st.tuples(st.just("rows"), st.sampled_from([[1, 0], [0], [0, 0]])),
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_a_growing_layer_holds_what_a_dynamic_one_holds(steps):
    """Whatever others do to keys and values in between: views cut short, rows selected."""
    growing, dynamic = Cache(layer_class_to_replicate=GrowingLayer), DynamicCache()
    batch = 2
    for what, value in [("add", 3), *steps]:
        if what == "add":
            keys, values = torch.randn(batch, 1, value, 2), torch.randn(batch, 1, value, 3)
            for got, wanted in zip(growing.update(keys, values, 0), dynamic.update(keys, values, 0), strict=True):
                assert torch.equal(got, wanted)
        for cache in (growing, dynamic):
            layer, length = cache.layers[0], cache.get_seq_length()
            if what == "cut":  # what compaction does
                layer.keys, layer.values = layer.keys[:, :, : length - value], layer.values[:, :, : length - value]
            if what == "rows":
                cache.batch_select_indices(torch.tensor([row % batch for row in value]))
        batch = dynamic.layers[0].keys.shape[0]
        assert growing.get_seq_length() == dynamic.get_seq_length()
        assert torch.equal(growing.layers[0].keys, dynamic.layers[0].keys)
        assert torch.equal(growing.layers[0].values, dynamic.layers[0].values)
        if batch == 0 or dynamic.get_seq_length() == 0:
            break


def test_appending_does_not_move_what_is_there():
    layer = GrowingLayer()
    first, _ = layer.update(torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2))
    second, _ = layer.update(torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2))
    assert second.data_ptr() == first.data_ptr()


def test_rows_that_are_gone_hold_no_memory() -> None:
    """What a cache layer lets go of, or exchanges, is not kept elsewhere; and it still grows in place."""
    layer = GrowingLayer()
    layer.update(torch.randn(4, 1, 300, 8), torch.randn(4, 1, 300, 8))
    kept = layer.keys[1:3, :, :300].clone()
    layer.batch_select_indices(torch.tensor([1, 2]))
    assert {room.shape[0] for room in layer.buffers} == {2}
    assert torch.equal(layer.keys, kept)
    other = GrowingLayer()
    other.update(torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8))
    cache, new = DynamicCache(), DynamicCache()
    cache.layers, new.layers = [layer], [other]
    join(cache, new)
    assert [room.data_ptr() for room in layer.buffers] == [layer.keys.data_ptr(), layer.values.data_ptr()]
    more = torch.randn(3, 1, 2, 8)
    layer.update(more, more)
    place = layer.keys.data_ptr()
    layer.update(more, more)
    assert layer.keys.data_ptr() == place
    assert torch.equal(layer.keys[:2, :, :300], kept)


def test_a_switch_is_on_while_anybody_wants_it(monkeypatch):
    monkeypatch.delenv("A_SWITCH", raising=False)
    switch = Switch("A_SWITCH")
    switch.take()
    switch.take()
    switch.give_back()
    assert os.environ["A_SWITCH"] == "1"
    switch.give_back()
    assert "A_SWITCH" not in os.environ
    monkeypatch.setenv("A_SWITCH", "0")
    switch.take()
    assert os.environ["A_SWITCH"] == "0"
    switch.give_back()
    assert os.environ["A_SWITCH"] == "0"
