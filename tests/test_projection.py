"""The projection to GPUs: work counted by hand, both limits, and the page."""

from pathlib import Path

import pytest

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.evaluate.projection import (
    Card,
    Work,
    all_projected,
    draft_work,
    markdown_projection,
    projected,
    verify_work,
    weightless_drafter,
    weightless_target,
)
from ctc_drafter.evaluate.shapes import named_shape
from helpers import tiny_target

ROOT = Path(__file__).parents[1]


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


def test_work_of_a_draft():
    config = tiny_target().config
    drafter = CTCDrafter.for_target(config)
    sizes, rank = drafter.config, drafter.config.predictor_rank
    layers = sum(p.numel() for p in drafter.parameters()) - 2 * 97 * rank  # the predictor's two tables
    cached = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
    work = draft_work(drafter, rows=3, context=10)
    assert work.bytes == 4 * (layers + 97 * 64 + sizes.draft_length * 97 * rank + 3 * 10 * cached)
    assert work.operations == 2 * 3 * ((1 + drafter.frames) * layers + drafter.frames * 97 * 64)


def test_a_pruned_vocabulary_is_read_in_part():
    target = weightless_target(named_shape("tiny").config(64))
    whole, part = (draft_work(weightless_drafter(target, size), 1, 8) for size in (0, 128))
    config = weightless_drafter(target, 0).config
    assert whole.bytes - part.bytes == 2 * (512 - 128) * (64 + config.draft_length * config.predictor_rank)


def test_where_arithmetic_is_free_a_tree_costs_its_draft_and_its_keys():
    target = weightless_target(named_shape("tiny").config(64))
    drafter = weightless_drafter(target, 0)
    plain, tree, draft = projected(Card("reads", 1e9, 1e30), target, drafter, 1, 64, context=8)
    keys = 2 * 2 * 2 * 16 * 2  # two layers of two heads of 16, in two bytes
    assert tree - plain == pytest.approx(64 * keys / 1e9)
    assert draft == pytest.approx(draft_work(drafter, 1, 8).bytes / 1e9)


def test_the_page_has_what_the_module_says():
    assert markdown_projection(list(all_projected())) in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
