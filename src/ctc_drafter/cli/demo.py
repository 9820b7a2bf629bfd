"""`ctc-drafter demo`: plain and CTC decoding of the same prompts, and the speedup."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import TextStream, encode_conversation, eos_ids
from ctc_drafter.decode.generate import Generation, generate, plain_generate
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target.model import Target

PROMPTS = (
    "Maya bakes 4 trays of 12 muffins. She sells 30 of them for $2 each. How much money does she make?",
    "What are some good ways to relax after a long day at work?",
    "Write a Python function that returns the sum of the even numbers in a list.",
)
# Middle luminance: at least 3.5:1 against black and against white.
COLOURS = ("color(33)", "color(166)", "color(134)")
SEPARATOR = "|"
WARM_UP_TOKENS = 16
SILENT = 2  # more runs of each prompt

Decode = Callable[[list[int], int, Callable[[int, list[int]], None] | None], Generation]


class RunPrinter:
    """Prints a row's text as it comes. Tokens of one verification share a colour, or stand between separators.

    `seconds` is the time spent printing, which is not the decoder's.
    """

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase, mark_runs: bool):
        self.console, self.mark_runs = console, mark_runs
        self.stream = TextStream(tokenizer)
        self.coloured = has_colours(console)
        self.runs = 0
        self.seconds = 0.0

    def __call__(self, _row: int, tokens: list[int]) -> None:
        start = time.perf_counter()
        text = self.stream.push(tokens)
        if text and self.mark_runs and self.runs and not self.coloured:
            text = SEPARATOR + text
        self._show(text)
        self.runs += 1
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._show(self.stream.close())
        self.console.print()

    def _show(self, text: str) -> None:
        style = COLOURS[self.runs % len(COLOURS)] if self.mark_runs and self.coloured else ""
        self.console.print(Text(text, style), end="", soft_wrap=True)


@dataclass
class Total:
    """One method over all prompts. seconds: of each prompt, one number for each time that it was decoded."""

    outputs: list[list[int]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    seconds: list[list[float]] = field(default_factory=list)

    def add(self, generation: Generation, printing: float) -> None:
        """The next prompt; `printing` seconds were not the decoder's."""
        self.outputs.extend(generation.tokens)
        self.stats += generation.stats
        self.seconds.append([generation.stats.seconds - printing])

    @property
    def tokens_per_s(self) -> float:
        """By the median time of each prompt: what else the machine did for a moment must not count."""
        return self.stats.tokens / max(sum(statistics.median(each) for each in self.seconds), 1e-9)


def demo(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    nodes: int,
    max_new_tokens: int = 128,
    prompts: Sequence[str] = PROMPTS,
) -> None:
    """Streams both decodings of each prompt, then prints speed, acceptance length and whether they agree.

    For the speed both decode each prompt `SILENT` times more, in turn and without printing.
    """
    eos = eos_ids(target.model, tokenizer)

    def plain(prompt: list[int], limit: int, on_tokens: Callable[[int, list[int]], None] | None) -> Generation:
        return plain_generate(target, [prompt], max_new_tokens=limit, eos=eos, on_tokens=on_tokens)

    def ctc(prompt: list[int], limit: int, on_tokens: Callable[[int, list[int]], None] | None) -> Generation:
        return generate(target, drafter, [prompt], max_new_tokens=limit, nodes=nodes, eos=eos, on_tokens=on_tokens)

    methods: dict[str, Decode] = {"plain": plain, "ctc": ctc}
    totals = {name: Total() for name in methods}
    encoded = [encode_conversation(tokenizer, [prompt]) for prompt in prompts]
    for run in methods.values():
        run(encoded[0], WARM_UP_TOKENS, None)
    for prompt, ids in zip(prompts, encoded, strict=True):
        console.rule(style="dim")
        console.print(Text(prompt, "bold"), soft_wrap=True)
        for name, run in methods.items():
            console.print(Text(f"\n{titles(console)[name]}", "dim"))
            printer = RunPrinter(console, tokenizer, mark_runs=name == "ctc")
            generation = run(ids, max_new_tokens, printer)
            printer.close()
            totals[name].add(generation, printer.seconds)
    console.rule(style="dim")
    with console.status("Taking the time again, without printing."):
        for _ in range(SILENT):
            for place, ids in enumerate(encoded):
                for name, run in methods.items():
                    totals[name].seconds[place].append(run(ids, max_new_tokens, None).stats.seconds)
    console.print(summary(totals))


def has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def titles(console: Console) -> dict[str, str]:
    runs = "each run of one colour" if has_colours(console) else f"what stands between {SEPARATOR}"
    return {"plain": "plain decoding", "ctc": f"CTC drafter: {runs} is one verification"}


def summary(totals: dict[str, Total]) -> Table:
    """The closing table; the first method is the baseline."""
    table = Table("method", "tokens/s", "speedup γ", "acceptance length β", "output")
    first = next(iter(totals.values()))
    for name, total in totals.items():
        same = "yes" if total.outputs == first.outputs else "NO"
        gamma = total.tokens_per_s / first.tokens_per_s
        table.add_row(
            name, f"{total.tokens_per_s:.0f}", f"{gamma:.2f}", f"{total.stats.beta:.2f}", f"identical: {same}"
        )
    return table
