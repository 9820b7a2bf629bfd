"""What steps of large models would take on a GPU at its limits: arithmetic, measured nowhere.

python -m ctc_drafter.evaluate.projection docs/performance.md

A forward takes as long as reading what it must read, or calculating what it must calculate, whichever is longer (the
roofline model of Williams, Waterman and Patterson, CACM 2009). Launches, search, tree and acceptance are not in it. So
a measured step is slower than this; its ratio to a measured plain step can be on either side.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.evaluate.page import table
from ctc_drafter.evaluate.report import insert_figures
from ctc_drafter.evaluate.roofline import cached_bytes, step_bytes
from ctc_drafter.evaluate.shapes import named_shape
from ctc_drafter.target import Target

MODELS = ("vicuna-7b", "vicuna-13b", "vicuna-33b", "llama-3.1-8b")
CONTEXT, ROWS, NODES = 512, (1, 4, 16), (16, 64)
PRUNED = 32768  # draft vocabulary, where it is smaller than the target's


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
    """What a forward reads and calculates: bytes, and additions and multiplications."""

    bytes: float
    operations: float


CARDS = (Card("A100 80GB SXM", 2.039e12, 312e12), Card("H100 SXM", 3.35e12, 989e12))


@dataclass(frozen=True)
class Projected:
    """Milliseconds of a plain step, of a tree of `nodes`, and the share of the latter that is the draft."""

    card: str
    model: str
    vocab: int
    rows: int
    nodes: int
    plain_ms: float
    tree_ms: float
    draft: float

    @property
    def ratio(self) -> float:
        return self.tree_ms / self.plain_ms


def verify_work(target: Target, rows: int, context: int, tokens: int) -> Work:
    """The target's forward over `tokens` more tokens of each row."""
    head_dim = (
        getattr(target.config, "head_dim", None) or target.config.hidden_size // target.config.num_attention_heads
    )
    attention = 4 * target.config.num_hidden_layers * target.config.num_attention_heads * head_dim * (context + tokens)
    linear = 2 * weights_of(target)
    return Work(
        step_bytes(target, rows, context) + rows * tokens * cached_bytes(target.config, target.dtype),
        rows * tokens * (linear + attention),
    )


def draft_work(drafter: CTCDrafter, rows: int, context: int) -> Work:
    """One block of each row: the drafter's weights, the head's columns that are drafted, and the cached context.

    The predictor's output is read again for each drafted token; its table is looked up only.
    """
    config, size = drafter.config, drafter.dtype.itemsize
    assert drafter.predictor is not None
    output = drafter.predictor.output.weight.numel()
    columns = (config.draft_vocab_size or config.vocab_size) * config.hidden_size
    layers = sum(p.numel() for p in drafter.parameters()) - drafter.predictor.table.weight.numel() - output
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    read = layers + columns + config.draft_length * output + rows * cached
    return Work(size * read, 2.0 * rows * ((1 + drafter.frames) * layers + drafter.frames * columns))


def weights_of(target: Target) -> int:
    """Numbers that every token is multiplied with: all but an embedding that is not the LM head too."""
    embedding = cast(torch.Tensor, target.embed.weight)
    every = sum(p.numel() for p in target.model.parameters())
    return every if embedding is target.head.weight else every - embedding.numel()


def projected(
    card: Card, target: Target, drafter: CTCDrafter, rows: int, nodes: int, context: int = CONTEXT
) -> tuple[float, float, float]:
    """Seconds of a plain step, a verification of `nodes` and the root, and a draft."""
    plain, tree = (card.seconds(verify_work(target, rows, context, tokens)) for tokens in (1, 1 + nodes))
    return plain, tree, card.seconds(draft_work(drafter, rows, context))


def all_projected(models: Sequence[str] = MODELS) -> Iterator[Projected]:
    for card in CARDS:
        for name in models:
            target = weightless_target(named_shape(name).config(CONTEXT))
            for pruned in (0, PRUNED) if target.vocab_size > 2 * PRUNED else (0,):
                drafter = weightless_drafter(target, pruned)
                for rows in ROWS:
                    for nodes in NODES:
                        plain, tree, draft = projected(card, target, drafter, rows, nodes)
                        yield Projected(
                            card.name,
                            name,
                            pruned or target.vocab_size,
                            rows,
                            nodes,
                            plain * 1e3,
                            (tree + draft) * 1e3,
                            draft / (tree + draft),
                        )


def weightless_target(config: PreTrainedConfig) -> Target:
    """A bfloat16 model that has shapes and no weights, so that it cannot be tried as `Target.wrap` would."""
    with torch.device("meta"):
        return Target(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())


def weightless_drafter(target: Target, pruned: int) -> CTCDrafter:
    with torch.device("meta"):
        drafter: CTCDrafter = CTCDrafter.for_target(target.config, draft_vocab_size=pruned)
    return drafter.to(target.dtype)


def markdown_projection(found: Sequence[Projected]) -> str:
    """One line for each card, model, draft vocabulary and batch; tree sizes side by side."""
    head = ["card", "model", "draft vocabulary", "rows", "plain ms"]
    head += [f"{nodes} nodes" for nodes in NODES] + [f"draft's share at {nodes}" for nodes in NODES]
    lines: dict[tuple[str, ...], list[Projected]] = {}
    for each in found:
        key = (each.card, each.model, str(each.vocab), str(each.rows), f"{each.plain_ms:.2f}")
        lines.setdefault(key, []).append(each)
    return table(
        head,
        [
            [*key, *(f"{each.ratio:.2f}x" for each in sizes), *(f"{each.draft:.1%}" for each in sizes)]
            for key, sizes in lines.items()
        ],
    )


def main(page: Path) -> None:
    """Writes the projection into a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(insert_figures(text, markdown_projection(list(all_projected())), "projection"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
