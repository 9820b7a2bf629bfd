"""Exactness of a target over every length threshold: trees, batches and samples against plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampled, Sampler, warpers
from ctc_drafter.evaluate.exactness import ScriptedDrafter
from ctc_drafter.target.model import Target

SHORT = ((3, 11, 6), 12)  # lengths and new tokens where the context is small
LENGTHS = (7, 40, 23)  # the first crosses every threshold of `family_configs.py` while it is decoded
NEW_TOKENS = 32
DEPTH = 11  # of a draft; three nodes a level, so that a tree of 32 nodes has as many levels
RIGHT: dict[str, int | tuple[int, ...]] = {"never": 0, "always": DEPTH, "sometimes": (0, 3, 1, DEPTH, 5)}


@dataclass(frozen=True)
class Cell:
    """One comparison: tree size, how often drafts are right, rows of the batch, and greedy or sampled."""

    nodes: int
    right: str
    rows: int
    sampled: bool = False

    def __str__(self) -> str:
        kind = "sampled" if self.sampled else "greedy"
        return f"{kind}, {self.nodes} nodes, drafts {self.right} right, batch of {self.rows}"


CELLS = (
    *(Cell(nodes, right, 3) for nodes in (32, 8, 1) for right in RIGHT),
    *(Cell(32, "sometimes", 1), Cell(8, "always", 1), Cell(1, "sometimes", 1), Cell(32, "never", 1)),
    *(Cell(32, "always", 1, True), Cell(8, "sometimes", 3, True), Cell(1, "always", 3, True)),
)
FEW = (Cell(32, "sometimes", 3), Cell(8, "always", 1), Cell(8, "sometimes", 3, True))


def prompts_of(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random prompts, the same every time, without the first and last few ids, which are special."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocab_size - 5, (length,), generator=draw).tolist() for length in lengths]


def stock_continuations(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What transformers' own greedy `generate` writes after each prompt: the oracle."""
    rows = [torch.tensor([prompt]) for prompt in prompts]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [
        model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist() for row in rows
    ]


def new_sampler() -> Sampler:
    return Sampled([5, 6, 7], warpers(temperature=0.8))  # no top-p: ties at its edge are rounding


@dataclass(frozen=True)
class Plain:
    """What plain decoding writes: prompts, stock's greedy text of each and our plain sampled one."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    sampled: list[list[int]]
    new_tokens: int

    @classmethod
    def of(cls, target: Target, short: bool = False, greedy: list[list[int]] | None = None) -> Plain:
        """greedy: stock's text where it is known, of the same model."""
        lengths, new = SHORT if short else (LENGTHS, NEW_TOKENS)
        prompts = prompts_of(target.vocab_size, lengths)
        sampled = plain_generate(target, prompts, max_new_tokens=new, eos=(), sampler=new_sampler()).tokens
        return cls(prompts, greedy or stock_continuations(target.model, prompts, new), sampled, new)


def same(target: Target, plain: Plain, cell: Cell) -> bool:
    """Whether one comparison holds."""
    expected = plain.sampled if cell.sampled else plain.greedy
    texts = [prompt + text for prompt, text in zip(plain.prompts, expected, strict=True)]
    drafter = ScriptedDrafter(texts, RIGHT[cell.right], target.vocab_size, DEPTH)
    sampler = new_sampler() if cell.sampled else ARGMAX
    found = generate(
        target,
        drafter,
        plain.prompts[: cell.rows],
        max_new_tokens=plain.new_tokens,
        nodes=cell.nodes,
        min_probability=0.0,
        eos=(),
        sampler=sampler,
    )
    return found.tokens == expected[: cell.rows]


def differences(target: Target, plain: Plain, cells: Sequence[Cell] = CELLS) -> list[str]:
    """The comparisons that do not hold; none is the goal."""
    return [str(cell) for cell in cells if not same(target, plain, cell)]
