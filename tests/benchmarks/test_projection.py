"""The projection to GPUs: work counted by hand, both limits, and the page."""

from pathlib import Path

import pytest

from benchmarks.projection import (
    PASSES,
    Card,
    Work,
    all_projected,
    markdown_projection,
    network_work,
    projected,
    search_work,
    verify_work,
    weightless_drafter,
    weightless_target,
)
from benchmarks.steps import named_shape
from ctc_drafter.drafters.ctc import CTCDrafter
from helpers import tiny_target

ROOT = Path(__file__).parents[2]


def test_a_forward_is_bound_by_memory_or_by_arithmetic():
    work = Work(bytes=100.0, operations=600.0)
    assert Card("reads slowly", 10.0, 100.0).seconds(work) == 10.0
    assert Card("calculates slowly", 100.0, 100.0).seconds(work) == 6.0


def test_work_of_a_verification():
    target = tiny_target()  # float32, 97 tokens, hidden 64
    config = target.config
    every, embedding = sum(p.numel() for p in target.model.parameters()), 97 * 64
    cached = 2 * 3 * config.num_key_value_heads * config.head_dim
    work = verify_work(target, rows=2, context=10, tokens=5)
    # Read: the weights once, two rows of the embedding, ten tokens of each row; written: five of each.
    assert work.bytes == 4 * (every - embedding + 2 * 64 + 2 * (10 + 5) * cached)
    attention = 4 * 3 * config.num_attention_heads * config.head_dim * 15
    assert work.operations == 2 * 5 * (2 * (every - embedding) + attention)


def test_work_of_the_network():
    """The drafter's layers, matrix by matrix: features of 64, an MLP of 96, heads of 16."""
    config = tiny_target().config
    drafter = CTCDrafter.for_target(config)
    sizes = drafter.config
    hidden, heads, kv, inner = 64, sizes.num_attention_heads * 16, sizes.num_key_value_heads * 16, 96
    norms = 2 * hidden + 2 * 16  # of the layer, of queries and of keys
    layer = hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * inner + norms
    shared = hidden * hidden * len(sizes.target_layer_ids) + 2 * hidden + (hidden + 1)  # fc, two norms, blank head
    width, rank = sizes.predictor_width, sizes.predictor_rank
    predictor = 3 * hidden * width + width + width * rank
    numbers = sizes.num_hidden_layers * layer + shared + predictor
    work = network_work(drafter, rows=3, context=10)
    cached = 2 * sizes.num_hidden_layers * kv
    assert work.bytes == 4 * (numbers + 97 * 64 + 3 * 10 * cached)
    assert work.operations == 2 * 3 * ((1 + drafter.frames) * numbers + drafter.frames * 97 * 64)


def test_work_of_the_search():
    drafter = CTCDrafter.for_target(tiny_target().config)
    levels, rank = drafter.config.draft_length, drafter.config.predictor_rank
    work = search_work(drafter, rows=2, nodes=5)
    scores = 2 * (1 + (levels - 1) * 5) * 97  # the root alone, then five prefixes a level
    assert work.bytes == 4 * (levels * 97 * rank + PASSES * scores)
    assert work.operations == 2 * scores * (rank + 2 * drafter.frames)


SEARCHED = {"predictor_width": 512, "draft_length": 7, "frames": 8}


def test_a_pruned_vocabulary_is_read_in_part():
    target = weightless_target(named_shape("tiny").config(64))
    whole, part = (weightless_drafter(target, size) for size in (0, 128))
    assert network_work(whole, 1, 8).bytes - network_work(part, 1, 8).bytes == 2 * (512 - 128) * 64
    config, levels = part.config, part.config.draft_length
    prefixes, terms = 1 + (levels - 1) * 8, part.frames * config.joint_tokens
    joint = part.dtype.itemsize * levels * terms * config.joint_rank + 4 * PASSES * prefixes * terms
    assert search_work(part, 1, 8).bytes - joint == (search_work(whole, 1, 8).bytes - joint) / 4
    plain = CTCDrafter.for_target(target.model.config, **SEARCHED)
    both = CTCDrafter.for_target(target.model.config, **SEARCHED, joint_tokens=5, joint_rank=3)
    more = search_work(both, 2, 4).operations - search_work(plain, 2, 4).operations
    assert more == 2 * 2 * (1 + (levels - 1) * 4) * 3 * (5 * both.frames + config.predictor_width)


def test_the_drafter_is_the_one_that_training_makes():
    drafter = weightless_drafter(weightless_target(named_shape("tiny").config(64)), 0)
    assert drafter.config.carry
    assert drafter.config.copies


def test_where_arithmetic_is_free_a_verification_costs_its_keys_more():
    target = weightless_target(named_shape("tiny").config(64))
    drafter = weightless_drafter(target, 0)
    plain, tree, network, search = projected(Card("reads", 1e9, 1e30), target, drafter, 1, 64, context=8)
    keys = 2 * 2 * 2 * 16 * 2  # two layers of two heads of 16, in two bytes
    assert tree - plain == pytest.approx(64 * keys / 1e9)
    assert network == pytest.approx(network_work(drafter, 1, 8).bytes / 1e9)
    assert search == pytest.approx(search_work(drafter, 1, 64).bytes / 1e9)


def test_the_page_has_what_the_module_says():
    assert markdown_projection(list(all_projected())) in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
