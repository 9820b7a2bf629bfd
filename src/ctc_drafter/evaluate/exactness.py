"""`ctc-drafter exactness`: how often rounding changes an output, and by what logit margin.

In float32 nothing may differ. In shorter formats a forward over several tokens and one over a single token round
differently, so near-ties of the two likeliest tokens can fall the other way. Plain decoding in another batch or
with another kernel does the same, which is the baseline.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from rich import box
from rich.table import Column, Table
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase

from ctc_drafter.chat import decode, encode_conversation, eos_ids
from ctc_drafter.decode.batch import DEFAULT_FLOOR
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.drafters.base import Drafter, refuse_call
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.provenance import environment
from ctc_drafter.target.checks import KERNELS
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, UserError, Verification

RIGHT = (3, 1, 4, 0, 2)  # right tokens of the drafts that stand in for a drafter's


@dataclass(frozen=True)
class Case:
    """One turn of a prompt: its token ids, what plain decoding writes, and its logit margin at each token."""

    task: str
    id: str
    turn: int
    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Difference:
    """The first difference of one output: new tokens before it, and the best less the second-best plain logit."""

    task: str
    id: str
    turn: int
    position: int
    margin: float | None
    plain: int | None
    other: int | None


@dataclass(frozen=True)
class Margins(Target):
    """A target that keeps the margin of the token that follows each position, for a batch of one row."""

    kept: dict[int, float] = field(default_factory=dict)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache, *rest: Any, **named: Any
    ) -> Verification:
        result = super().forward(tokens, positions, cache, *rest, **named)
        best = result.logits[0, -1].float().topk(2).values
        self.kept[int(positions[0, -1])] = float(best[0] - best[1])
        return result


Way = Callable[[Sequence[Case]], list[list[int]]]


@dataclass(frozen=True)
class Runner:
    """Decodes cases in the ways that are compared."""

    target: Target
    drafter: Drafter | None
    eos: tuple[int, ...]
    max_new_tokens: int
    nodes: int

    def plain(self, prompts: list[list[int]]) -> list[list[int]]:
        return plain_generate(self.target, prompts, max_new_tokens=self.max_new_tokens, eos=self.eos).tokens

    def drafted(self, cases: Sequence[Case]) -> list[list[int]]:
        """With the drafter, or without one with drafts from plain decoding's own text that are right now and then."""
        drafter = self.drafter or ScriptedDrafter([c.prompt + c.tokens for c in cases], RIGHT, self.target.vocab_size)
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "nodes": self.nodes, "eos": self.eos}
        return generate(
            self.target, drafter, [c.prompt for c in cases], min_probability=DEFAULT_FLOOR, **options
        ).tokens

    def case(self, task: str, prompt: Prompt, turn: int, ids: list[int]) -> Case:
        target = Margins(self.target.model, self.target.cache, self.target.chain)
        tokens = plain_generate(target, [ids], max_new_tokens=self.max_new_tokens, eos=self.eos).tokens[0]
        margins = [target.kept[len(ids) - 1 + i] for i in range(len(tokens))]
        return Case(task, prompt.id, turn, ids, tokens, margins)


def plain_cases(runner: Runner, tokenizer: PreTrainedTokenizerBase, task: Task) -> Iterator[Case]:
    """Every turn that fits the context; plain decoding's answers are the history of the next."""
    for prompt in task.prompts:
        answers: list[str] = []
        for turn in range(len(prompt.turns)):
            ids = encode_conversation(tokenizer, prompt.turns[: turn + 1], answers, system=prompt.system)
            if len(ids) + runner.max_new_tokens > runner.target.context:
                break
            case = runner.case(task.name, prompt, turn, ids)
            answers.append(decode(tokenizer, case.tokens))
            yield case


def first_difference(case: Case, other: Sequence[int]) -> Difference | None:
    """Where another output leaves plain decoding's; None when it does not."""
    if list(other) == case.tokens:
        return None
    pairs = zip(case.tokens, other, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(case.tokens), len(other)))

    def at(values: Sequence[Any]) -> Any:
        return values[position] if position < len(values) else None

    return Difference(case.task, case.id, case.turn, position, at(case.margins), at(case.tokens), at(other))


@contextmanager
def kernel_of(target: Target, kernel: str) -> Iterator[None]:
    """Another attention kernel for a while. Raises `ValueError` where the family does not offer it."""
    before = target.model.config._attn_implementation
    target.model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        target.model.set_attn_implementation(before)


def ways(runner: Runner, batch_size: int) -> Iterator[tuple[str, Way]]:
    """The compared ways by name: drafted alone and in a batch, then the baselines."""

    def batches(cases: Sequence[Case], run: Way) -> list[list[int]]:
        parts = [cases[start : start + batch_size] for start in range(0, len(cases), batch_size)]
        return [row for part in parts for row in run(part)]

    def plain(cases: Sequence[Case]) -> list[list[int]]:
        return runner.plain([case.prompt for case in cases])

    yield f"trees of {runner.nodes}", lambda cases: [runner.drafted([case])[0] for case in cases]
    yield f"trees of {runner.nodes}, batch {batch_size}", lambda cases: batches(cases, runner.drafted)
    yield f"plain, batch {batch_size}", lambda cases: batches(cases, plain)
    now = runner.target.model.config._attn_implementation
    for kernel in KERNELS:
        if kernel != now:

            def other(cases: Sequence[Case], kernel: str = kernel) -> list[list[int]]:
                with kernel_of(runner.target, kernel):
                    return [plain([case])[0] for case in cases]

            yield f"plain, {kernel} kernel", other


def exactness(
    target: Target,
    drafter: Drafter | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 4,
    nodes: int = 8,
    meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compares outputs with greedy plain decoding, one prompt at a time, of `limit` prompts of each task.

    Returns `{"meta", "rows"}`, a row per way of decoding: `outputs`, how many are `different`, their `share`, the
    `tokens` that were compared (up to the first difference of each output), `median_margin` and `largest_margin` of
    the first differences in logits, and each of them in `differences`.
    """
    runner = Runner(target, drafter, tuple(eos_ids(target.model, tokenizer)), max_new_tokens, nodes)
    cases = [case for task in tasks for case in plain_cases(runner, tokenizer, task.some(limit))]
    rows = []
    for name, run in ways(runner, batch_size):
        try:
            outputs = run(cases)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            continue  # transformers does not offer that kernel for this family
        rows.append(summary(name, cases, outputs))
    settings: dict[str, Any] = {
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "cache": target.cache,
    }
    settings |= {"kernel": target.model.config._attn_implementation, "threads": torch.get_num_threads()}
    settings |= {"tasks": [task.name for task in tasks], "limit": limit, "max_new_tokens": max_new_tokens}
    settings |= {"nodes": nodes, "batch_size": batch_size, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return {"meta": {**environment(), **settings, **(meta or {})}, "rows": rows}


def summary(name: str, cases: Sequence[Case], outputs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Summary row of one compared way."""
    found = [first_difference(case, output) for case, output in zip(cases, outputs, strict=True)]
    differences = [difference for difference in found if difference is not None]
    margins = [difference.margin for difference in differences if difference.margin is not None]
    agreed = [d.position if d else len(case.tokens) for case, d in zip(cases, found, strict=True)]
    return {
        "method": name,
        "outputs": len(cases),
        "different": len(differences),
        "share": len(differences) / len(cases) if cases else None,
        "tokens": sum(agreed) + len(differences),
        "median_margin": statistics.median(margins) if margins else None,
        "largest_margin": max(margins, default=None),
        "differences": [asdict(difference) for difference in differences],
    }


def exactness_table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    names = ("outputs", "differ", "share", "per 1,000 tokens", "median margin", "largest")
    table = Table(
        Column("against plain", no_wrap=True),
        *(Column(name, justify="right", min_width=7) for name in names),
        title=f"{result['meta']['dtype']}, {result['meta']['kernel']} kernel",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for row in result["rows"]:
        rate = 1000 * row["different"] / row["tokens"] if row["tokens"] else 0.0
        margins = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("median_margin", "largest_margin")]
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        table.add_row(row["method"], str(row["outputs"]), str(row["different"]), share, f"{rate:.2f}", *margins)
    return table


# A drafter whose drafts are never, always or sometimes right, for checks that need no trained one.

SIBLINGS = 3


class ScriptedDrafter:
    """Drafts from a known text per prompt, spoilt from `wrong_after` tokens on, beside decoys.

    scripts: prompt and continuation of each row, in the order of the prompts. wrong_after: right tokens of a
    draft; of several numbers each step takes the next one. Each level holds the scripted token and two decoys, in
    an order that changes from step to step, so that the right path is found at different node indices.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(
        self, scripts: Sequence[Sequence[int]], wrong_after: int | Sequence[int], vocab_size: int, depth: int = 4
    ):
        self.scripts, self.depth, self.vocab_size = [list(script) for script in scripts], depth, vocab_size
        self.wrong_after = [wrong_after] if isinstance(wrong_after, int) else list(wrong_after)

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> ScriptedSession:
        return ScriptedSession(self, list(range(batch_size)))


class ScriptedSession:
    """See `DraftSession`."""

    def __init__(self, drafter: ScriptedDrafter, rows: list[int]):
        self.drafter, self.rows, self.step = drafter, rows, 0
        self.lengths = [0] * len(rows)
        self.known = len(rows)

    def extend(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts.tolist(), strict=True)]

    def join(self, tokens: torch.Tensor, features: torch.Tensor | None, counts: torch.Tensor) -> None:
        self.rows += range(self.known, self.known + len(counts))
        self.known += len(counts)
        self.lengths += counts.tolist()

    def select(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.lengths = [self.lengths[i] for i in rows.tolist()]

    def free(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates | None:
        return None

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        drafter, self.step = self.drafter, self.step + 1
        rows = []
        for place, row in enumerate(self.rows):
            good = drafter.wrong_after[(self.step + row) % len(drafter.wrong_after)]
            script = drafter.scripts[row][self.lengths[place] + 1 :][: drafter.depth]
            script += [0] * (drafter.depth - len(script))
            rows.append([token if i < good else token + 1 for i, token in enumerate(script)])
        return self.levels(torch.tensor(rows, device=root.device))

    def levels(self, scripts: torch.Tensor) -> Candidates:
        """Three siblings a level, children of the scripted node of the level above, for scripts `int64 [B, D]`."""
        batch, depth = scripts.shape
        level = torch.arange(depth, device=scripts.device).repeat_interleave(SIBLINGS)
        sibling = torch.arange(SIBLINGS, device=scripts.device).repeat(depth)
        lane = (self.step + level) % SIBLINGS
        tokens = scripts[:, level] + torch.where(sibling == lane, 0, 17 + 5 * sibling)
        above = SIBLINGS * (level - 1) + (self.step + level - 1) % SIBLINGS
        return Candidates(
            tokens=tokens % self.drafter.vocab_size,
            parents=torch.where(level == 0, -1, above).expand(batch, -1).contiguous(),
            depths=(level + 1).expand(batch, -1).contiguous(),
            scores=(-0.5 * level - 0.01 * sibling).expand(batch, -1).contiguous(),
        )
