"""Roofline estimates of step times of large models on GPUs, not measurements.

python -m benchmarks.projection docs/performance.md

A forward takes as long as reading what it must read, or calculating what it must calculate, whichever is longer (the
roofline model of Williams, Waterman and Patterson, CACM 2009); the search as it is written, level by level over the
whole vocabulary. Launches, tree and acceptance are not in it. So a measured step is slower than this; its ratio to a
measured plain step can be on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks.pages import run_alone, write_figures
from benchmarks.steps import cached_bytes, head_size, named_shape, step_bytes
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import blank_drafter
from ctc_drafter.evaluate.report_page import table
from ctc_drafter.target.model import Target

MODELS = ("vicuna-7b", "vicuna-13b", "vicuna-33b", "llama-3.1-8b")
CONTEXT, ROWS, NODES = 512, (1, 4, 16), (16, 64)
PRUNED = 32768  # draft vocabulary, where it is smaller than the target's
# How often `ctc/search.py` reads or writes a level's float32 numbers for every prefix and token: the bias (made, and
# read for its maximum), shifted (2), its exponential (2), the normalisers (1), the scores (made, and multiplied: 4),
# topk (1 and more). Counted by reading.
PASSES = 12


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it: bytes per second of memory, bfloat16 operations per second, not sparse ones."""

    name: str
    bandwidth: float
    operations: float

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.bandwidth, work.operations / self.operations)


@dataclass(frozen=True)
class Work:
    """Work of a forward: bytes read, additions and multiplications."""

    bytes: float
    operations: float


CARDS = (Card("A100 80GB SXM", 2.039e12, 312e12), Card("H100 SXM", 3.35e12, 989e12))


@dataclass(frozen=True)
class Projected:
    """Milliseconds of a plain step, and of the parts of a step with a tree of `nodes`: target, network, search."""

    card: str
    model: str
    vocab: int
    rows: int
    nodes: int
    plain_ms: float
    verify_ms: float
    network_ms: float
    search_ms: float

    @property
    def ms(self) -> float:
        return self.verify_ms + self.network_ms + self.search_ms

    @property
    def ratio(self) -> float:
        return self.ms / self.plain_ms


def verify_work(target: Target, rows: int, context: int, tokens: int) -> Work:
    """The target's forward over `tokens` more tokens of each row."""
    config = target.config
    width = config.num_attention_heads * head_size(config)
    attention = 4 * config.num_hidden_layers * width * (context + tokens)
    linear = 2 * weights_of(target)
    return Work(
        step_bytes(target, rows, context) + rows * tokens * cached_bytes(config, target.dtype),
        rows * tokens * (linear + attention),
    )


def network_work(drafter: CTCDrafter, rows: int, context: int) -> Work:
    """One block of each row: the layers, the head's columns that are drafted, and the cached context."""
    config, predictor = drafter.config, drafter.predictor
    assert predictor is not None
    searched = predictor.table, predictor.output, *([drafter.joint] if drafter.joint is not None else [])
    apart = sum(p.numel() for module in searched for p in module.parameters())  # looked up; the search's
    layers = sum(p.numel() for p in drafter.parameters()) - apart
    columns = (config.draft_vocab_size or config.vocab_size) * config.hidden_size
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    return Work(
        drafter.dtype.itemsize * (layers + columns + rows * cached),
        2.0 * rows * ((1 + drafter.frames) * layers + drafter.frames * columns),
    )


def search_work(drafter: CTCDrafter, rows: int, nodes: int) -> Work:
    """The root's level, then `nodes` prefixes a level: the predictor's products, and `PASSES` over all scores; the same
    for the joint terms. Tied tables are worked out beforehand."""
    config, levels = drafter.config, drafter.config.draft_length
    columns, rank = config.draft_vocab_size or config.vocab_size, config.predictor_rank
    prefixes = rows * (1 + (levels - 1) * nodes)
    products = columns * (rank + 2 * drafter.frames)  # the bias; what normalises it, and the scores
    terms = drafter.frames * config.joint_tokens
    joint = config.joint_rank * (terms + config.predictor_width) if terms else 0
    read = drafter.dtype.itemsize * levels * (columns * rank + rows * terms * config.joint_rank)
    return Work(read + PASSES * 4 * prefixes * (columns + terms), 2.0 * prefixes * (products + joint))


def weights_of(target: Target) -> int:
    """Numbers that every token is multiplied with: all but an embedding that is not the LM head too."""
    embedding = cast(torch.Tensor, target.embed.weight)
    every = sum(p.numel() for p in target.model.parameters())
    return every if embedding is target.head.weight else every - embedding.numel()


def projected(
    card: Card, target: Target, drafter: CTCDrafter, rows: int, nodes: int, context: int = CONTEXT
) -> tuple[float, float, float, float]:
    """Seconds of a plain step; of a verification of `nodes` and the root, the drafter's network, and its search."""
    plain, tree = (card.seconds(verify_work(target, rows, context, tokens)) for tokens in (1, 1 + nodes))
    network, search = network_work(drafter, rows, context), search_work(drafter, rows, nodes)
    return plain, tree, card.seconds(network), card.seconds(search)


def all_projected(models: Sequence[str] = MODELS) -> Iterator[Projected]:
    for card in CARDS:
        for name in models:
            target = weightless_target(named_shape(name).config(CONTEXT))
            for pruned in (0, PRUNED) if target.vocab_size > 2 * PRUNED else (0,):
                drafter = weightless_drafter(target, pruned)
                for rows in ROWS:
                    for nodes in NODES:
                        ms = [1e3 * seconds for seconds in projected(card, target, drafter, rows, nodes)]
                        yield Projected(card.name, name, pruned or target.vocab_size, rows, nodes, *ms)


def weightless_target(config: PreTrainedConfig) -> Target:
    """A bfloat16 model that has shapes and no weights, so that it cannot be tried as `Target.wrap` would."""
    with torch.device("meta"):
        return Target(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())


def weightless_drafter(target: Target, pruned: int) -> CTCDrafter:
    """Of the sizes that a fresh one has, with so many tokens to draft; 0 for all."""
    with torch.device("meta"):
        drafter = blank_drafter("ctc", draft_vocab_size=pruned)(target.config)
    assert isinstance(drafter, CTCDrafter)
    return drafter.to(target.dtype)


def markdown_projection(found: Sequence[Projected]) -> str:
    """One line for each card, model, draft vocabulary and batch; tree sizes side by side."""
    head = ["card", "model", "draft vocabulary", "rows", "plain ms"]
    head += [f"{nodes} nodes: {what}" for nodes in NODES for what in ("ms", "network", "search")]
    lines: dict[tuple[str, ...], list[str]] = {}
    for each in found:
        key = (each.card, each.model, str(each.vocab), str(each.rows), f"{each.plain_ms:.2f}")
        shares = [f"{part / each.ms:.1%}" for part in (each.network_ms, each.search_ms)]
        lines.setdefault(key, []).extend([f"{each.ms:.2f} ({each.ratio:.2f}x)", *shares])
    return table(head, [[*key, *cells] for key, cells in lines.items()])


def main(page: Annotated[Path, typer.Argument(help="Markdown page with the markers.")]) -> None:
    """Writes the projection into a page."""
    write_figures(page, [], lambda _: markdown_projection(list(all_projected())), "projection")


if __name__ == "__main__":
    run_alone(main)
